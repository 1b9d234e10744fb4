"""What does each participant of a ring compute? Tiles of queries by keys, and the keys it needs of each other participant.

A participant holds some positions of the sequence, ascending, as the rows of its tensors. Its queries are cut into blocks of
neighbouring positions. Since the keys that a query sees are one run whose ends ascend with the query, what a block sees of
another participant's rows is one run too: keys that all its queries see, between keys that some see.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from meshweave.sequence.lane import Array, Sight

BLOCK = 256
"""Rows up to which small pieces share one masked tile: fewer, larger kernels outweigh the products masked out."""


class Kind(Enum):
    """What the queries of a tile see of its keys."""

    FULL = "full"
    """Every query sees every key."""
    CAUSAL = "causal"
    """As many queries as keys; each sees the keys up to its own number."""
    PARTIAL = "partial"
    """As `Sight.seen` says for the tile's positions; a query may see none."""


class Tile(NamedTuple):
    """Half-open ranges of rows."""

    query: tuple[int, int]
    """Of the querying participant's tensor."""
    keys: tuple[int, int]
    """Of what it got from the other participant: the rows of `Visit.keys`, one after another."""
    kind: Kind


@dataclass(frozen=True)
class Visit:
    """What a participant does with the keys of one participant (maybe itself)."""

    keys: Array
    """[intervals, 2]: the rows of the owner's tensor that it needs, ascending; all of them where it is the owner itself."""
    tiles: tuple[Tile, ...]

    @property
    def rows(self) -> int:
        """Keys that it needs."""
        return int((self.keys[:, 1] - self.keys[:, 0]).sum())


@dataclass(frozen=True)
class Part:
    """One participant's part in a ring."""

    visits: tuple[Visit, ...]
    """By participant whose keys are visited."""
    lent: tuple[Array, ...]
    """By participant: [intervals, 2] own rows that it needs, as its visit here says; none for the participant itself."""


class _Blocks(NamedTuple):
    """Neighbouring positions of one participant. Columns `[blocks]`."""

    start: Array
    """First row."""
    stop: Array
    plain: npt.NDArray[np.bool_]
    """One document's, and each sees nothing after itself."""


def ring_part(sight: Sight, held: Sequence[Array], participant: int) -> Part:
    """What one participant of a ring computes, fetches and lends.

    Args:
        sight: what each position sees.
        held: per participant, the positions it holds: `[intervals, 2]`, ascending; together each position once at most.
    """
    positions = [rows_of(intervals) for intervals in held]
    mine = positions[participant]
    blocks = [_blocks(sight, its) for its in positions]
    visits = tuple(_visit(sight, blocks[participant], mine, its, other == participant) for other, its in enumerate(positions))
    nothing = np.zeros((0, 2), dtype=np.int64)
    lent = tuple(
        nothing if other == participant else _visit(sight, blocks[other], its, mine, False).keys
        for other, its in enumerate(positions)
    )
    return Part(visits, lent)


def rows_of(intervals: Array) -> Array:
    """The numbers in the intervals, one after another."""
    length = intervals[:, 1] - intervals[:, 0]
    return np.repeat(intervals[:, 1] - np.cumsum(length), length) + np.arange(length.sum())


def _blocks(sight: Sight, position: Array) -> _Blocks:
    """Cuts a participant's rows into blocks; padding is in none."""
    found: list[tuple[int, int, bool]] = []
    for row, stop in _pieces(sight, position):
        at, document, span = int(position[row]), int(sight.document[position[row]]), int(sight.span[position[row]])
        # A span that goes on elsewhere stays alone: its queries see keys there that no others of a block would.
        whole = span < 0 or span == at + stop - row
        if found and whole and found[-1][1] == row and stop - found[-1][0] <= BLOCK:
            head = int(position[found[-1][0]])
            # Whole documents only: of a document that starts before the block, the others would get all its keys, masked out.
            if head + row - found[-1][0] == at and sight.document[head] in (head, document):
                found[-1] = found[-1][0], stop, False
                continue
        found.append((row, stop, span < 0))
    columns = np.array(found, dtype=np.int64).reshape(-1, 3)
    return _Blocks(columns[:, 0], columns[:, 1], columns[:, 2].astype(np.bool_))


