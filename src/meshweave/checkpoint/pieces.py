"""Which part of a whole tensor does this rank hold? Said in the words of torch.distributed.checkpoint (DCP)."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

Run = tuple[int, int, int]
"""Indices of one dim that follow one another: their start in the whole, their start in the part, their number."""


@dataclass(frozen=True, eq=False)
class Piece:
    """This rank's part of a whole tensor, as boxes of it, for DCP's planners: it has what they ask a tensor for.

    DCP itself describes a part of a DTensor as one box from its first element on, which the slices of fused matrices are not
    (torch 2.13, `_create_write_items_for_dtensor`).
    """

    shape: tuple[int, ...]
    """Of the whole."""
    runs: tuple[tuple[Run, ...], ...]
    """Dim by dim: which indices are here."""
    part: Tensor
    """What is here, on any device."""

    @classmethod
    def of(cls, value: Tensor) -> "Piece":
        """What this rank holds of `value`, in its own memory."""
        value = value.detach()
        return cls(tuple(value.shape), held_runs(value), value.to_local() if isinstance(value, DTensor) else value)

    def size(self) -> torch.Size:
        """Of the whole."""
        return torch.Size(self.shape)

    @cached_property
    def boxes(self) -> dict[tuple[int, ...], tuple[tuple[int, ...], tuple[int, ...]]]:
        """Offsets in the whole → offsets in the part, sizes."""
        return {
            tuple(run[0] for run in box): (tuple(run[1] for run in box), tuple(run[2] for run in box))
            for box in product(*self.runs)
            if all(run[2] for run in box)
        }

    def box(self, offsets: tuple[int, ...]) -> Tensor:
        """The view of the part that starts at `offsets` in the whole."""
        view = self.part
        for dim, (start, length) in enumerate(zip(*self.boxes[offsets], strict=True)):
            view = view.narrow(dim, start, length)
        return view

    def __create_write_items__(self, key: str, value: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(key, torch.Size(offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
                    properties=TensorProperties(dtype=self.part.dtype),
                    size=self.size(),
                ),
            )
            for offsets, (_, sizes) in self.boxes.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, (_, sizes) in self.boxes.items()]


def held_runs(value: Tensor) -> tuple[tuple[Run, ...], ...]:
    """Dim by dim, which indices of the whole `value` this rank holds, in the order in which they lie here."""
    cuts: dict[int, Tensor] = {}
    if isinstance(value, DTensor):
        for axis, placement in enumerate(value.placements):
            assert not placement.is_partial(), "a part of a sum is no part of the tensor"
            if isinstance(placement, Shard | _StridedShard):
                # The same cut of an index as the one that made the part.
                along: Shard | _StridedShard = Shard(0)
                if isinstance(placement, _StridedShard):
                    along = _StridedShard(0, split_factor=placement.split_factor)
                index = cuts.get(placement.dim, torch.arange(value.shape[placement.dim]))
                parts, _ = along._split_tensor(index, value.device_mesh.size(axis), with_padding=False, contiguous=True)
                cuts[placement.dim] = parts[value.device_mesh.get_local_rank(axis)]
    return tuple(runs_of(cuts[dim]) if dim in cuts else ((0, 0, size),) for dim, size in enumerate(value.shape))


def runs_of(index: Tensor) -> tuple[Run, ...]:
    """Indices, in any order, as runs of those that follow one another; a save asks for every dim of every tensor."""
    if not len(index):
        return ()
    starts = [0, *((index.diff() != 1).nonzero().flatten() + 1).tolist()]
    return tuple((int(index[start]), start, stop - start) for start, stop in pairwise([*starts, len(index)]))
