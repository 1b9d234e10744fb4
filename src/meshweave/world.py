"""Where does this process stand? Joins a world that a launcher made, or spawns a local one, and ends it cleanly."""

import gc
import logging
import os
import pickle
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh

from meshweave.config import LANGUAGE, RunConfig
from meshweave.errors import ConfigError, MeshweaveError, RankError
from meshweave.layout import Placement, placements
from meshweave.parallel.mesh import build_expert_meshes, build_meshes
from meshweave.schedule.runtime import lost_ranks_named

Result = TypeVar("Result")

_GRACE_SECONDS = 1.0
"""For how long a rank that waited in vain for another stays, so that the others can say the same."""

# It warns of every process that it ends after another has failed; the failure itself is what matters.
logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)


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
        MeshweaveError: what `work` raised on some rank; a `RankError` around it in a launched world.
        RankError: a rank hung, or its process was ended.
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
        try:
            result = _with_process_group(run, work, rank, int(os.environ.get("LOCAL_RANK", rank)), "env://")
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
        if run.world_size == 1:
            return _with_process_group(run, work, 0, 0, f"file://{folder}/store")
        # A forked child has torch imported already; CUDA does not survive a fork.
        method = "spawn" if gpus else "fork"
        try:
            with _no_garbage():
                mp.start_processes(_local_rank, (run, work, folder), nprocs=run.world_size, start_method=method)
        except mp.ProcessExitedException as error:
            raise _ended(error) from error
        except mp.ProcessRaisedException as error:
            failure = _failure(Path(folder), error.error_index, run.world_size)
            if failure is None:
                raise
            raise failure from error
        return pickle.loads((Path(folder) / "result").read_bytes())


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Processes that are forked inside it do not collect this one's garbage: a process group of an earlier run would wait there
    for its threads, which a fork does not copy."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _local_rank(rank: int, run: RunConfig, work: Callable[[World, RunConfig], Any], folder: str) -> None:
    # A fork does not copy OpenMP's threads: a child that asks for some hangs if the parent had started them.
    torch.set_num_threads(1)
    try:
        result = _with_process_group(run, work, rank, rank, f"file://{folder}/store")
    except MeshweaveError as error:
        (Path(folder) / f"failure-{rank}").write_bytes(pickle.dumps(error))
        if isinstance(error, RankError):
            # One rank that hangs lets all others wait in vain, and this process' end would end them: they shall have their say.
            time.sleep(_GRACE_SECONDS)
        raise
    if rank == 0:
        (Path(folder) / "result").write_bytes(pickle.dumps(result))


def _failure(folder: Path, failed: int, world: int) -> MeshweaveError | None:
    """What the first rank to fail said, and of an error between ranks what the others said; None if it was no error of ours."""
    if not (folder / f"failure-{failed}").exists():
        return None
    files = sorted(folder.glob("failure-*"), key=lambda file: file.stat().st_mtime_ns)
    first, *others = (pickle.loads(file.read_bytes()) for file in files)
    if not isinstance(first, RankError):
        return first
    silent = sorted(set(range(world)) - {int(file.name.partition("-")[2]) for file in files})
    lines = [str(first), *(f"  also {other}" for other in others)]
    if silent:
        lines.append(f"  no word from {'rank' if len(silent) == 1 else 'ranks'} {', '.join(map(str, silent))}")
    return RankError("\n".join(lines))


def _ended(error: mp.ProcessExitedException) -> RankError:
    how = f"by {error.signal_name}" if error.signal_name else f"with exit code {error.exit_code}"
    hint = "; the kernel does that where memory runs out" if error.signal_name == "SIGKILL" else ""
    return RankError(f"rank {error.error_index}: its process ended {how} and said nothing{hint}")


def _with_process_group(
    run: RunConfig, work: Callable[[World, RunConfig], Result], rank: int, local_rank: int, init_method: str
) -> Result:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=run.timeout_seconds)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=init_method,
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
        world = World(rank, run.world_size, device, where, meshes, data_group, run.node_size, run.timeout_seconds, expert_meshes)
        with lost_ranks_named(rank, run.timeout_seconds, "work outside a step"):
            result = work(world, run)
            # A rank that leaves early now and then aborts the others.
            dist.barrier()
        return result
    finally:
        dist.destroy_process_group()


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
