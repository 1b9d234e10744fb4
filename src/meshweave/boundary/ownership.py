"""Which rank holds which media tokens? `Ownership`: each token in one share, each share on its replica ranks.

The media tokens of one encoder and microbatch are numbered 0..total-1 in destination order. Everything here
works on half-open intervals of those numbers, never on tokens, and needs neither torch nor a process group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from meshweave.errors import LayoutError

Array: TypeAlias = npt.NDArray[np.int64]
Intervals: TypeAlias = Array | Sequence[tuple[int, int]]


@dataclass(frozen=True, init=False, eq=False)
class Share:
    """The tokens of a replica group: each of `ranks` holds the same rows, in the order of `intervals`."""

    ranks: tuple[int, ...]
    intervals: Array
    """[intervals, 2]: half-open (start, stop), in the order in which the rows of the local tensor lie."""

    def __init__(self, ranks: Sequence[int], intervals: Intervals = ()) -> None:
        object.__setattr__(self, "ranks", tuple(ranks))
        object.__setattr__(self, "intervals", np.asarray(intervals, dtype=np.int64).reshape(-1, 2))

    @property
    def tokens(self) -> int:
        """Rows of the local tensor on each rank of the share."""
        return int((self.intervals[:, 1] - self.intervals[:, 0]).sum())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Share) and self.ranks == other.ranks and np.array_equal(self.intervals, other.intervals)

    def __str__(self) -> str:
        return f"{','.join(f'r{rank}' for rank in self.ranks)}: {interval_text(self.intervals) or '-'}"


class Table(NamedTuple):
    """The intervals of all shares, sorted by token: columns of one length."""

    start: Array
    stop: Array
    share: Array
    row: Array
    """Row of `start` in the local tensor of the share's ranks."""


@dataclass(frozen=True)
class Ownership:
    """A partition of tokens 0..total-1 into shares; a rank is in at most one share.

    Adjacent intervals of a share are merged and empty ones dropped. Raises `LayoutError` if a token is in no
    share or in two, an interval is outside 0..total, a share has no ranks, or a rank is named twice.
    """

    total: int
    shares: tuple[Share, ...]
    table: Table = field(init=False, repr=False, compare=False)
    share_by_rank: Array = field(init=False, repr=False, compare=False)
    """[highest rank + 1]: the share that a rank is in, -1 for none."""

    def __post_init__(self) -> None:
        rows, share = _merged_rows(self.shares)
        length = rows[:, 1] - rows[:, 0]
        ends = np.cumsum(length)
        first = np.searchsorted(share, np.arange(len(self.shares) + 1))
        base = np.concatenate([[0], ends])[first[:-1]]
        order = np.argsort(rows[:, 0], kind="stable")
        table = Table(rows[order, 0], rows[order, 1], share[order], (ends - length - base[share])[order])
        normal = tuple(Share(given.ranks, rows[a:b]) for given, a, b in zip(self.shares, first, first[1:], strict=False))
        object.__setattr__(self, "shares", normal)
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "share_by_rank", _share_by_rank(normal))
        self._check_partition()

    def share_index(self, ranks: Array) -> Array:
        """The index of the share that each rank is in; -1 for a rank that takes no part."""
        known = ranks < len(self.share_by_rank)
        return np.append(self.share_by_rank, -1)[np.where(known, ranks, -1)]

    def share_of(self, rank: int) -> Share | None:
        """The share that `rank` is in; None if it takes no part."""
        index = int(self.share_index(np.array([rank]))[0])
        return self.shares[index] if index >= 0 else None

    def rows(self, rank: int) -> int:
        """Rows of `rank`'s local tensor: the tokens of its share, 0 if it takes no part."""
        share = self.share_of(rank)
        return share.tokens if share else 0

    def row_of(self, tokens: Array) -> Array:
        """Row of each token in the local tensor of the ranks that hold it."""
        index = np.searchsorted(self.table.start, tokens, side="right") - 1
        return self.table.row[index] + tokens - self.table.start[index]

    def _check_partition(self) -> None:
        start, stop, share, _ = self.table
        edges = np.concatenate([[0], stop])
        wrong = np.flatnonzero(edges != np.concatenate([start, [self.total]]))
        if not len(wrong):
            return
        at = int(wrong[0])
        after = int(start[at]) if at < len(start) else self.total
        before = int(edges[at])
        if before < after:
            raise LayoutError(f"media tokens [{before},{after}) of {self.total} are in no share")
        if at == 0 or at == len(start):
            outside = after if at == 0 else before - 1
            raise LayoutError(f"a share holds media token {outside}, but there are only {self.total}")
        one, two = (self.shares[index] for index in share[at - 1 : at + 1])
        twice = f"[{after},{min(before, int(stop[at]))})"
        raise LayoutError(f"media tokens {twice} are held twice, by ({one}) and ({two}): cut one of them")

    def __str__(self) -> str:
        return " | ".join(str(share) for share in self.shares)


