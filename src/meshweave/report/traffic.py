"""How much crosses a boundary in one step? Bytes over links and copied locally, beside the lower bound."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from meshweave.batch.plan import StepPlan
from meshweave.boundary.crossing import plan_crossing
from meshweave.boundary.ownership import Ownership, overlap
from meshweave.boundary.transfer import TransferPlan
from meshweave.config import LANGUAGE
from meshweave.layout import Placement
from meshweave.sequence.grid import UNCUT, SequenceRule, lay_out


@dataclass(frozen=True)
class Direction:
    """Media tokens that cross a boundary one way in one step, all microbatches together."""

    moved: int
    """Over links, once per receiver."""
    copied: int
    """Needed by a rank that holds them."""
    lower_bound: int
    """Needed by a rank that does not hold them: no plan can move fewer."""
    between_nodes: int
    """Part of `moved` that leaves a node; 0 without a node size."""
    sent: Mapping[int, int]
    """Rank to the tokens it sends, for ranks that send any."""
    received: Mapping[int, int]
    """Rank to the tokens it receives, for ranks that receive any."""


@dataclass(frozen=True)
class BoundaryTraffic:
    """What crosses the boundary from one encoder to the language model in one step."""

    encoder: str
    samples: int
    items: int
    tokens: int
    """Media tokens of the step."""
    token_bytes: int
    """Bytes of one media token: all its tensors together, in the dtype in which they travel."""
    forward: Direction
    backward: Direction


def boundary_traffic(
    plan: StepPlan,
    placements: Mapping[str, Placement],
    token_bytes: Mapping[str, int],
    rule: SequenceRule = UNCUT,
    node_size: int | None = None,
) -> tuple[BoundaryTraffic, ...]:
    """Traffic of one step over every boundary: the bytes that a run of this plan moves.

    Args:
        placements: module to where it runs; the lanes are those that `plan` was made for.
        token_bytes: encoder to the bytes of one of its media tokens, all its tensors together.
        rule: how sequences are cut.
    """
    encoders = [name for name in placements if name != LANGUAGE]
    return tuple(_traffic(encoder, plan, placements, token_bytes[encoder], rule, node_size) for encoder in encoders)


def lower_bound(source: Ownership, destination: Ownership) -> int:
    """Tokens that ranks of `destination` need and do not hold in `source`, counted once per rank."""
    needed = sum(share.tokens * len(share.ranks) for share in destination.shares)
    a, b = source.table, destination.table
    in_source, in_destination, start, stop = overlap(a.start, a.stop, b.start, b.stop)
    # Tokens that each pair of shares has in common, as one sorted table.
    pair = a.share[in_source] * len(destination.shares) + b.share[in_destination]
    pairs, where = np.unique(pair, return_inverse=True)
    common = np.zeros(len(pairs) + 1, dtype=np.int64)
    np.add.at(common, where, stop - start)
    ranks = np.arange(max(len(source.share_by_rank), len(destination.share_by_rank)))
    given, taken = source.share_index(ranks), destination.share_index(ranks)
    both = (given >= 0) & (taken >= 0)
    wanted = given[both] * len(destination.shares) + taken[both]
    at = np.searchsorted(pairs, wanted)
    found = np.append(pairs, -1)[at] == wanted
    return needed - int(common[at[found]].sum())


def _traffic(
    encoder: str,
    plan: StepPlan,
    placements: Mapping[str, Placement],
    token_bytes: int,
    rule: SequenceRule,
    node_size: int | None,
) -> BoundaryTraffic:
    plans = [
        plan_crossing(part, encoder, placements, [lay_out(lane, rule) for lane in part.lanes], node_size)
        for part in plan.microbatches
    ]
    return BoundaryTraffic(
        encoder,
        samples=sum(len(lane) for part in plan.microbatches for lane in part.lanes),
        items=sum(len(part.items[encoder]) for part in plan.microbatches),
        tokens=sum(sum(part.item_tokens(encoder)) for part in plan.microbatches),
        token_bytes=token_bytes,
        forward=_direction(plans),
        backward=_direction([transfer.transpose() for transfer in plans]),
    )


def _direction(plans: list[TransferPlan]) -> Direction:
    return Direction(
        moved=sum(plan.tokens_moved for plan in plans),
        copied=sum(plan.copies.tokens for plan in plans),
        lower_bound=sum(lower_bound(plan.source, plan.destination) for plan in plans),
        between_nodes=sum(plan.tokens_between_nodes for plan in plans),
        sent=_by_rank([plan.tokens_sent() for plan in plans]),
        received=_by_rank([plan.tokens_received() for plan in plans]),
    )


def _by_rank(counts: list[np.ndarray]) -> dict[int, int]:
    total = sum(counts, start=np.zeros(1, dtype=np.int64))
    return {rank: int(total[rank]) for rank in np.flatnonzero(total).tolist()}
