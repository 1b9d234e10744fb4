"""Where does this process stand? Joins a world that a launcher made, or spawns a local one, and ends it cleanly."""

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

from meshweave.config import LANGUAGE, RunConfig
from meshweave.errors import ConfigError, MeshweaveError, RankError, StoppedError
from meshweave.layout import Placement, placements
from meshweave.local_ranks import run_local_ranks
from meshweave.parallel.mesh import build_expert_meshes, build_meshes
from meshweave.rendezvous import meet
from meshweave.schedule.runtime import lost_ranks_named
from meshweave.signals import StopRequest, listening

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """What every rank-dependent decision needs."""

    rank: int
    size: int
    device: torch.device
    placements: Mapping[str, Placement]
    meshes: Mapping[str, DeviceMesh]
    data_group: dist.ProcessGroup | None
    """Gloo group of all ranks for the data loader's thread; None for a single process."""
    node_size: int | None = None
    timeout_seconds: float = 600.0
    """How long a rank waits for another before it ends the run."""
    expert_meshes: Mapping[str, DeviceMesh] = field(default_factory=dict)
    """Of the modules that split their experts."""
    stop: StopRequest = field(default_factory=StopRequest)
    """Whether this rank was asked to stop; a loop asks at each step's end."""

    @property
    def leads_lane(self) -> bool:
        """Whether this rank counts its language-model lane's samples and targets, for all ranks of the lane's last stage."""
        language = self.placements[LANGUAGE]
        coordinate = language.coordinate(self.rank)
        return self.speaks_for_stage and coordinate is not None and coordinate["pp"] == language.layout.pp - 1

    @property
    def speaks_for_stage(self) -> bool:
        """Whether this rank is the first of those that share a lane and a stage of the language model."""
        coordinate = self.placements[LANGUAGE].coordinate(self.rank)
        return coordinate is not None and all(index == 0 for axis, index in coordinate.items() if axis not in ("dp", "pp"))


def launch(run: RunConfig, work: Callable[[World, RunConfig], Result]) -> Result | None:
    """Calls `work` on every rank of the run and returns rank 0's result; None in a launched process other than rank 0.

    On GPUs local processes are spawned, not forked: `work` must then be picklable, e.g. a function or a `partial` of one.

    Under torchrun or Slurm (more than one task) this process joins the world that is there. Otherwise it starts
    `run.world_size` local processes, or works by itself if that is 1.

    Raises:
        ConfigError: the world that is there, or the number of GPUs, does not fit the run file; before any process group exists.
        StoppedError: this process, or a rank, was asked to stop.
        MeshweaveError: what `work` raised on some rank; a `RankError` around it in a launched world.
        RankError: a rank hung, or its process was ended.
        RuntimeError: anything else that `work` raised on a local rank.
    """
    _join_slurm()
    world = int(os.environ.get("WORLD_SIZE", "0"))
    if world:
        if "RANK" not in os.environ:
            raise ConfigError("WORLD_SIZE is set, but RANK is not; start with torchrun or srun, or unset WORLD_SIZE")
        if world != run.world_size:
            raise ConfigError(
                f"the run file describes {run.world_size} ranks, but the launcher started {world}; "
                "start that many, or change the modules' ranks (`idle_ranks` names ranks that shall do nothing)"
            )
        rank = int(os.environ["RANK"])
        if "TORCHELASTIC_RUN_ID" in os.environ:
            # torchrun that is killed leaves its ranks at work: on Linux they are then asked to stop.
            _prctl_pr_set_pdeathsig(signal.SIGTERM)
            threading.Thread(target=_end_with_launcher, args=(run.preemption_seconds,), daemon=True).start()
        try:
            result = _alone(run, work, rank, int(os.environ.get("LOCAL_RANK", rank)), "env://")
        except StoppedError:
            # Who launched this world ends what is left of it by SIGTERM once a rank has ended; this one shall end by itself.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise
        except RankError:
            raise
        except MeshweaveError as error:
            raise RankError(f"rank {rank}: {error}") from error
        return result if rank == 0 else None
    gpus = torch.cuda.device_count()
    if gpus and run.world_size > gpus:
        raise ConfigError(
            f"the run file describes {run.world_size} ranks, but this machine has {gpus} GPUs; start it on all "
            "nodes with torchrun, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to run on the CPU"
        )
    with tempfile.TemporaryDirectory(prefix="meshweave-") as folder:
        store = f"file://{folder}/store"
        if run.world_size == 1:
            return _alone(run, work, 0, 0, store)
        # A forked child has torch imported already; CUDA does not survive a fork.
        body = partial(_local_rank, run, work, store)
        return run_local_ranks(run.world_size, body, Path(folder), "spawn" if gpus else "fork", run.preemption_seconds)


