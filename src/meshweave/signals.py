"""Was this process asked to stop, and how far is its run? Handlers only note it; loops ask, and launchers pass it on."""

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from signal import Signals
from types import FrameType

from meshweave.errors import StoppedError

STOPPING = (Signals.SIGINT, Signals.SIGTERM, Signals.SIGHUP, Signals.SIGUSR1)
"""What asks a run to stop at the next step's end: Ctrl-C, an administrator, a closed terminal, Slurm before a time limit."""

UNKNOWN = -1


class StopRequest:
    """State: the signal that first asked this process to stop, and the steps that its run has done.

    Args:
        steps: memory for the steps, where others shall see them: a launcher and its ranks share it.
    """

    def __init__(self, steps: ctypes.c_int64 | None = None) -> None:
        self.signal: Signals | None = None
        self.steps = ctypes.c_int64(UNKNOWN) if steps is None else steps

    def reached(self, steps: int) -> None:
        """Notes the steps that the run has done."""
        self.steps.value = steps

    @property
    def progress(self) -> str:
        """Where the run is, to end a sentence with; empty if it does not count steps."""
        return progress_text(self.steps.value)

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """A signal handler: the first request counts, but a second SIGINT raises KeyboardInterrupt wherever this process is."""
        if self.signal is None:
            self.signal = Signals(number)
        if number == Signals.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def stopped(self, by: Signals, how: str = "") -> StoppedError:
        """The run's end, for who asked."""
        return StoppedError(f"stopped by {by.name}{how}{self.progress}", by)


def progress_text(steps: int) -> str:
    """` after 12 steps`; empty if it is not known."""
    if steps == UNKNOWN:
        return ""
    return f" after {steps} {'step' if steps == 1 else 'steps'}" if steps else " before its first step ended"


@contextmanager
def listening(request: StopRequest) -> Iterator[None]:
    """Inside it the signals that ask to stop are noted in `request`, SIGINT also where a shell has it ignored (as for `… &` in a
    script): who sends it to a run means it. SIGHUP stays ignored where it is: that is what `nohup` is for. Only a main
    thread can listen; in any other nothing is changed.

    Raises:
        StoppedError: at a second SIGINT.
    """
    heard = () if threading.current_thread() is not threading.main_thread() else STOPPING
    before = {number: signal.getsignal(number) for number in heard}
    if before.get(Signals.SIGHUP) == signal.SIG_IGN:
        del before[Signals.SIGHUP]
    try:
        for number in before:
            signal.signal(number, request.note)
        yield
    except KeyboardInterrupt:
        raise request.stopped(Signals.SIGINT, ", at once,") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def held_back() -> Iterator[None]:
    """Inside it no signal that asks to stop gets through to this thread; what comes meanwhile comes afterwards. Processes
    that are started inside it begin that way."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def let_through() -> Iterator[None]:
    """Inside it those signals get through to a thread from which they are held back."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
