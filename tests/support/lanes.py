"""Lane sequences for tests, drawn or made from lengths."""

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from meshweave.boundary import split_positions
from meshweave.sequence import Document, LaneSequence, Mask

MASKS = [Mask(), Mask(1), Mask(5), Mask(None, True), Mask(3, True), Mask(40, True)]


def packed(length: int, lengths: Sequence[int], span: int = 0, gap: int = 0) -> LaneSequence:
    """Documents of these lengths one after another, cut off at `length`; two-way spans of `span` tokens after `gap` others."""
    documents, at = [], 0
    for wanted in lengths:
        stop = min(at + wanted, length)
        starts = range(at + gap, stop - span, span + gap) if span else ()
        documents.append(Document(at, stop, tuple((start, start + span) for start in starts)))
        at = stop
    return LaneSequence(length, tuple(documents))


def zigzag_positions(length: int, parts: int) -> list[np.ndarray]:
    """One causal document over `parts` ranks: part i has chunks i and 2·parts-1-i of 2·parts chunks."""
    chunks = split_positions([(0, length)], 2 * parts)
    return [np.concatenate([chunks[index], chunks[-1 - index]]) for index in range(parts)]


@st.composite
def sequences(draw: st.DrawFn, multiple: int = 1) -> LaneSequence:
    """Ragged documents, also empty ones and of one token, with spans that may touch; padding, also none."""
    documents, at = [], 0
    for length in draw(st.lists(st.one_of(st.integers(0, 6), st.integers(0, 60)), max_size=6)):
        edges = sorted(draw(st.lists(st.integers(at, at + length), max_size=6)))
        documents.append(Document(at, at + length, tuple(zip(edges[::2], edges[1::2], strict=False))))
        at += length
    return LaneSequence(-(-(at + draw(st.integers(0, 5))) // multiple) * multiple, tuple(documents))
