"""No signal and no death, of the launcher, of a rank or of all, leaves a rank behind; and one line says what ended the run."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from signal import Signals
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from support.launcher import Launcher
from support.models import CONFIGS, write_model_folder

from meshweave.cli import app
from meshweave.errors import RankError, StoppedError
from meshweave.local_ranks import run_local_ranks
from meshweave.signals import StopRequest

AFTER = r"after \d+ steps"
GONE = r"error: the launcher \(process \d+\) is gone; its ranks were ended"


Starts = Callable[..., Launcher]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starts]:
    """Starts launchers, and ends what is left of them."""
    started = []

    def start(work: Callable[[], None], ignored: Sequence[Signals] = ()) -> Launcher:
        started.append(Launcher(work, tmp_path / "log", ignored))
        return started[-1]

    yield start
    for run in started:
        run.kill()


@pytest.fixture
def start_ranks(start: Starts, tmp_path: Path) -> Starts:
    """Starts a launcher of two ranks, and waits until all of them are there."""

    def start_ranks(body: Callable[[int, StopRequest], Any], *, grace_seconds: float = 30.0, **options: Any) -> Launcher:
        def counted(rank: int, stop: StopRequest) -> Any:
            (tmp_path / f"ready-{rank}").touch()
            return body(rank, stop)

        def work() -> None:
            try:
                run_local_ranks(2, counted, folder, "fork", grace_seconds)
            except (StoppedError, RankError) as error:
                print(error, flush=True)
                raise SystemExit(1) from None

        folder = tmp_path / "ranks"
        folder.mkdir()
        run = start(work, **options)
        run.until(lambda: all((tmp_path / f"ready-{rank}").exists() for rank in range(2)) and len(run.children) == 3)
        return run

    return start_ranks


@pytest.fixture
def start_training(start: Starts, tmp_path: Path) -> Starts:
    """Starts `meshweave train`, and waits until it has done some steps."""

    def start_training(ranks: int = 2, **options: Any) -> Launcher:
        where = {"ranks": f"0-{ranks - 1}"}
        tree = {
            "model": str(write_model_folder(CONFIGS["llava"](), tmp_path / "model")),
            "modules": {"vision": where | {"dp": ranks}, "language": where | {"tp": ranks}},
            "data": {"source": "synthetic"},
            "train": {"steps": 100_000, "batch_size": 4, "log_every": 100_000},
            "weights": "seeded",
        }
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(tree))
        run = start(lambda: app(["train", str(file), "--set", f"output={tmp_path / 'out'}"]), **options)
        metrics = tmp_path / "out" / "metrics.jsonl"
        run.until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3)
        return run

    return start_training


def send(run: Launcher, to: str, number: str) -> None:
    if to == "group":
        os.killpg(run.pid, Signals[number])
    else:
        os.kill(run.pid if to == "launcher" else run.children[1], Signals[number])


BACKGROUND = (Signals.SIGINT,)
"""What a shell script has ignored for `… &`."""


@pytest.mark.parametrize(
    ("to", "number", "ignored", "code", "line"),
    [
        ("launcher", "SIGTERM", BACKGROUND, 143, f"stopped by SIGTERM {AFTER}"),
        ("launcher", "SIGINT", BACKGROUND, 130, f"stopped by SIGINT {AFTER}"),
        ("launcher", "SIGHUP", (), 129, f"stopped by SIGHUP {AFTER}"),
        ("launcher", "SIGKILL", BACKGROUND, -9, rf"{GONE} {AFTER}"),
        ("rank", "SIGTERM", BACKGROUND, 143, f"stopped by SIGTERM, sent to rank 1, {AFTER}"),
        ("rank", "SIGKILL", (), 2, f"error: rank 1: its process ended by SIGKILL {AFTER}; the kernel does that .*"),
        ("group", "SIGINT", (), 130, f"stopped by SIGINT {AFTER}"),
    ],
)
def test_a_signal_ends_a_run_and_all_of_its_ranks_with_one_line(
    to: str, number: str, ignored: tuple[Signals, ...], code: int, line: str, start_training: Starts, tmp_path: Path
) -> None:
    run = start_training(ignored=ignored)
    send(run, to, number)
    assert run.end(seconds=10) == code, run.log.read_text()
    said, *way_on = run.log.read_text().splitlines()
    assert re.fullmatch(line, said)
    assert len(way_on) == (code > 128)
    if code > 128:
        # Who was asked to stop has saved first.
        logged = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
        assert said.endswith(f" after {len(logged)} steps")
        assert re.fullmatch(rf"`meshweave train .* --resume` goes on from .*step-{len(logged)}", way_on[0])


def test_a_run_of_one_rank_stops_at_a_step(start_training: Starts) -> None:
    run = start_training(ranks=1)
    send(run, "launcher", "SIGTERM")
    assert run.end(seconds=10) == 143
    assert re.match(
        f"stopped by SIGTERM {AFTER}\n`meshweave train \S+ --set output=\S+ --resume` goes on from", run.log.read_text()
    )


def polite(rank: int, stop: StopRequest) -> None:
    """Does as loops do."""
    stop.reached(7)
    while stop.signal is None:
        time.sleep(0.01)
    raise stop.stopped(stop.signal)


@pytest.mark.parametrize("ignored", [BACKGROUND, ()], ids=["background", "foreground"])
@pytest.mark.parametrize("to", ["launcher", "group"])
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_ranks_are_asked_to_stop(number: str, to: str, ignored: tuple[Signals, ...], start_ranks: Starts) -> None:
    run = start_ranks(polite, ignored=ignored)
    send(run, to, number)
    assert run.end(seconds=5) == 1
    assert run.log.read_text() == f"stopped by {number} after 7 steps\n"


@pytest.mark.parametrize("number", ["SIGKILL", "SIGQUIT", "SIGALRM"])
def test_ranks_end_with_the_launcher(number: str, start_ranks: Starts) -> None:
    run = start_ranks(stuck)
    send(run, "launcher", number)
    assert run.end(seconds=5) == -Signals[number]
    assert re.search(f"{GONE} after 7 steps\n$", run.log.read_text())


def test_nothing_is_left_where_all_are_killed(start_ranks: Starts) -> None:
    run = start_ranks(stuck)
    send(run, "group", "SIGKILL")
    assert run.end(seconds=5) == -9


def test_nohup_is_respected(start_ranks: Starts) -> None:
    def body(rank: int, stop: StopRequest) -> None:
        time.sleep(0.5)
        assert stop.signal is None

    run = start_ranks(body, ignored=(Signals.SIGHUP,))
    send(run, "group", "SIGHUP")
    assert run.end(seconds=5) == 0, run.log.read_text()


def stuck(rank: int, stop: StopRequest) -> None:
    stop.reached(7)
    time.sleep(600)


def waiting(rank: int, stop: StopRequest, store: Path) -> None:
    """Rank 0 waits for rank 1 in C++."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    if rank == 1:
        time.sleep(600)
    dist.all_reduce(torch.zeros(1))


