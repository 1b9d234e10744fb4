"""A rank that hangs or dies ends the run, soon and with one message that says who waited for whom, and in what."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.models import CONFIGS, with_layers, write_model_folder
from support.runs import module, run_of, verified

from meshweave.config import RunConfig
from meshweave.errors import RankError
from meshweave.schedule.actions import Action, parse_action
from meshweave.step.worker import StepWorker
from meshweave.world import World, launch

TIMEOUT = 3.0
SLACK = 7.0
"""Seconds of building the model, of saying what went wrong, and of a busy machine."""

PIPELINE = module("0"), module("1-2", pp=2)


def hang() -> None:
    time.sleep(600)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_on(folder: Path, vision: dict[str, Any], language: dict[str, Any], **changes: Any) -> RunConfig:
    write_model_folder(with_layers(CONFIGS["llava"](), 3, 2), folder)
    return run_of(folder, vision, language, train={"microbatches": 3}, timeout_seconds=TIMEOUT, **changes)


def fault_of(run: RunConfig, rank: int, action: str, fault: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> str:
    """What the run ends with if, on one rank, this befalls an action."""

    def faulty(worker: StepWorker, its: Action) -> None:
        if worker.world.rank == rank and its == parse_action(action):
            fault()
        compute(worker, its)

    compute = StepWorker.compute
    monkeypatch.setattr(StepWorker, "compute", faulty)
    started = time.monotonic()
    with pytest.raises(RankError) as raised:
        verified(run, steps=1)
    assert time.monotonic() - started < (TIMEOUT if fault is hang else 0) + SLACK
    return str(raised.value)


def hangs_there(text: str, rank: int) -> bool:
    """Whether the message ends with the rank that said nothing, and with where it was."""
    return (
        re.search(rf"\n  no word from rank {rank}\n  rank {rank} was in\n    File .*test_hang\.py\", line \d+ in hang\n", text)
        is not None
    )


def test_a_hanging_stage_is_named_by_those_that_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder waits for the first stage, and that for the second, which hangs."""
    text = fault_of(run_on(tmp_path, *PIPELINE), 2, "language.1F1", hang, monkeypatch)
    assert "rank 1: language.0B1 waited for the gradients of the activations of language, microbatch 1, from rank 2 (" in text
    assert "rank 0: vision.0B1 waited for the gradients of the media tokens of vision, microbatch 1, from rank 1 (" in text
    assert hangs_there(text, rank=2)


def test_a_hanging_encoder_is_named_by_the_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = fault_of(run_on(tmp_path, *PIPELINE), 0, "vision.0F1", hang, monkeypatch)
    assert "rank 1: language.0F1 waited for the media tokens of vision, microbatch 1, from rank 0 (vision.0RECV_X1<0)" in text
    assert hangs_there(text, rank=0)


def test_a_hang_in_the_last_action_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = fault_of(run_on(tmp_path, *PIPELINE), 0, "vision.0B2", hang, monkeypatch)
    assert re.search(r"rank [12]: sums over all ranks after the step's last action: a collective in it did not end", text)
    assert hangs_there(text, rank=0)


@pytest.mark.parametrize(
    ("action", "vision", "language"),
    [
        ("language.0F1", module("0"), module("0-1", tp=2)),
        ("vision.0F0", module("0-1", dp=2), module("0-1", dp=2)),
        ("vision.0REDUCE", module("0-1", dp=2), module("0-1", pp=2)),
    ],
)
def test_a_hang_in_a_group_is_named_by_the_action(
    action: str, vision: dict[str, Any], language: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = fault_of(run_on(tmp_path, vision, language), 1, action, hang, monkeypatch)
    assert text.startswith(f"rank 0: {action}: a collective in it did not end within 3 s")
    assert hangs_there(text, rank=1)


@pytest.mark.parametrize(("rank", "action"), [(2, "language.1B1"), (0, "vision.0F0")])
def test_a_killed_rank_is_named_at_once(rank: int, action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = fault_of(run_on(tmp_path, *PIPELINE), rank, action, die, monkeypatch)
    assert text.startswith(f"rank {rank}: its process ended by SIGKILL")


def test_a_hang_outside_a_step_is_named(tmp_path: Path) -> None:
    def stuck(world: World, run: RunConfig) -> None:
        if world.rank == 1:
            hang()

    with pytest.raises(
        RankError, match=r"rank 0: work outside a step: a collective(.|\n)*no word from rank 1\n(.|\n)* in hang\n"
    ):
        launch(run_on(tmp_path, module("0"), module("0-1", tp=2)), stuck)


def test_an_error_of_one_rank_is_not_hidden_by_those_that_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(worker: StepWorker, action: Action) -> None:
        if action == parse_action("language.1F0"):
            raise ZeroDivisionError("a fault in the stage")
        compute(worker, action)

    compute = StepWorker.compute
    monkeypatch.setattr(StepWorker, "compute", broken)
    with pytest.raises(Exception, match=r"ZeroDivisionError: a fault in the stage\non rank 2, in language\.1F0"):
        verified(run_on(tmp_path, *PIPELINE), steps=1)
