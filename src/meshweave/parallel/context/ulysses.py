"""How do ranks trade rows for heads? All-to-all: some heads of all the group's rows for all heads of own rows, and back."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd


def to_heads(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """This rank's heads, in the rows of all ranks of the group, one rank's after another's.

    Args:
        x: `[heads, own rows, dim]`.
        counts: rows of each rank.

    Returns `[heads / ranks, all rows, dim]`.
    """
    heads, rows, dim = x.shape
    each = heads // len(counts)
    sizes = [each * count * dim for count in counts]
    found = _swap(x, [each * rows * dim] * len(counts), sizes, group)
    return torch.cat([part.view(each, -1, dim) for part in found.split(sizes)], dim=1)


def to_rows(x: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """All heads of own rows: the inverse of `to_heads`."""
    each, _, dim = x.shape
    rows = counts[dist.get_rank(group)]
    joined = torch.cat([part.flatten() for part in x.split(list(counts), dim=1)])
    sizes = [each * count * dim for count in counts]
    return _swap(joined, sizes, [each * rows * dim] * len(counts), group).view(-1, rows, dim)


def _swap(x: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    swapped: Tensor = all_to_all_single_autograd(x.contiguous().flatten(), list(received), list(sent), group)
    return swapped
