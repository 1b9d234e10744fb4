"""Who sends which media tokens to whom? `plan_transfer` intersects a source and a destination ownership.

A rank receives exactly the tokens it needs and does not hold, each once; what it needs and holds it copies.
Pure: numpy arrays of intervals for all ranks at once, `TransferPlan.for_rank` for what one of them has to do.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, starmap
from typing import Any, NamedTuple

import numpy as np

from meshweave.boundary.ownership import Array, Ownership, interval_text, overlap
from meshweave.errors import LayoutError


class Moves(NamedTuple):
    """Intervals of tokens that go from one rank to another: columns of one length, in no particular order."""

    sender: Array
    receiver: Array
    start: Array
    stop: Array

    @property
    def tokens(self) -> int:
        """Tokens moved, each counted once per receiver."""
        return int((self.stop - self.start).sum())

    def where(self, chosen: Any) -> "Moves":
        """The moves at the indices, or under the mask, `chosen`."""
        return Moves(*(column[chosen] for column in self))


@dataclass(frozen=True, eq=False)
class Message:
    """One packed message: the rows of the local tensor that go to `peer`, or come from it."""

    peer: int
    rows: Array
    """[intervals, 2] of local rows, in the order in which they are packed."""


@dataclass(frozen=True, eq=False)
class RankStage:
    """What one rank sends and receives at the same time: at most one message each way per peer."""

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


@dataclass(frozen=True, eq=False)
class RankPlan:
    """What one rank does, in rows of its own two tensors: copy locally, run the stages one after another.

    The first stage sends rows of the source tensor; later stages forward rows of the destination tensor.
    """

    rank: int
    rows_in: int
    rows_out: int
    copy_from: Array
    copy_to: Array
    """[intervals, 2] of source and destination rows; both list the same tokens in the same order."""
    stages: tuple[RankStage, ...]
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)
    """The executor's memo (index tensors per device); nothing here depends on it."""


