"""How do a lane's samples lie in its batch, and which columns of it does each `cp` rank hold?"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from meshweave.batch.plan import SampleMeta
from meshweave.sequence.cut import cut_sequence, multiple_of
from meshweave.sequence.lane import Array, Document, LaneSequence, Mask


@dataclass(frozen=True)
class SequenceRule:
    """How a run lays out and cuts the sequences of its language-model lanes."""

    packed: bool = False
    """Samples lie one behind the other in one row, instead of one a row."""
    cp: int = 1
    """Ranks that each hold a part of a lane's columns."""
    tp: int = 1
    """Ranks that each hold a slice of such a part between blocks: `tp` with sequence parallelism, else 1."""
    masks: tuple[Mask, ...] = ()
    """What each layer lets a query see, where samples are packed."""
    two_way: str | None = None
    """The encoder whose media tokens see each other both ways in some layer, if there is one."""


UNCUT = SequenceRule()
"""A sample a row, and every rank of a lane holds all of it."""


@dataclass(frozen=True)
class LaneGrid:
    """Where the samples of one lane lie in a `[rows, length]` batch."""

    rows: int
    length: int
    places: tuple[tuple[int, int, int], ...]
    """(row, first column, last column + 1) of each sample, in order; the rest is padding."""
    parts: tuple[Array, ...]
    """`cp` rank to the columns that it holds, `[intervals, 2]`, ascending; as many for every rank."""
    slices: int = 1
    """Ranks that each embed, and hold between blocks, a slice of such a part."""
    sequence: LaneSequence | None = None
    """What attention has to know of packed samples."""

    @property
    def cut(self) -> bool:
        """Whether a rank holds less than all columns of its lane."""
        return len(self.parts) * self.slices > 1

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
    """The grid of one lane; padding alone where it has no samples."""
    if not rule.packed:
        length = max((sample.tokens for sample in samples), default=1)
        places = tuple((row, 0, sample.tokens) for row, sample in enumerate(samples))
        return LaneGrid(max(1, len(samples)), length, places, (np.array([[0, length]]),))
    ends = list(accumulate((sample.tokens for sample in samples), initial=0))
    multiple = multiple_of(rule.cp, rule.tp)
    length = -(-max(1, ends[-1]) // multiple) * multiple
    places = tuple((0, start, stop) for start, stop in pairwise(ends))
    documents = tuple(
        Document(start, stop, _spans(sample, start, rule.two_way))
        for sample, (_, start, stop) in zip(samples, places, strict=True)
    )
    sequence = LaneSequence(length, documents)
    return LaneGrid(1, length, places, cut_sequence(sequence, rule.cp, rule.masks), rule.tp, sequence)


def _spans(sample: SampleMeta, start: int, encoder: str | None) -> tuple[tuple[int, int], ...]:
    """Unbroken runs of an encoder's tokens, as positions of the lane; runs that touch are one."""
    spans: list[tuple[int, int]] = []
    for item in sample.media if encoder is not None else ():
        for position, tokens in item.runs if item.module == encoder else ():
            first = start + position
            if spans and spans[-1][1] == first:
                spans[-1] = (spans[-1][0], first + tokens)
            else:
                spans.append((first, first + tokens))
    return tuple(spans)