def lane_ownership(item_tokens: Sequence[int], lanes: Sequence[Sequence[int]], lane_ranks: Sequence[Sequence[int]]) -> Ownership:
    """Ownership of whole media items by lanes, each lane replicated on all its ranks.

    Args:
        item_tokens: tokens of each media item, in item number (destination) order; may be 0.
        lanes: per lane, the numbers of its items in the order of the lane's rows; may be empty.
        lane_ranks: per lane, its ranks (for a module split by tp: one lane's tp group).

    Serves both sides of a boundary. Raises `LayoutError` as `Ownership` does, and for an unknown item number.
    """
    if len(lanes) != len(lane_ranks):
        raise LayoutError(f"{len(lanes)} lanes of media items, but ranks for {len(lane_ranks)} lanes")
    tokens = np.asarray(item_tokens, dtype=np.int64).reshape(-1)
    items = np.fromiter(chain.from_iterable(lanes), dtype=np.int64)
    unknown = items[(items < 0) | (items >= len(tokens))]
    if len(unknown):
        raise LayoutError(f"a lane names media item {unknown[0]}, but there are {len(tokens)} items")
    stop = np.cumsum(tokens)
    intervals = np.stack([stop[items] - tokens[items], stop[items]], axis=1)
    ends = np.cumsum([len(lane) for lane in lanes], dtype=np.int64).tolist()
    shares = [Share(ranks, intervals[a:b]) for ranks, a, b in zip(lane_ranks, [0, *ends[:-1]], ends, strict=False)]
    return Ownership(int(tokens.sum()), tuple(shares))


def slice_ownership(lane_runs: Sequence[Sequence[tuple[int, int]]], lane_slices: Sequence[Sequence[Share]]) -> Ownership:
    """Ownership where a lane's *sequence*, media tokens with it, is cut over ranks (cp, sequence parallel).

    Args:
        lane_runs: per lane, its runs of media tokens as (position in the lane's sequence, tokens), in
            destination order; tokens are numbered through all runs, lane after lane.
        lane_slices: per lane, who needs which part of the sequence: shares whose intervals are *positions* of
            the lane's sequence (see `split_positions`; for context parallelism `sequence.cut.cut_sequence`); rows follow the
            intervals' order.

    Raises `LayoutError` as `Ownership` does: a media token whose position no slice covers is in no share.
    """
    if len(lane_runs) != len(lane_slices):
        raise LayoutError(f"media tokens for {len(lane_runs)} lanes, but slices for {len(lane_slices)} lanes")
    shares: list[Share] = []
    total = 0
    for runs, slices in zip(lane_runs, lane_slices, strict=True):
        run = np.asarray(runs, dtype=np.int64).reshape(-1, 2)
        run = run[run[:, 1] > 0]
        token = total + np.cumsum(run[:, 1]) - run[:, 1]  # number of each run's first token
        by_position = np.argsort(run[:, 0], kind="stable")
        position = run[by_position, 0]
        for part in slices:
            filled = part.intervals[part.intervals[:, 0] < part.intervals[:, 1]]
            order = np.argsort(filled[:, 0], kind="stable")
            in_run, in_part, start, stop = overlap(position, position + run[by_position, 1], filled[order, 0], filled[order, 1])
            back = np.argsort(order[in_part], kind="stable")  # to the order in which the slice's rows lie
            shift = (token[by_position] - position)[in_run]
            shares.append(Share(part.ranks, np.stack([start + shift, stop + shift], axis=1)[back]))
        total += int(run[:, 1].sum())
    return Ownership(total, tuple(shares))


