"""Who sends which media tokens of a microbatch to whom? Lanes and placements become a transfer plan."""

from collections.abc import Mapping

from meshweave.batch import MicrobatchPlan
from meshweave.boundary.ownership import lane_ownership
from meshweave.boundary.transfer import TransferPlan, plan_transfer
from meshweave.config import LANGUAGE
from meshweave.layout import Placement


def plan_crossing(
    plan: MicrobatchPlan, encoder: str, placements: Mapping[str, Placement], node_size: int | None = None
) -> TransferPlan:
    """Transfer plan of one encoder's tokens: from the lanes that encode them to the first-stage lanes that embed them."""
    tokens = plan.item_tokens(encoder)
    source = lane_ownership(tokens, plan.encoder_lanes[encoder], placements[encoder].lanes(placements[encoder].layout.pp - 1))
    destination = lane_ownership(tokens, plan.language_items(encoder), placements[LANGUAGE].lanes())
    return plan_transfer(source, destination, node_size)
