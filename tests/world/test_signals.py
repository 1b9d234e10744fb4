"""A process that listens notes who asked it to stop first, and is ended by a second SIGINT alone."""

import os
import signal
import threading

import pytest

from meshweave.errors import StoppedError
from meshweave.signals import StopRequest, held_back, let_through, listening, progress_text


def test_the_first_signal_counts() -> None:
    request = StopRequest()
    with listening(request):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
    assert request.signal == signal.SIGTERM
    request.reached(12)
    error = request.stopped(request.signal, ", sent to rank 3,")
    assert (str(error), error.signal) == ("stopped by SIGTERM, sent to rank 3, after 12 steps", signal.SIGTERM)


def test_a_second_interrupt_ends_what_is_being_done() -> None:
    request = StopRequest()
    request.reached(3)
    with pytest.raises(StoppedError, match=r"^stopped by SIGINT, at once, after 3 steps$"), listening(request):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")


def test_signals_that_are_held_back_come_when_they_are_let_through() -> None:
    request = StopRequest()
    with listening(request), held_back():
        os.kill(os.getpid(), signal.SIGHUP)
        assert request.signal is None
        with let_through():
            assert request.signal == signal.SIGHUP


def test_a_thread_cannot_listen_and_changes_nothing() -> None:
    def listen() -> None:
        with listening(StopRequest()):
            seen.append(signal.getsignal(signal.SIGTERM))

    seen: list[object] = []
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize(
    ("steps", "text"), [(-1, ""), (0, " before its first step ended"), (1, " after 1 step"), (7, " after 7 steps")]
)
def test_progress_reads_as_a_sentence_ends(steps: int, text: str) -> None:
    assert progress_text(steps) == text