def _end_with_launcher(grace_seconds: float) -> None:
    """A thread's work: who waits for another rank hears no request to stop, and must not hold its device, and the folder."""
    launcher = os.getppid()
    while os.getppid() == launcher:
        time.sleep(1.0)
    time.sleep(grace_seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def _alone(run: RunConfig, work: Callable[[World, RunConfig], Result], rank: int, local_rank: int, init_method: str) -> Result:
    """In this process, which gets its signals from outside."""
    stop = StopRequest()
    with listening(stop):
        return _with_process_group(run, work, rank, local_rank, init_method, stop)


def _local_rank(run: RunConfig, work: Callable[[World, RunConfig], Result], store: str, rank: int, stop: StopRequest) -> Result:
    return _with_process_group(run, work, rank, rank, store, stop)


def _with_process_group(
    run: RunConfig,
    work: Callable[[World, RunConfig], Result],
    rank: int,
    local_rank: int,
    init_method: str,
    stop: StopRequest,
) -> Result:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=run.timeout_seconds)
    with lost_ranks_named(rank, run.timeout_seconds, "meeting the other ranks"):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            **_meeting_place(run, rank, init_method),
            rank=rank,
            world_size=run.world_size,
            timeout=timeout,
            # NCCL's communicator must exist before the boundary's first exchange, which not every rank takes part in.
            device_id=device if cuda else None,
        )
    try:
        where = placements(run)
        meshes, expert_meshes = build_meshes(where, device.type), build_expert_meshes(where, device.type)
        data_group = dist.new_group(backend="gloo", timeout=timeout) if run.world_size > 1 else None
        world = World(
            rank, run.world_size, device, where, meshes, data_group, run.node_size, run.timeout_seconds, expert_meshes, stop
        )
        with lost_ranks_named(rank, run.timeout_seconds, "work outside a step"):
            # A rank that leaves early, before or instead of a barrier, aborts the others.
            try:
                result = work(world, run)
            except StoppedError:
                dist.barrier()
                raise
            dist.barrier()
        return result
    finally:
        dist.destroy_process_group()


def _meeting_place(run: RunConfig, rank: int, init_method: str) -> dict[str, Any]:
    """Where the ranks find each other, as arguments for torch."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or init_method != "env://":
        return {"init_method": init_method}
    store, _, _ = next(rendezvous(init_method, timeout=timedelta(seconds=run.timeout_seconds)))
    return {"store": meet(store, rank, run.world_size, run.timeout_seconds)}


def _join_slurm() -> None:
    """Under `srun` with more than one task, sets the variables that torchrun would have set.

    A batch script outside `srun` is no task: it lacks SLURM_STEP_NUM_TASKS.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "WORLD_SIZE" in os.environ or tasks == 1 or "SLURM_PROCID" not in os.environ:
        return
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_NODELIST"]
        shown = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        os.environ["MASTER_ADDR"] = shown.stdout.split()[0]
    # Jobs that share a node must not share a port.
    os.environ.setdefault("MASTER_PORT", str(29500 + int(os.environ.get("SLURM_JOB_ID", "0")) % 10000))
    os.environ |= {
        "WORLD_SIZE": str(tasks),
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ.get("SLURM_LOCALID", "0"),
    }
