"""A run that torchrun started goes on by itself where a rank is lost, with the ranks that are there then."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from support.models import CONFIGS, write_model_folder
from support.ranks import run_ranks

from meshweave.config import RunConfig, load_config
from meshweave.model.blueprint import read_model_config
from meshweave.rendezvous import meet
from meshweave.train.trainer import train
from meshweave.world import _end_with_launcher, launch

EVERYWHERE, ONE = {"ranks": "0-1", "dp": 2}, {"ranks": 0}


def write_run(folder: Path, **changes: Any) -> Path:
    tree: dict[str, Any] = {
        "model": str(write_model_folder(CONFIGS["llava"](), folder / "model")),
        "modules": {"vision": EVERYWHERE, "language": EVERYWHERE},
        "layouts": [{"modules": {"vision": ONE, "language": ONE}}],
        "data": {"source": "synthetic", "samples": 24},
        "train": {
            "steps": 24,
            "batch_size": 4,
            "min_lr_ratio": 1.0,
            "resume": "auto",
            "checkpoint": {"every": 2, "async": False},
        },
        "weights": "seeded",
        "dtype": "float64",
        "output": str(folder / "out"),
        "timeout_seconds": 60,
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(tree | changes))
    return file


def records(folder: Path) -> list[dict[str, Any]]:
    file = folder / "out" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def rank_of(launchers: list[int], rank: int) -> int:
    """The process of a rank of torchrun's."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            its = (folder / "environ").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in launchers and f"RANK={rank}".encode() in its:
                return int(folder.name)
    raise AssertionError(f"rank {rank} is not there")


def until(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not holds():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_run_whose_rank_is_killed_is_gone_on_with_by_torchrun(nodes: int, tmp_path: Path) -> None:
    """Two ranks, of one launcher or of one each: those stand for two nodes, which find each other over a socket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = [f"--master-port={port}"] if nodes == 1 else ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={2 // nodes}"]
    command = [*torchrun, "--max-restarts=1", *meeting, "-m", "meshweave", "train", str(write_run(tmp_path))]
    log = tmp_path / "log"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        agents = [
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, text=True, env=env) for _ in range(nodes)
        ]
        try:
            until(lambda: len(records(tmp_path)) > 3, agents[0])
            # The one that has the folder, writes the record, and whose address the others know.
            os.kill(rank_of([agent.pid for agent in agents], 0), signal.SIGKILL)
            codes = [agent.wait(150) for agent in agents]
        finally:
            for agent in agents:
                agent.kill()
    said = log.read_text()
    assert codes == [0] * nodes, said
    assert [record["step"] for record in records(tmp_path)] == list(range(24)), said
    assert said.count("going on from") == 1, said
    assert "a rank of the same group hangs, or is gone" in said
    assert "Traceback" not in said


def trained(file: Path, ranks: int, *overrides: str) -> None:
    def work(world: Any, run: RunConfig) -> Any:
        return train(world, run, config)

    run = load_config(file, overrides, ranks)
    assert run.world_size == ranks
    config = read_model_config(run.model)
    launch(run, work)


def test_a_run_that_loses_a_rank_and_gets_it_back_has_the_losses_of_one_that_did_not(tmp_path: Path) -> None:
    for folder in ("lost", "whole"):
        (tmp_path / folder).mkdir()
    for ranks, steps in ((2, 2), (1, 4), (2, 6)):
        trained(write_run(tmp_path / "lost"), ranks, f"train.steps={steps}")
    trained(write_run(tmp_path / "whole"), 2, "train.steps=6")
    assert [record["step"] for record in records(tmp_path / "lost")] == list(range(6))
    for again, once in zip(records(tmp_path / "lost"), records(tmp_path / "whole"), strict=True):
        assert again["loss"] == pytest.approx(once["loss"], rel=1e-9)
        assert again["grad_norm"] == pytest.approx(once["grad_norm"], rel=1e-9)


def test_ranks_that_meet_again_find_nothing_of_the_dead(tmp_path: Path) -> None:
    def body(rank: int) -> list[str]:
        # Each has a client of its own: a fork copies no threads, and so no server's.
        store = dist.TCPStore("127.0.0.1", port, 3, is_master=False)
        found = []
        for generation in range(3):
            if generation == 1 and rank == 2:
                # A generation that never was whole: one rank asked, and was killed.
                store.append("meshweave/hello", "dead ")
            ours = meet(store, rank, 3, 20.0)
            assert not ours.check([f"address-{rank}"])
            ours.set(f"address-{rank}", f"{generation} {rank}")
            found += [ours.get(f"address-{other}").decode() for other in range(3)]
            dist.barrier()
        return found

    server = dist.TCPStore("127.0.0.1", 0, 3, is_master=True, wait_for_workers=False)
    port = server.port
    expected = [f"{generation} {rank}" for generation in range(3) for rank in range(3)]
    assert run_ranks(3, body) == [expected] * 3


def test_a_rank_that_hears_nothing_ends_some_time_after_its_torchrun() -> None:
    reader, writer = os.pipe()
    launcher = os.fork()
    if not launcher:
        if not os.fork():
            threading.Thread(target=_end_with_launcher, args=(0.2,), daemon=True).start()
            time.sleep(600)
        time.sleep(0.3)
        os._exit(0)
    os.close(writer)
    os.waitpid(launcher, 0)
    # It has the other end until it is gone.
    assert select.select([reader], [], [], 0.1)[0] == []
    assert select.select([reader], [], [], 10.0)[0] == [reader]
    os.close(reader)
