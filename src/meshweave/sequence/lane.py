"""What does each query of a lane's sequence see? Documents, the kinds of attention mask, and the keys in sight."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from meshweave.errors import LayoutError

Array: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Document:
    """One sample in a lane's sequence: positions [start, stop)."""

    start: int
    stop: int
    two_way: tuple[tuple[int, int], ...] = ()
    """(start, stop) positions in the lane's sequence, ascending, of media tokens that see each other in both directions, if the
    mask says so. Media items that touch are one span: what transformers' Gemma models count is unbroken runs of media tokens."""


@dataclass(frozen=True)
class LaneSequence:
    """The row of one lane in one microbatch: positions [0, length), samples one after another, padding where none is.

    Padding sees nothing, and nothing sees it: its attention is zero.

    Raises `LayoutError` if documents overlap, do not ascend or leave the row, or a two-way span does so in its document.
    """

    length: int
    documents: tuple[Document, ...]

    def __post_init__(self) -> None:
        _check_ascending([(each.start, each.stop) for each in self.documents], 0, self.length, "a document")
        for each in self.documents:
            if each.two_way:
                _check_ascending(each.two_way, each.start, each.stop, "a two-way span")

    def __str__(self) -> str:
        return f"{self.length}: " + " ".join(f"[{each.start},{each.stop})" for each in self.documents)


@dataclass(frozen=True)
class Mask:
    """What a kind of attention layer lets a query at q see of its document.

    Key k is seen iff (k <= q, or both are in one two-way span and `two_way`) and (no window, or q - k < window). So the window
    bounds the view backwards, also inside a span, and never forwards. That is the rule of transformers 5.23's Gemma 3 and 4
    (`create_masks_for_vision_model`: AND(sliding window, OR(causal, blockwise))); Gemma 3 is two-way in every layer, Gemma 4 in
    layers with a window only.
    """

    window: int | None = None
    two_way: bool = False

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise LayoutError(f"a sliding window of {self.window} keys: it is at least 1, the query's own")


class Sight(NamedTuple):
    """What each position sees: always one run of keys, whose ends both ascend with the position. Columns `[length]`.

    (A span's positions see up to its end, all others up to themselves; none sees past its document.)
    """

    first: Array
    """First key seen."""
    stop: Array
    """One past the last key seen; equal to `first` for padding."""
    document: Array
    """Where the position's document starts; -1 for padding."""
    span: Array
    """Where the two-way span that the position is in stops; -1 outside."""

    def seen(self, queries: Array, keys: Array) -> npt.NDArray[np.bool_]:
        """Which of the keys each query sees, by position: `[queries, keys]`."""
        return (self.first[queries][:, None] <= keys) & (keys < self.stop[queries][:, None])


def sight(sequence: LaneSequence, mask: Mask) -> Sight:
    """What each position of the sequence sees under a mask."""
    position = np.arange(sequence.length)
    document = _painted([(each.start, each.stop, each.start) for each in sequence.documents], sequence.length)
    spans = [(start, stop, stop) for each in sequence.documents for start, stop in each.two_way] if mask.two_way else []
    span = _painted(spans, sequence.length)
    held = document >= 0
    first = np.where(held, document, position)
    if mask.window is not None:
        first = np.maximum(first, position - (mask.window - 1))
    return Sight(first, np.maximum(position + held, span), document, span)


def _painted(runs: Sequence[tuple[int, int, int]], length: int) -> Array:
    """`[length]`: the third number of (start, stop, number) at the positions of each run, -1 elsewhere; runs ascend."""
    values, counts, at = [], [], 0
    for start, stop, number in runs:
        values += [-1, number]
        counts += [start - at, stop - start]
        at = stop
    return np.repeat(np.array([*values, -1], dtype=np.int64), [*counts, length - at])


def _check_ascending(runs: Sequence[tuple[int, int]], low: int, high: int, what: str) -> None:
    at = low
    for start, stop in runs:
        if not at <= start <= stop <= high:
            raise LayoutError(f"{what} at [{start},{stop}) must lie in [{at},{high}): inside, after the one before")
        at = stop