def _pieces(sight: Sight, position: Array) -> list[tuple[int, int]]:
    """Ranges of rows that are neighbours in one document, and inside one span or outside all; without padding."""
    if not len(position):
        return []
    document, span = sight.document[position], sight.span[position]
    change = (np.diff(position) != 1) | (np.diff(document) != 0) | (np.diff(span) != 0)
    edges = np.concatenate([[0], np.flatnonzero(change) + 1, [len(position)]])
    start, stop = edges[:-1], edges[1:]
    held = document[start] >= 0
    start, stop = start[held], stop[held]
    # Where a window moves on within a piece, shorter blocks have fewer keys that only some of their queries see.
    last = position[stop - 1]
    first = sight.first[last]
    longest = np.maximum(BLOCK, (last + 1 - first) // 4)
    parts = np.where(first > document[start], -(-(stop - start) // longest), 1)
    part = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    start, length, parts = (np.repeat(column, parts) for column in (start, stop - start, parts))
    return list(zip((start + length * part // parts).tolist(), (start + length * (part + 1) // parts).tolist(), strict=True))


def _visit(sight: Sight, blocks: _Blocks, queries: Array, keys: Array, itself: bool) -> Visit:
    """The tiles of a participant's blocks (positions `queries`) by another's rows (positions `keys`)."""
    head, tail = queries[blocks.start], queries[blocks.stop - 1]
    some, every = np.searchsorted(keys, sight.first[head]), np.searchsorted(keys, sight.first[tail])
    every_stop, some_stop = np.searchsorted(keys, sight.stop[head]), np.searchsorted(keys, sight.stop[tail])
    # A plain block sees its own rows in a triangle, if the window does not cut it off.
    diagonal = blocks.plain & (every <= blocks.start) if itself else np.zeros(len(head), dtype=np.bool_)
    every_stop = np.where(diagonal, blocks.start, every_stop)
    some_stop = np.where(diagonal, blocks.start, some_stop)
    # Nothing seen by all, or too little for a tile of its own: one masked tile.
    one = (every >= every_stop) | ((some_stop - some <= BLOCK) & ((some < every) | (every_stop < some_stop)))
    every, every_stop = np.where(one, some_stop, every), np.where(one, some_stop, every_stop)
    number = np.arange(len(head))
    ranges = np.concatenate(
        [
            np.stack([number, column, column_stop, np.full_like(number, kind)], axis=1)
            for kind, column, column_stop in (
                (0, every, every_stop),
                (1, blocks.start, np.where(diagonal, blocks.stop, blocks.start)),
                (2, some, every),
                (2, every_stop, some_stop),
            )
        ]
    )
    ranges = ranges[ranges[:, 1] < ranges[:, 2]]
    ranges = ranges[np.lexsort((ranges[:, 1], ranges[:, 0]))]
    needed = np.array([[0, len(keys)]]) if itself else _union(ranges[:, 1:3])
    shift = np.cumsum(needed[:, 1] - needed[:, 0]) - needed[:, 1]  # from a row to its place among those needed
    if len(ranges):
        ranges[:, 1:3] += shift[np.searchsorted(needed[:, 0], ranges[:, 1], side="right") - 1][:, None]
    tiles: list[Tile] = []
    kinds = (Kind.FULL, Kind.CAUSAL, Kind.PARTIAL)
    full: dict[tuple[int, int], int] = {}  # range of keys to its last full tile
    for block, start, stop, kind in ranges.tolist():
        query = int(blocks.start[block]), int(blocks.stop[block])
        before = full.get((start, stop), -1) if kind == 0 else -1
        if before >= 0 and tiles[before].query[1] == query[0]:
            tiles[before] = Tile((tiles[before].query[0], query[1]), (start, stop), Kind.FULL)
            continue
        if kind == 0:
            full[start, stop] = len(tiles)
        tiles.append(Tile(query, (start, stop), kinds[kind]))
    return Visit(needed, tuple(tiles))


def _union(ranges: Array) -> Array:
    """Ranges `[ranges, 2]` in any order as ascending intervals that neither overlap nor touch."""
    if not len(ranges):
        return np.zeros((0, 2), dtype=np.int64)
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    reach = np.maximum.accumulate(ranges[:, 1])
    opens = np.concatenate([[True], ranges[1:, 0] > reach[:-1]])
    closes = np.concatenate([opens[1:], [True]])
    return np.stack([ranges[opens, 0], reach[closes]], axis=1)
