"""What crosses between modules? Ownership of media tokens, the transfer plan between two, its exchange."""

from meshweave.boundary.exchange import PendingTransfer, exchange, start_transfer, transfer
from meshweave.boundary.ownership import (
    Ownership,
    Share,
    lane_ownership,
    slice_ownership,
    split_positions,
    zigzag_positions,
)
from meshweave.boundary.transfer import Message, Moves, RankPlan, RankStage, TransferPlan, plan_transfer

__all__ = [
    "Message",
    "Moves",
    "Ownership",
    "PendingTransfer",
    "RankPlan",
    "RankStage",
    "Share",
    "TransferPlan",
    "exchange",
    "lane_ownership",
    "plan_transfer",
    "slice_ownership",
    "split_positions",
    "start_transfer",
    "transfer",
    "zigzag_positions",
]
