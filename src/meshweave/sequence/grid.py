"""How do a lane's samples lie in its batch, and which columns of it does each `cp` rank hold?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from meshweave.batch import SampleMeta


@dataclass(frozen=True)
class SequenceRule:
    """How a run lays out and cuts the sequences of its language-model lanes."""

    packed: bool = False
    """Samples lie one behind the other in one row, instead of one a row."""
    cp: int = 1
    """Ranks that each hold a part of a lane's columns."""
    tp: int = 1
    """Ranks that each hold a slice of such a part between blocks: `tp` with sequence parallelism, else 1."""

    @property
    def cut(self) -> bool:
        """Whether a rank holds less than all columns of its lane."""
        return self.cp * self.tp > 1


UNCUT = SequenceRule()
"""A sample a row, and every rank of a lane holds all of it."""


@dataclass(frozen=True)
class LaneGrid:
    """Where the samples of one lane lie in a `[rows, length]` batch."""

    rows: int
    length: int
    places: tuple[tuple[int, int, int], ...]
    """(row, first column, last column + 1) of each sample, in order; the rest is padding."""
    parts: tuple[npt.NDArray[np.int64], ...]
    """`cp` rank to the columns that it holds, `[intervals, 2]`, ascending; as many for every rank, divisible by `tp`."""

    @property
    def part_length(self) -> int:
        """Columns that each `cp` rank holds."""
        return self.length // len(self.parts)

    def real(self) -> npt.NDArray[np.bool_]:
        """`[rows, length]`: where there is a token, and no padding."""
        found = np.zeros((self.rows, self.length), dtype=np.bool_)
        for row, start, stop in self.places:
            found[row, start:stop] = True
        return found


def lay_out(samples: Sequence[SampleMeta], rule: SequenceRule) -> LaneGrid:
    """The grid of one lane; one padding token where it has no samples."""
    multiple = 2 * rule.cp * rule.tp if rule.cp > 1 else rule.tp
    if not rule.packed:
        length = max((sample.tokens for sample in samples), default=1)
        places = tuple((row, 0, sample.tokens) for row, sample in enumerate(samples))
        return LaneGrid(max(1, len(samples)), length, places, _zigzag(length, 1))
    stops = [sample.tokens for sample in samples]
    for index in range(1, len(stops)):
        stops[index] += stops[index - 1]
    length = -(-max(1, *stops, 1) // multiple) * multiple
    places = tuple((0, stop - sample.tokens, stop) for sample, stop in zip(samples, stops, strict=True))
    return LaneGrid(1, length, places, _zigzag(length, rule.cp))


def _zigzag(length: int, cp: int) -> tuple[npt.NDArray[np.int64], ...]:
    if cp == 1:
        return (np.array([[0, length]]),)
    edges = np.arange(2 * cp + 1) * (length // (2 * cp))
    chunks = np.stack([edges[:-1], edges[1:]], axis=1)
    return tuple(chunks[[index, 2 * cp - 1 - index]] for index in range(cp))
