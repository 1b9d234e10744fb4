"""What can go wrong, by the place a user has to look at to mend it."""

from signal import Signals
from typing import Literal


class MeshweaveError(Exception):
    """Base of every error that meshweave raises on purpose; its message names what, where, which value and how to fix it."""


class RankError(MeshweaveError):
    """An error of ours that one rank of a launched world met while the others may not have."""


class StoppedError(MeshweaveError):
    """No fault: somebody asked the run to stop, by a signal, and it did."""

    def __init__(self, message: str, signal: Signals = Signals.SIGTERM) -> None:
        super().__init__(message)
        self.signal = signal


class ConfigError(MeshweaveError):
    """The run file, an override, or the combination of run file and model is wrong."""


class LayoutError(MeshweaveError):
    """A layout, placement or ownership is inconsistent, or asks for something that is not built yet."""


FaultKind = Literal[
    "form",
    "unknown key",
    "missing file",
    "broken file",
    "unsupported medium",
    "special token",
    "chat template",
    "processor",
    "too long",
    "too many images",
    "no target",
    "unreadable",
]
"""Why a sample cannot be trained, for counts; the message has the details."""


class DataError(MeshweaveError):
    """A data file, a sample or a media item cannot be read."""

    def __init__(self, message: str, kind: FaultKind = "unreadable") -> None:
        super().__init__(message)
        self.kind: FaultKind = kind


class LeftOutError(DataError):
    """A sample that could be read, but that a limit of the run file leaves out, or that has nothing to learn from. It is named
    and counted, and never stops a run the way faults do (`data.on_error`, `data.max_skipped`)."""


class CheckpointError(MeshweaveError):
    """A model folder or checkpoint is missing something, or does not fit the model."""


class ScheduleError(MeshweaveError):
    """A schedule cannot run: it would deadlock, or an action is missing, doubled, or before what it needs."""


def cause(error: BaseException) -> str:
    """A library's error in one line, for a message of ours."""
    return " ".join(f"{type(error).__name__}: {error}".split())
