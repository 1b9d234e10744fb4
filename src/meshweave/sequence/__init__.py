"""How do a lane's samples lie in its sequence, who holds which part of it, and what does each query see?"""

from meshweave.sequence.cut import cut_sequence, multiple_of
from meshweave.sequence.lane import Document, LaneSequence, Mask, Sight, sight
from meshweave.sequence.tiles import Kind, Part, Tile, Visit, ring_part

__all__ = [
    "Document",
    "Kind",
    "LaneSequence",
    "Mask",
    "Part",
    "Sight",
    "Tile",
    "Visit",
    "cut_sequence",
    "multiple_of",
    "ring_part",
    "sight",
]