@dataclass(frozen=True)
class TransferPlan:
    """Every move of one transfer, for all ranks. Plans are equal if they were planned from equal arguments.

    Invariants: a rank's copies and receives are exactly the tokens of its destination share, each once; what
    is sent in stage 2 (there is one only where two-level pays) was received in stage 1.
    """

    source: Ownership
    destination: Ownership
    node_size: int | None
    copies: Moves = field(repr=False, compare=False)
    """Tokens that a rank needs and holds: sender = receiver."""
    stages: tuple[Moves, ...] = field(repr=False, compare=False)

    @property
    def world(self) -> int:
        """One more than the highest rank that takes part."""
        return max(len(self.source.share_by_rank), len(self.destination.share_by_rank))

    @property
    def tokens_moved(self) -> int:
        """Tokens over all links, once per receiver; bytes = tokens · width · item size."""
        return sum(moves.tokens for moves in self.stages)

    @property
    def tokens_between_nodes(self) -> int:
        """Tokens over links between nodes, once per receiver; 0 without a node size."""
        size = self.node_size or max(self.world, 1)
        crossing = (moves.where(moves.sender // size != moves.receiver // size) for moves in self.stages)
        return sum(moves.tokens for moves in crossing)

    def tokens_sent(self) -> Array:
        """[world] tokens that each rank sends."""
        return self._per_rank("sender", self.stages)

    def tokens_received(self) -> Array:
        """[world] tokens that each rank receives: what it needs and does not hold."""
        return self._per_rank("receiver", self.stages)

    def tokens_copied(self) -> Array:
        """[world] tokens that each rank needs and holds."""
        return self._per_rank("receiver", (self.copies,))

    def _per_rank(self, end: str, tables: tuple[Moves, ...]) -> Array:
        counts = np.zeros(self.world, dtype=np.int64)
        for moves in tables:
            np.add.at(counts, getattr(moves, end), moves.stop - moves.start)
        return counts

    def transpose(self) -> "TransferPlan":
        """The gradients' plan: data flows from the destination's shares back to the source's.

        Each destination replica group sends its tokens' gradient once to every source replica outside it
        (those inside copy their own): the lower bound of `plan_transfer` holds here, too. **Contract**: all
        replicas of a destination share hold the same, full gradient, so that any of them may send it.
        """
        return self._transposed

    @cached_property
    def _transposed(self) -> "TransferPlan":
        return plan_transfer(self.destination, self.source, self.node_size)

    def for_rank(self, rank: int) -> RankPlan:
        """The part of `rank`; a rank in neither ownership gets an empty one."""
        if rank not in self._parts:
            self._parts[rank] = _rank_plan(self, rank)
        return self._parts[rank]

    @cached_property
    def _parts(self) -> dict[int, RankPlan]:
        return {}

    def describe(self, most: int = 40) -> str:
        """The plan as text, at most `most` lines of moves.

        `r0 = r0: [0,4)` is a local copy, `r0 -> r3: [4,9)` a message, `then r3 -> r4: [4,9)` one of stage 2.
        """
        tables = (self.copies, *self.stages)
        lines = (
            f"{then}r{sender} {'=' if sender == receiver else '->'} r{receiver}: " + interval_text(_intervals(part.start, part))
            for then, moves in zip(["", "", "then "], tables, strict=False)
            for sender, receiver, part in _pairs(moves)
        )
        more = sum(len(np.unique(moves.sender * self.world + moves.receiver)) for moves in tables) - most
        sums = f"{self.source.total} media tokens: {self.tokens_moved} sent, {self.copies.tokens} copied locally"
        return "\n".join([sums, *islice(lines, most), *([f"... and {more} more"] if more > 0 else [])])

    def __str__(self) -> str:
        return self.describe()


def plan_transfer(source: Ownership, destination: Ownership, node_size: int | None = None) -> TransferPlan:
    """Plan how every rank of `destination` gets its tokens from the ranks of `source`.

    A rank of both shares of a token copies it. Otherwise one source replica sends it: one of the receiver's
    node if there is any, and among those that qualify the load is cut evenly (to one token per share).

    With `node_size` (rank r is on node r // node_size), a token whose source share has no rank on a node
    crosses to that node once, whatever the number of replicas there: stage 1 gives each of them an equal part,
    stage 2 exchanges the parts inside the node. What each rank receives in total stays the same.

    Raises `LayoutError` if the two number different totals, or the node size is not positive.
    """
    if source.total != destination.total:
        raise LayoutError(
            f"the source holds {source.total} media tokens, the destination needs {destination.total}: "
            "both sides must number the same tokens"
        )
    if node_size is not None and node_size < 1:
        raise LayoutError(f"node size {node_size} is not positive")
    have, need = _Cells.of(source, node_size), _Cells.of(destination, node_size)
    held, needed, start, stop = overlap(source.table.start, source.table.stop, destination.table.start, destination.table.stop)
    giver, taker = source.table.share[held], destination.table.share[needed]

    # One row per segment and node that needs it. `home`: the giver's replicas on that node, -1 for none.
    segment, nth = _repeat(need.share_cells[taker])
    cell = need.share_first_cell[taker][segment] + nth
    giver, start, stop = giver[segment], start[segment], stop[segment]
    home = have.find(giver, need.node[cell])

    # Near, the giver is on the node: every replica there copies its own tokens or receives all of them.
    near = np.flatnonzero(home >= 0)
    index, nth = _repeat(need.count[cell[near]])
    near = near[index]
    near_receiver = need.rank[need.first[cell[near]] + nth]
    holds = source.share_index(near_receiver) == giver[near]
    holder, copied = near_receiver[holds], near[holds]
    copies = Moves(holder, holder, start[copied], stop[copied])
    near, near_receiver = near[~holds], near_receiver[~holds]

    # Far: each replica there receives one part of what the node lacks.
    far = np.flatnonzero(home < 0)
    far = far[np.argsort(cell[far], kind="stable")]
    index, nth, low, high = _deal(stop[far] - start[far], cell[far], need.count)
    far = far[index]
    far_cell, far_start, far_stop = cell[far], start[far] + low, start[far] + high
    far_receiver = need.rank[need.first[far_cell] + nth]

    # Senders. Links inside and between nodes are balanced apart: near tokens are dealt to the giver's replicas
    # on the node, far ones to all of them; sorted by receiver, so that few messages are cut in two.
    pool = np.concatenate([home[near], len(have.node) + giver[far]])
    pool_first = np.concatenate([have.first, have.share_first])
    pool_count = np.concatenate([have.count, have.share_count])
    receiver = np.concatenate([near_receiver, far_receiver])
    start, stop = np.concatenate([start[near], far_start]), np.concatenate([stop[near], far_stop])
    order = np.argsort(pool * (need.rank.max(initial=0) + 1) + receiver, kind="stable")
    pool, receiver, start, stop = pool[order], receiver[order], start[order], stop[order]
    index, part, low, high = _deal(stop - start, pool, pool_count)
    sender = have.rank[pool_first[pool[index]] + part]
    stages = [Moves(sender, receiver[index], start[index] + low, start[index] + high)]

    # Stage 2: each far part goes on to every other replica on the node.
    index, other = _repeat(need.count[far_cell] - 1)
    if len(index):
        member = need.rank[need.first[far_cell[index]] + other + (other >= nth[index])]
        stages.append(Moves(far_receiver[index], member, far_start[index], far_stop[index]))
    return TransferPlan(source, destination, node_size, copies, tuple(stages))


@dataclass(frozen=True, eq=False)
class _Cells:
    """The ranks of an ownership by cell (a share's ranks on one node), cells sorted by share, then node."""

    rank: Array
    first: Array  # of each cell: its ranks are rank[first : first + count]
    count: Array
    node: Array
    share: Array
    share_first_cell: Array  # of each share: where its cells begin, how many they are
    share_cells: Array
    share_first: Array  # of each share: where its ranks begin, how many they are
    share_count: Array

    @classmethod
    def of(cls, ownership: Ownership, node_size: int | None) -> "_Cells":
        by_rank = ownership.share_by_rank
        rank = np.flatnonzero(by_rank >= 0)
        node = rank // node_size if node_size else np.zeros_like(rank)  # no node size: one node has them all
        order = np.lexsort((rank, node, by_rank[rank]))
        rank, node = rank[order], node[order]
        share = by_rank[rank]
        first = np.flatnonzero((np.diff(share, prepend=-1) != 0) | (np.diff(node, prepend=-1) != 0))
        shares = np.arange(len(ownership.shares))
        share_first, share_first_cell = np.searchsorted(share, shares), np.searchsorted(share[first], shares)
        return cls(
            rank,
            first,
            np.diff(first, append=len(rank)),
            node[first],
            share[first],
            share_first_cell,
            np.diff(share_first_cell, append=len(first)),
            share_first,
            np.diff(share_first, append=len(rank)),
        )

    def find(self, share: Array, node: Array) -> Array:
        """The cell of each (share, node), -1 where the share has no rank on the node."""
        nodes = int(max(self.node.max(initial=0), node.max(initial=0))) + 1
        keys, wanted = self.share * nodes + self.node, share * nodes + node
        at = np.searchsorted(keys, wanted)
        return np.where(np.append(keys, -1)[at] == wanted, at, -1)


def _repeat(counts: Array) -> tuple[Array, Array]:
    """Element i `counts[i]` times: (i, how many times before)."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - (np.cumsum(counts) - counts)[index]


def _deal(length: Array, group: Array, parts: Array) -> tuple[Array, Array, Array, Array]:
    """Lay each group's rows end to end and cut them into `parts[group]` equal parts (to one token).

    Rows are sorted by group, none is empty. Returns (row, part, start, stop), counted from the row's start.
    """
    total = length.sum()
    begins = np.cumsum(length) - length
    first = np.flatnonzero(np.diff(group, prepend=-1))
    base, count = begins[first], parts[group[first]]
    weight = np.diff(base, append=total)
    owner, part = _repeat(count)
    cuts = base[owner] + part * weight[owner] // count[owner]
    row = np.searchsorted(begins, cuts, side="right") - 1
    inner = np.flatnonzero((cuts > begins[row]) & (np.diff(cuts, prepend=-1) > 0))
    at, pieces = row[inner] + 1, np.arange(len(length))
    row, low = np.insert(pieces, at, row[inner]), np.insert(begins, at, cuts[inner])
    high = np.append(low, total)[1:]
    part = part[np.searchsorted(cuts, low, side="right") - 1]
    return row, part, low - begins[row], high - begins[row]


def _rank_plan(plan: TransferPlan, rank: int) -> RankPlan:
    source, destination = plan.source, plan.destination
    copies = plan.copies.where(plan.copies.receiver == rank)
    copies = copies.where(np.argsort(copies.start))
    ends = np.stack([source.row_of(copies.start), destination.row_of(copies.start)], axis=1)
    ends, length = _merge(ends, copies.stop - copies.start)
    stages = []
    for moves, holder in zip(plan.stages, [source, destination], strict=False):
        sent, received = moves.where(moves.sender == rank), moves.where(moves.receiver == rank)
        sends = ((peer, _intervals(holder.row_of(part.start), part)) for _, peer, part in _pairs(sent))
        receives = ((peer, _intervals(destination.row_of(part.start), part)) for peer, _, part in _pairs(received))
        stages.append(RankStage(tuple(starmap(Message, sends)), tuple(starmap(Message, receives))))
    return RankPlan(
        rank,
        source.rows(rank),
        destination.rows(rank),
        np.stack([ends[:, 0], ends[:, 0] + length], axis=1),
        np.stack([ends[:, 1], ends[:, 1] + length], axis=1),
        tuple(stages),
    )


def row_indices(intervals: Array) -> Array:
    """[rows] every row of `intervals` [intervals, 2], in order."""
    index, nth = _repeat(intervals[:, 1] - intervals[:, 0])
    rows: Array = intervals[index, 0] + nth
    return rows


def _pairs(moves: Moves) -> Iterator[tuple[int, int, Moves]]:
    """(sender, receiver, their moves in token order) for each pair that exchanges a message, pairs ascending.

    Token order is what both ends pack and unpack by, whatever the order of their rows.
    """
    moves = moves.where(np.lexsort((moves.start, moves.receiver, moves.sender)))
    opens = (np.diff(moves.sender, prepend=-1) != 0) | (np.diff(moves.receiver, prepend=-1) != 0)
    first = np.flatnonzero(opens).tolist()
    for a, b in zip(first, [*first[1:], len(opens)], strict=False):
        yield int(moves.sender[a]), int(moves.receiver[a]), moves.where(slice(a, b))


def _intervals(start: Array, moves: Moves) -> Array:
    """[intervals, 2]: one interval of each move's length from each `start`, neighbours merged."""
    merged, length = _merge(start[:, None], moves.stop - moves.start)
    return np.concatenate([merged, merged + length[:, None]], axis=1)


def _merge(starts: Array, length: Array) -> tuple[Array, Array]:
    """Join each stretch with the next where it continues in every column of `starts` [stretches, columns]."""
    opens = np.ones(len(length), dtype=np.bool_)
    opens[1:] = (starts[1:] != (starts + length[:, None])[:-1]).any(axis=1)
    first = np.flatnonzero(opens)
    ends = np.append(0, np.cumsum(length))
    return starts[first], np.diff(ends[np.append(first, len(length))])
