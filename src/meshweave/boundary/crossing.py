"""Who sends which media tokens of a microbatch to whom? Lanes, placements and the cut of sequences become a transfer plan."""

from collections.abc import Mapping, Sequence

from meshweave.batch.plan import MicrobatchPlan
from meshweave.boundary.ownership import Share, lane_ownership, slice_ownership, split_positions
from meshweave.boundary.transfer import TransferPlan, plan_transfer
from meshweave.config import LANGUAGE
from meshweave.errors import DataError
from meshweave.layout import Placement
from meshweave.sequence.grid import LaneGrid


def plan_crossing(
    plan: MicrobatchPlan,
    encoder: str,
    placements: Mapping[str, Placement],
    grids: Sequence[LaneGrid],
    node_size: int | None = None,
) -> TransferPlan:
    """Transfer plan of one encoder's tokens: from the lanes that encode them to the first-stage ranks that embed them.

    Where sequences are cut, a rank gets the tokens in its own slice alone.

    Args:
        grids: of every lane of the language model.
    """
    tokens = plan.item_tokens(encoder)
    source = lane_ownership(tokens, plan.encoder_lanes[encoder], placements[encoder].lanes(placements[encoder].layout.pp - 1))
    language = placements[LANGUAGE]
    if any(grid.cut for grid in grids):
        runs = [_runs(plan, lane, encoder, grid) for lane, grid in enumerate(grids)]
        destination = slice_ownership(runs, list(map(_slices, grids, language.lanes())))
    else:
        destination = lane_ownership(tokens, plan.language_items(encoder), language.lanes())
    return plan_transfer(source, destination, node_size)


def _slices(grid: LaneGrid, ranks: tuple[int, ...]) -> list[Share]:
    """Who holds which columns of a lane; its ranks are in layout order, `tp` innermost."""
    tp = len(ranks) // len(grid.parts)
    found = []
    for cp, columns in enumerate(grid.parts):
        its = ranks[cp * tp : (cp + 1) * tp]
        if grid.slices == 1:
            found.append(Share(its, columns))
        else:
            found += [Share((rank,), part) for rank, part in zip(its, split_positions(columns, grid.slices), strict=True)]
    return found


def _runs(plan: MicrobatchPlan, lane: int, encoder: str, grid: LaneGrid) -> list[tuple[int, int]]:
    """(column, tokens) of the runs of a lane's media tokens of one encoder, in the order of their numbers."""
    found = []
    for sample, (_, start, _) in zip(plan.lanes[lane], grid.places, strict=True):
        for slot, item in enumerate(sample.media):
            if item.module != encoder:
                continue
            if sum(tokens for _, tokens in item.runs) != item.tokens:
                raise DataError(
                    f"sample {sample.sample}, media item {slot}: its {item.tokens} tokens lie at {item.runs}, which do not add "
                    "up; the dataset's metadata must say where they are for a sequence that is cut"
                )
            found += [(start + position, tokens) for position, tokens in item.runs]
    return found
