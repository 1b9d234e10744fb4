"""How does a test watch a launcher die? In a forked process of its own session, whose ranks, output and end it sees."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from signal import Signals

from torch.multiprocessing import _prctl_pr_set_pdeathsig

CRASHED = 99


class Launcher:
    """A process that calls `work`, as a command would. State: the process, until it has ended.

    Args:
        log: file for what it and its ranks print.
        ignored: signals that it finds ignored, as a shell script leaves SIGINT for `… &`.
    """

    def __init__(self, work: Callable[[], None], log: Path, ignored: Sequence[Signals] = ()) -> None:
        self.log = log
        self._status: int | None = None
        self._begun: list[int] = []
        self.pid = os.fork()
        if self.pid:
            return
        code = 0
        try:
            _prctl_pr_set_pdeathsig(signal.SIGKILL)  # a suite that is killed leaves nothing, either
            os.setsid()
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number in ignored:
                signal.signal(number, signal.SIG_IGN)
            work()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else CRASHED
        except BaseException:
            traceback.print_exc()
            code = CRASHED
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    @property
    def children(self) -> list[int]:
        """Its ranks' processes, by rank, and its guard's."""
        return sorted(pid for pid, (_, parent, _) in _processes().items() if parent == self.pid)

    @property
    def _left(self) -> list[int]:
        found = _processes()
        return [pid for pid in self._begun if found.get(pid, ("Z", 0, 0))[0] != "Z" and found[pid][2] == self.pid]

    @property
    def ended(self) -> bool:
        """Whether it has ended by now."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is not None

    def kill(self) -> None:
        """Ends what a failed test left. The group's number is its own only while some process is in it."""
        if not self.ended or self._left:
            os.killpg(self.pid, signal.SIGKILL)

    def until(self, holds: Callable[[], bool], seconds: float = 30.0) -> None:
        """Waits; fails where it ends before, or after that time. Its children are then those whose end `end` awaits."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert not self.ended, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        self._begun = self.children

    def end(self, seconds: float = 20.0) -> int:
        """Its exit code, negative if a signal ended it; fails where it, or a child that it had after `until`, is alive then."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.ended and not self._left:
                assert self._status is not None
                return os.waitstatus_to_exitcode(self._status)
            time.sleep(0.02)
        raise AssertionError(f"after {seconds:g} s: ended {self.ended}, its children {self._left}; {self.log.read_text()}")


def _processes() -> dict[int, tuple[str, int, int]]:
    """Process to its state, its parent and its group."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, group = file.read_text().rpartition(")")[2].split()[:3]
            found[int(file.parent.name)] = state, int(parent), int(group)
    return found