def test_ranks_that_wait_in_a_collective_end_with_the_launcher(start_ranks: Starts, tmp_path: Path) -> None:
    run = start_ranks(lambda rank, stop: waiting(rank, stop, tmp_path / "store"))
    time.sleep(0.5)
    send(run, "launcher", "SIGKILL")
    assert run.end(seconds=5) == -9
    assert not (tmp_path / "ranks").exists()


def test_ranks_that_a_debugger_stopped_end_with_the_launcher(start_ranks: Starts) -> None:
    run = start_ranks(stuck)
    for rank in run.children[:2]:
        os.kill(rank, signal.SIGSTOP)
    send(run, "launcher", "SIGKILL")
    assert run.end(seconds=5) == -9


def test_the_kernel_suffices(start_ranks: Starts) -> None:
    run = start_ranks(stuck)
    os.kill(run.children[2], signal.SIGKILL)
    send(run, "launcher", "SIGKILL")
    assert run.end(seconds=5) == -9
    assert run.log.read_text() == ""


def test_the_guard_suffices(start_ranks: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshweave.local_ranks._prctl_pr_set_pdeathsig", lambda number: None)
    run = start_ranks(stuck)
    send(run, "launcher", "SIGKILL")
    assert run.end(seconds=5) == -9


def test_a_second_interrupt_ends_a_run_at_once(start_ranks: Starts) -> None:
    run = start_ranks(stuck)
    send(run, "group", "SIGINT")
    time.sleep(0.5)
    assert len(run.children) == 3
    send(run, "group", "SIGINT")
    assert run.end(seconds=5) == 1
    assert run.log.read_text() == "stopped by SIGINT, at once, after 7 steps\n"


def test_ranks_that_do_not_stop_in_time_are_killed(start_ranks: Starts) -> None:
    run = start_ranks(stuck, grace_seconds=0.5)
    send(run, "launcher", "SIGTERM")
    assert run.end(seconds=5) == 1
    expected = "stopped by SIGTERM after 7 steps; its ranks did not end within 0.5 s and were killed\n"
    assert run.log.read_text() == expected


def test_a_rank_that_dies_by_a_fault_says_where(tmp_path: Path) -> None:
    def body(rank: int, stop: StopRequest) -> None:
        if rank == 1:
            the_faulty_line()
        time.sleep(600)

    def the_faulty_line() -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    with pytest.raises(RankError, match=r"(?s)rank 1: its process ended by SIGSEGV\n.*in the_faulty_line\n.*in body\n"):
        run_local_ranks(2, body, tmp_path, "fork", 30.0)


@pytest.mark.parametrize("code", [0, 7])
def test_a_rank_that_just_leaves_is_named(code: int, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=f"rank 0: its process ended with exit code {code}"):
        run_local_ranks(2, lambda rank, stop: os._exit(code) if rank == 0 else None, tmp_path, "fork", 30.0)


def test_handlers_are_as_before(tmp_path: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    assert run_local_ranks(2, lambda rank, stop: rank + 5, tmp_path, "fork", 30.0) == 5
    assert [signal.getsignal(number) for number in numbers] == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
