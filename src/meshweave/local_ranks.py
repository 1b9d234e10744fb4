"""Whose are the local ranks? One launcher's: it starts them, asks them to stop, says what ended them, and none outlives it.

Where the launcher is ended itself, by whatever means, the kernel ends the ranks with it (Linux), and a guard does: a process
that waits for nothing else, and says so in one line.
"""

import ctypes
import faulthandler
import gc
import os
import pickle
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess, SpawnProcess
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from signal import Signals
from typing import Any, Literal, TypeVar

import torch
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

from meshweave.errors import MeshweaveError, RankError, StoppedError
from meshweave.signals import UNKNOWN, StopRequest, held_back, let_through, listening

Result = TypeVar("Result")

_SAY_SECONDS = 1.0
"""For how long a rank that waited in vain for another stays, so that the others can say the same."""

_POLL_SECONDS = 0.1

_MOST_STACKS, _FRAMES = 4, 6
"""Of ranks that hang: how many show where they are, and so many frames of each."""

_FAULT_LINES = 40
"""Of the stacks that a process leaves which dies by a fault of its own."""


def run_local_ranks(
    size: int,
    body: Callable[[int, StopRequest], Result],
    folder: Path,
    method: Literal["fork", "spawn"],
    grace_seconds: float,
) -> Result:
    """Calls `body` with every rank in a process of its own, and returns what rank 0's call returned.

    The first signal that asks this process to stop (`signals.STOPPING`) is passed on to all ranks, as SIGTERM; a second SIGINT
    ends them at once. A rank that ends in any other way than by returning, or by raising `StoppedError`, ends the others.

    Args:
        folder: for what ranks leave; this call's own. Removed where this process is killed.
        method: spawned processes want a `body` that can be pickled.
        grace_seconds: how long ranks that were asked to stop have before they are killed: for the end of a step, and to save.

    Raises:
        StoppedError: this process or a rank was asked to stop.
        MeshweaveError: what `body` raised on some rank.
        RankError: a rank hung, or its process was ended: rank, signal, step, and its stacks where it died by a fault.
        RuntimeError: anything else that `body` raised, with its traceback.
    """
    stop = StopRequest(RawValue(ctypes.c_int64, UNKNOWN))
    with listening(stop), _started(size, body, folder, method, stop) as ranks:
        failed = _first_failure(ranks, stop, grace_seconds)
        if failed is not None and (folder / f"error-{failed}").exists():
            _have_silent_ranks_say_where(ranks, folder)
    if failed is not None:
        raise _failure(folder, failed, [process.exitcode or 0 for process in ranks], stop)
    if (folder / "error-0").exists():
        agreed: StoppedError = _said(folder / "error-0")
        raise agreed if stop.signal is None else stop.stopped(stop.signal)
    if not (folder / "result").exists():
        raise RankError(_ended(0, 0, stop, folder / "faults-0"))
    result: Result = _said(folder / "result")
    return result


@contextmanager
def _started(
    size: int, body: Callable[[int, StopRequest], Any], folder: Path, method: Literal["fork", "spawn"], stop: StopRequest
) -> Iterator[Sequence[BaseProcess]]:
    """The ranks' processes: none of them is there before it, or after it."""
    make: Callable[..., BaseProcess] = ForkProcess
    if method == "spawn":
        make = SpawnProcess
        # The first process that is spawned would start it, and let signals through thereby.
        resource_tracker.ensure_running()
    ranks: list[BaseProcess] = []
    guard = None
    try:
        # A rank listens before it gets a signal, and this process gets none before it knows all ranks.
        with held_back(), _no_garbage():
            for rank in range(size):
                ranks.append(make(target=_rank_main, args=(rank, body, folder, stop.steps, os.getpid())))
                ranks[rank].start()
            guard = _Guard([process.pid or 0 for process in ranks], folder, stop)
        yield ranks
    finally:
        with held_back():
            begun = [process for process in ranks if process.pid is not None]
            for process in begun:
                process.kill()
            for process in begun:
                process.join()
            if guard is not None:
                guard.dismiss()


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


class _Guard:
    """A process that ends the ranks where the launcher cannot any more, and says so. State: the pipe that shows it whether the
    launcher is there: the kernel closes it with the launcher, and no rank has it."""

    def __init__(self, ranks: Sequence[int], folder: Path, stop: StopRequest) -> None:
        reader, self._writer = os.pipe()
        launcher = os.getpid()
        self._process = os.fork()
        if self._process:
            os.close(reader)
            return
        try:
            os.close(self._writer)
            ends = [_end_of(rank) for rank in ranks]
            # It is held back from signals, as it was forked so: what is sent to the whole group is the launcher's to act on.
            if not os.read(reader, 1):
                for end in ends:
                    with suppress(ProcessLookupError):
                        end()
                with suppress(OSError):
                    line = f"error: the launcher (process {launcher}) is gone; its ranks were ended{stop.progress}\n"
                    os.write(2, line.encode())
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os._exit(0)

    def dismiss(self) -> None:
        with suppress(BrokenPipeError):
            os.write(self._writer, b".")
        os.close(self._writer)
        os.waitpid(self._process, 0)


def _end_of(rank: int) -> Callable[[], None]:
    """What ends a process later on: by a handle, where the system has them, since its number can be another's by then."""
    with suppress(AttributeError, OSError):
        handle = os.pidfd_open(rank)
        return lambda: signal.pidfd_send_signal(handle, signal.SIGKILL)
    return lambda: os.kill(rank, signal.SIGKILL)


