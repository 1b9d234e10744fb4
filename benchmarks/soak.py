"""Does a run survive whatever ends it? Killed at random moments, it goes on by itself to the weights of a run that was let be.

    python benchmarks/soak.py [--kills 100] [--seed 0] [--ranks 2]

Each round draws a moment (start-up, steps, saves, the export and the evaluation included), a process (the launcher or one of
its ranks) and a signal (mostly SIGKILL), and sends it; then the same command starts again, with `train.resume: auto`. A run that
has reached its end is compared, bit for bit (float64), with the one that nobody disturbed, and begun anew. Exits 1 if weights
differ, a process outlives its launcher by ten seconds, or more is lost than the steps since the last checkpoint.
"""

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlavaConfig, Qwen3Config

from meshweave.checkpoint.manifest import newest_whole, step_of
from meshweave.config import RunConfig, parse_config
from meshweave.errors import MeshweaveError, StoppedError
from meshweave.model.blueprint import read_model_config
from meshweave.train.trainer import train
from meshweave.world import launch

STEPS, EVERY = 24, 4
SIGNALS = {Signals.SIGKILL: 6, Signals.SIGTERM: 2, Signals.SIGINT: 1, Signals.SIGUSR1: 1}
"""How often each is sent, relative to the others."""
_PATIENCE = 90.0


@dataclass
class Report:
    """What a soak has seen."""

    kills: Counter[str] = field(default_factory=Counter)
    """By signal and process."""
    finished: int = 0
    """Runs that reached their end, each equal to the one that was let be."""
    lost: list[int] = field(default_factory=list)
    """Steps that had to be done again, kill by kill."""
    faults: list[str] = field(default_factory=list)


def soak(run: RunConfig, kills: int, seed: int = 0) -> Report:
    """Trains `run` (its `train.resume` is `auto`) to its end, again and again, until it has been killed so many times."""
    draw, report = random.Random(seed), Report()
    alone = run.model_copy(update={"output": run.output.with_name("undisturbed")})
    started = time.monotonic()
    if code := _ended(_launcher(alone)):
        report.faults.append(f"undisturbed, it ended with {code}")
        return report
    whole, expected = time.monotonic() - started, _weights(alone)
    while sum(report.kills.values()) < kills or run.output.exists():
        launcher = _launcher(run)
        moment = time.monotonic() + draw.uniform(0.0, 0.7 * whole)
        if sum(report.kills.values()) >= kills:
            moment += _PATIENCE
        while time.monotonic() < moment and not _is_over(launcher):
            time.sleep(0.005)
        ranks = _children(launcher)
        if not _is_over(launcher):
            target = draw.choice(["launcher", *range(run.world_size)])
            number = draw.choices(list(SIGNALS), list(SIGNALS.values()))[0]
            pid = launcher if target == "launcher" or target >= len(ranks) else ranks[int(target)]
            report.kills[f"{number.name} to {'the launcher' if pid == launcher else 'a rank'}"] += 1
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        logged = _logged(run)
        code = _ended(launcher)
        deadline = time.monotonic() + 10
        while (left := [pid for pid in ranks if _alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        if code is None or left:
            report.faults.append(f"alive after it was ended: {'launcher' if code is None else left}")
            return report
        newest, _ = newest_whole(run.output)
        saved = step_of(newest) if newest else 0
        report.lost.append(max(0, logged - saved))
        # A save in the background may be on its way when the next is due: two intervals are the most.
        if logged - saved > 2 * EVERY:
            report.faults.append(f"{logged} steps were done, and {saved} saved")
        if code == 0:
            actual = _weights(run)
            if actual.keys() != expected.keys() or not all(torch.equal(actual[name], expected[name]) for name in expected):
                report.faults.append("its weights are others than those of the run that was let be")
                return report
            report.finished += 1
            shutil.rmtree(run.output)
    return report


def run_of(folder: Path, ranks: int) -> RunConfig:
    """A small run that saves often."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=4, projection_dim=32)
    text = Qwen3Config(**sizes, num_hidden_layers=2, num_key_value_heads=4, head_dim=8, vocab_size=128)
    LlavaConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_id=127).save_pretrained(folder / "model")
    everywhere = {"ranks": f"0-{ranks - 1}", "dp": ranks}
    checkpoint = {"every": EVERY, "keep": 2}
    tree: dict[str, Any] = {
        "model": str(folder / "model"),
        "modules": {"vision": everywhere, "language": everywhere},
        "data": {"source": "synthetic", "samples": 32, "eval_samples": 8},
        "train": {"steps": STEPS, "batch_size": 2 * ranks, "resume": "auto", "checkpoint": checkpoint},
        "weights": "seeded",
        "dtype": "float64",
        "output": str(folder / "out"),
        "timeout_seconds": 30,
        "preemption_seconds": 20,
    }
    return parse_config(tree)


def _launcher(run: RunConfig) -> int:
    """A process that trains, and ends as the command would."""
    pid = os.fork()
    if pid:
        return pid
    code = 2
    try:
        logging.disable()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        config = read_model_config(run.model)
        launch(run, lambda world, run: train(world, run, config))
        code = 0
    except StoppedError as end:
        code = 128 + end.signal
    except MeshweaveError:
        pass
    finally:
        os._exit(code)


def _is_over(pid: int) -> bool:
    return not _alive(pid)


def _ended(pid: int) -> int | None:
    """The exit code, once it is there; None if it takes too long."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def _state(pid: int) -> tuple[str, int]:
    """Of a process: its state, and its parent."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
        return state, int(parent)
    except OSError:
        return "Z", 0


def _alive(pid: int) -> bool:
    return _state(pid)[0] != "Z"


def _children(pid: int) -> list[int]:
    found = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return sorted(child for child in found if _state(child)[1] == pid)


def _logged(run: RunConfig) -> int:
    """Steps that the record shows."""
    file = run.output / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    steps = 0
    for line in lines:
        with suppress(ValueError):
            steps = json.loads(line)["step"] + 1
    return steps


def _weights(run: RunConfig) -> dict[str, torch.Tensor]:
    files = sorted((run.output / "model").glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def main() -> None:
    """Soaks and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        report = soak(run_of(Path(folder), asked.ranks), asked.kills, asked.seed)
    for what, count in sorted(report.kills.items()):
        print(f"{count:>5}  {what}")
    again = sum(report.lost)
    print(f"{sum(report.kills.values())} kills: {report.finished} runs of {STEPS} steps reached their end with the same weights")
    print(f"steps done again: {again}, at most {max(report.lost, default=0)} after one kill (a checkpoint every {EVERY})")
    for fault in report.faults:
        print(f"FAULT  {fault}")
    sys.exit(bool(report.faults))


if __name__ == "__main__":
    main()