def split_positions(intervals: Intervals, parts: int) -> list[Array]:
    """Cut the concatenation of `intervals` into equal consecutive parts: [intervals, 2] for each part.

    `split_positions([(0, length)], cp)` is contiguous context parallelism; splitting a part again over tp is
    sequence parallelism inside it. Raises `LayoutError` if the length is not a multiple of `parts`.
    """
    rows = np.asarray(intervals, dtype=np.int64).reshape(-1, 2)
    ends = np.cumsum(rows[:, 1] - rows[:, 0])
    length = int(ends[-1]) if len(ends) else 0
    if length % parts:
        raise LayoutError(f"a sequence of {length} positions cannot be cut into {parts} equal parts: pad it")
    cut = np.arange(parts) * (length // parts)
    row, part, start, stop = overlap(ends - rows[:, 1] + rows[:, 0], ends, cut, cut + length // parts)
    shift = (rows[:, 1] - ends)[row]
    return [np.stack([start + shift, stop + shift], axis=1)[part == index] for index in range(parts)]


def overlap(a_start: Array, a_stop: Array, b_start: Array, b_stop: Array) -> tuple[Array, Array, Array, Array]:
    """Common parts of two ascending lists of disjoint intervals: (index in a, index in b, start, stop)."""
    if not len(a_start) or not len(b_start):
        none = np.zeros(0, dtype=np.int64)
        return none, none, none, none
    cuts = np.unique(np.concatenate([a_start, a_stop, b_start, b_stop]))
    low, high = cuts[:-1], cuts[1:]
    in_a = np.searchsorted(a_start, low, side="right") - 1
    in_b = np.searchsorted(b_start, low, side="right") - 1
    # index -1 (before the first interval) wraps to the last, which the first two conditions throw out again
    common = (in_a >= 0) & (in_b >= 0) & (low < a_stop[in_a]) & (low < b_stop[in_b])
    return in_a[common], in_b[common], low[common], high[common]


def interval_text(intervals: Array) -> str:
    """`[0,16) [32,48)`"""
    return " ".join(f"[{start},{stop})" for start, stop in intervals.tolist())


def _merged_rows(shares: Sequence[Share]) -> tuple[Array, Array]:
    """All intervals in row order [intervals, 2], empty ones dropped, neighbours merged; the share of each."""
    rows = np.concatenate([np.zeros((0, 2), dtype=np.int64), *(share.intervals for share in shares)])
    share = np.repeat(np.arange(len(shares)), [len(given.intervals) for given in shares])
    backward = np.flatnonzero(rows[:, 0] > rows[:, 1])
    if len(backward):
        holder = shares[share[backward[0]]]
        raise LayoutError(f"interval {rows[backward[0]].tolist()} of ({holder}) stops before it starts")
    filled = rows[:, 0] < rows[:, 1]
    rows, share = rows[filled], share[filled]
    opens = np.ones(len(rows), dtype=np.bool_)
    opens[1:] = (rows[1:, 0] != rows[:-1, 1]) | (share[1:] != share[:-1])
    closes = np.append(opens[1:], True)[: len(rows)]
    return np.stack([rows[opens, 0], rows[closes, 1]], axis=1), share[opens]


def _share_by_rank(shares: Sequence[Share]) -> Array:
    ranks = np.fromiter(chain.from_iterable(share.ranks for share in shares), dtype=np.int64)
    if len(ranks) and ranks.min() < 0:
        raise LayoutError(f"rank {ranks.min()} of an ownership is negative")
    for share in shares:
        if not share.ranks:
            raise LayoutError(f"a share with {share.tokens} media tokens has no ranks")
    values, counts = np.unique(ranks, return_counts=True)
    if (counts > 1).any():
        twice = int(values[counts > 1][0])
        holders = " and ".join(f"({share})" for share in shares if twice in share.ranks)
        raise LayoutError(f"rank {twice} is named twice, in {holders}: a rank is in at most one share")
    by_rank = np.full(int(ranks.max()) + 1 if len(ranks) else 0, -1, dtype=np.int64)
    by_rank[ranks] = np.repeat(np.arange(len(shares)), [len(share.ranks) for share in shares])
    return by_rank
