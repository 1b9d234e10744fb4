"""What crosses between modules? Ownership of media tokens, the transfer plan between two, its exchange."""

from meshweave.boundary.exchange import Arrival, exchange, outgoing, transfer
from meshweave.boundary.ownership import (
    Ownership,
    Share,
    lane_ownership,
    slice_ownership,
    split_positions,
)
from meshweave.boundary.transfer import Message, Moves, RankPlan, RankStage, TransferPlan, plan_transfer

__all__ = [
    "Arrival",
    "Message",
    "Moves",
    "Ownership",
    "RankPlan",
    "RankStage",
    "Share",
    "TransferPlan",
    "exchange",
    "lane_ownership",
    "outgoing",
    "plan_transfer",
    "slice_ownership",
    "split_positions",
    "transfer",
]