def _first_failure(ranks: Sequence[BaseProcess], stop: StopRequest, grace_seconds: float) -> int | None:
    """Waits until a rank has failed, and returns it, or until all have ended."""
    left = {process.sentinel: rank for rank, process in enumerate(ranks)}
    deadline = None
    while left:
        if stop.signal is not None:
            if deadline is None:
                deadline = time.monotonic() + grace_seconds
                # One signal for all: a terminal sends SIGINT to every process by itself, and two of them mean another thing.
                for process in ranks:
                    process.terminate()
            elif time.monotonic() > deadline:
                end = stop.stopped(stop.signal)
                raise StoppedError(f"{end}; its ranks did not end within {grace_seconds:g} s and were killed", end.signal)
        ended = [left.pop(sentinel) for sentinel in wait(list(left), _POLL_SECONDS) if isinstance(sentinel, int)]
        for rank in ended:
            ranks[rank].join()
        # Who lost a rank fails, too: one that a signal has ended comes first.
        failed = sorted((ranks[rank].exitcode or 0, rank) for rank in ended if ranks[rank].exitcode)
        if failed:
            return failed[0][1]
    return None


def _have_silent_ranks_say_where(ranks: Sequence[BaseProcess], folder: Path) -> None:
    """A rank that hangs cannot speak; the handler of this signal writes down its stacks, whatever it does, and ends it."""
    silent = [
        process for rank, process in enumerate(ranks) if process.exitcode is None and not (folder / f"error-{rank}").exists()
    ]
    for process in silent:
        with suppress(ProcessLookupError):
            os.kill(process.pid or 0, signal.SIGABRT)
    deadline = time.monotonic() + _SAY_SECONDS
    for process in silent:
        process.join(max(0.0, deadline - time.monotonic()))


def _failure(folder: Path, failed: int, exit_codes: Sequence[int], stop: StopRequest) -> Exception:
    """What the first rank to fail said, and of an error between ranks what the others said."""
    if not (folder / f"error-{failed}").exists():
        return RankError(_ended(failed, exit_codes[failed], stop, folder / f"faults-{failed}"))
    files = sorted(folder.glob("error-*"), key=lambda file: file.stat().st_mtime_ns)
    errors = [_said(file) for file in files]
    if unexpected := [error for error in errors if isinstance(error, str)]:
        return RuntimeError(unexpected[0])
    first: MeshweaveError = errors[0]
    if not isinstance(first, RankError):
        return first
    silent = sorted(set(range(len(exit_codes))) - {int(file.name.partition("-")[2]) for file in files})
    lines = [str(first), *(f"  also {other}" for other in errors[1:])]
    if silent:
        lines.append(f"  no word from {'rank' if len(silent) == 1 else 'ranks'} {', '.join(map(str, silent))}")
    for rank in silent[:_MOST_STACKS]:
        if stack := _stack(folder / f"faults-{rank}"):
            lines += [f"  rank {rank} was in", *(f"    {line}" for line in stack)]
    return RankError("\n".join(lines))


def _stack(faults: Path) -> list[str]:
    """Of a process that was asked where it is: the innermost frames of its main thread, in its own order."""
    text = faults.read_text(errors="replace") if faults.exists() else ""
    threads = re.split(r"\n(?=(?:Current thread|Thread) )", text.partition("\nExtension modules:")[0])
    frames = [[line.strip() for line in thread.splitlines() if line.startswith("  File ")] for thread in threads]
    # The main thread is written last.
    return next((each[:_FRAMES] for each in reversed(frames) if each), [])


def _ended(rank: int, exit_code: int, stop: StopRequest, faults: Path) -> str:
    how = f"with exit code {exit_code}"
    if exit_code < 0:
        names = {number.value: number.name for number in Signals}
        how = f"by {names.get(-exit_code, f'signal {-exit_code}')}"
    hint = "; the kernel does that where memory runs out" if exit_code == -Signals.SIGKILL else ""
    found = faults.read_text(errors="replace") if faults.exists() else ""
    stacks = found.partition("\nExtension modules:")[0].splitlines()[:_FAULT_LINES]
    return "\n".join([f"rank {rank}: its process ended {how}{stop.progress}{hint}", *(f"  {line}" for line in stacks)])


def _rank_main(rank: int, body: Callable[[int, StopRequest], Any], folder: Path, steps: ctypes.c_int64, launcher: int) -> None:
    """The whole life of one rank's process."""
    # The kernel's part, whatever this process is doing then: it ends with the launcher's thread that started it, which waits
    # for it. Has no effect outside Linux.
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    if os.getppid() != launcher:
        os._exit(1)
    faults = (folder / f"faults-{rank}").open("w")
    faulthandler.enable(faults)
    # A fork does not copy OpenMP's threads: a child that asks for some hangs if the parent had started them.
    torch.set_num_threads(1)
    stop = StopRequest(steps)
    error: MeshweaveError | str
    try:
        with listening(stop), let_through():
            try:
                result = body(rank, stop)
            except StoppedError as agreed:
                # As all ranks do: that ends a run as well as a result does.
                _leave(folder / f"error-{rank}", agreed)
                return
        if rank == 0:
            _leave(folder / "result", result)
        return
    except MeshweaveError as caught:
        error = caught
    except BaseException:  # some libraries' errors are no `Exception`
        error = f"rank {rank} raised\n\n{traceback.format_exc()}"
    _leave(folder / f"error-{rank}", error)
    if isinstance(error, RankError):
        # One rank that hangs lets all others wait in vain, and this process' end would end them: they shall have their say.
        time.sleep(_SAY_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by the usual way out, which waits for threads that may wait for a lost rank.
    os._exit(1)


def _leave(file: Path, value: Any) -> None:
    """Whole or not at all: who leaves it may be killed."""
    part = file.with_name(f"part-{file.name}")
    part.write_bytes(pickle.dumps(value))
    part.rename(file)


def _said(file: Path) -> Any:
    return pickle.loads(file.read_bytes())
