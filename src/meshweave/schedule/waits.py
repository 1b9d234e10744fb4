"""For how long did a rank wait for others in a step? Clocked where it waits: on the device where messages wait there."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Waits:
    """State: waits so far; on a GPU as pairs of events in its stream, which a host's clock does not see.

    Args:
        on_stream: whether it is the device's stream that waits, and not this process.
    """

    def __init__(self, on_stream: bool = False) -> None:
        self._on_stream = on_stream
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def clocked(self) -> Iterator[None]:
        """What happens inside it is a wait."""
        if self._on_stream:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            yield
            pair[1].record()
            self._events.append(pair)
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def seconds(self) -> float:
        """All waits; on a GPU once it has done everything."""
        return self._seconds + sum(began.elapsed_time(ended) for began, ended in self._events) / 1000
