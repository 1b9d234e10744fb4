"""Which positions of a lane's sequence does each context-parallel rank hold? Equal counts, and equal attention cost."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from meshweave.errors import LayoutError
from meshweave.sequence.lane import Array, LaneSequence, Mask, sight

EVEN = 1.02
"""Dearest rank over the mean at which no finer cut is tried."""

SMALLEST = 256
"""Positions of the smallest block that is worth a tile of its own; two blocks a rank are tried however small."""

BLOCKS = (1, 2, 4, 8, 16, 32)
"""Blocks a rank, coarsest first: fewer mean larger tiles and fewer keys on the wire."""


def multiple_of(cp: int, tp: int) -> int:
    """What the length of a lane's sequence must be padded to a multiple of."""
    return cp * tp


def cut_sequence(sequence: LaneSequence, cp: int, masks: Sequence[Mask]) -> tuple[Array, ...]:
    """The positions that each context-parallel rank holds: `[intervals, 2]`, ascending, equally many on every rank.

    The sequence is cut into blocks, few if that is even enough, and blocks are dealt out so that ranks see equally many keys,
    averaged over `masks` (one per layer). One causal document is dealt in a zig-zag: of 2·cp chunks, rank i gets i and 2·cp-1-i;
    many short documents are cut into cp contiguous parts.

    Raises `LayoutError` if the length is not a multiple of cp.
    """
    if sequence.length % cp:
        raise LayoutError(f"a sequence of {sequence.length} positions cannot be cut for cp={cp}: pad it to a multiple")
    if cp == 1:
        return (np.array([[0, sequence.length]], dtype=np.int64),)
    share = sequence.length // cp
    cost = _cost_before(sequence, masks)
    best: tuple[float, Array, Array] | None = None
    for blocks in BLOCKS:
        if blocks > max(share, 1) or (blocks > 2 and share // blocks < SMALLEST):
            break
        edges = _edges(share, cp, blocks)
        owner, dearest = _deal(edges, cost, cp)
        if best is None or dearest < best[0]:
            best = dearest, edges, owner
        if dearest <= EVEN:
            break
    assert best is not None
    _, edges, owner = best
    return tuple(_merged(edges, owner == rank) for rank in range(cp))


def _cost_before(sequence: LaneSequence, masks: Sequence[Mask]) -> npt.NDArray[np.float64]:
    """`[length + 1]`: keys seen by all queries before each position, averaged over the masks."""
    seen = np.zeros(sequence.length)
    for mask, layers in Counter(masks).items():
        view = sight(sequence, mask)
        seen += (view.stop - view.first) * (layers / len(masks))
    return np.concatenate([[0.0], np.cumsum(seen)])


def _edges(share: int, cp: int, blocks: int) -> Array:
    """`[cp · blocks + 1]`: edges of blocks of two lengths, the longer ones first; a multiple of cp of each."""
    length, longer = divmod(share, blocks)
    lengths = np.full(cp * blocks, length)
    lengths[: cp * longer] += 1
    return np.concatenate([[0], np.cumsum(lengths)])


def _deal(edges: Array, cost: npt.NDArray[np.float64], cp: int) -> tuple[Array, float]:
    """The rank of each block, and the cost of the dearest rank over the mean.

    Rounds of cp blocks of one length, one for each rank, keep the counts equal; in each, the dearest goes to the lightest.
    """
    costs = np.diff(cost[edges])
    lengths = np.diff(edges)
    rounds = []
    for length in np.unique(lengths):
        dearest_first = np.flatnonzero(lengths == length)[::-1]
        dearest_first = dearest_first[np.argsort(-costs[dearest_first], kind="stable")]
        rounds += list(dearest_first.reshape(-1, cp))
    owner = np.zeros(len(costs), dtype=np.int64)
    load = np.zeros(cp)
    for its in sorted(rounds, key=lambda its: -costs[its[0]]):
        ranks = np.argsort(load, kind="stable")
        owner[its] = ranks
        load[ranks] += costs[its]
    order = np.argsort(np.unique(owner, return_index=True)[1])  # ranks in the order of the first block that each got
    owner = np.argsort(order)[owner]
    total = float(load.sum())
    return owner, float(load.max()) * cp / total if total else 1.0


def _merged(edges: Array, mine: npt.NDArray[np.bool_]) -> Array:
    """The chosen blocks as intervals, neighbours merged and empty ones dropped."""
    mine = mine & (edges[:-1] < edges[1:])
    change = np.flatnonzero(np.diff(np.concatenate([[False], mine, [False]]).astype(np.int8)))
    return edges[change].reshape(-1, 2).astype(np.int64)
