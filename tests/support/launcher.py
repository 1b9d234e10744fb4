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

CRASHED = 99


class Launcher:
    """A process that calls `work`, as a command would. State: the process, until it has ended.

    Args:
        log: file for what it and its ranks print.
        ignored: signals that it finds ignored, as a shell script leaves SIGINT for `… &`.
    """

    def __init__(self, work: Callable[[], None], log: Path, ignored: Sequence[Signals] = ()) -> None:
        self.log = log
        self.pid = os.fork()
        if self.pid:
            return
        code = 0
        try:
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
        return sorted(pid for pid, (_, parent) in _processes().items() if parent == self.pid)

    def kill(self) -> None:
        """Ends what a failed test left."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def end(self, seconds: float = 20.0) -> int:
        """Its exit code, negative if a signal ended it; fails where it, or a child that it has now, is alive after that time."""
        children, deadline = self.children, time.monotonic() + seconds
        ended, status = 0, 0
        while time.monotonic() < deadline:
            if not ended:
                ended, status = os.waitpid(self.pid, os.WNOHANG)
            left = [pid for pid in children if _processes().get(pid, ("Z", 0))[0] != "Z"]
            if ended and not left:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        raise AssertionError(
            f"after {seconds:g} s: launcher {'ended' if ended else 'alive'}, orphans {left}; {self.log.read_text()}"
        )


def _processes() -> dict[int, tuple[str, int]]:
    """Process to its state and its parent."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = file.read_text().rpartition(")")[2].split()[:2]
            found[int(file.parent.name)] = state, int(parent)
    return found
