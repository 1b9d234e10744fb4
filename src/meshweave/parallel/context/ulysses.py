"""How do ranks trade rows for heads? All-to-all: some heads of all the group's rows for all heads of own rows, and back."""

import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd


def to_heads(x: Tensor, order: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's heads, in all rows of the group.

    Args:
        x: `[1, heads, rows, dim]`, own rows.
        order: `[ranks · rows]`, for each row of the result its number in the rows of the group's ranks, one after another.

    Returns `[1, heads / ranks, ranks · rows, dim]`.
    """
    ranks = dist.get_world_size(group)
    _, heads, rows, dim = x.shape
    swapped = _swap(x.reshape(ranks, heads // ranks, rows, dim), group)
    return swapped.transpose(0, 1).reshape(heads // ranks, ranks * rows, dim).index_select(1, order).unsqueeze(0)


def to_rows(x: Tensor, back: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All heads of own rows: the inverse of `to_heads`, whose `order` `back` inverts."""
    ranks = dist.get_world_size(group)
    _, heads, rows, dim = x.shape
    parted = x.squeeze(0).index_select(1, back).reshape(heads, ranks, rows // ranks, dim)
    return _swap(parted.transpose(0, 1), group).reshape(1, ranks * heads, rows // ranks, dim)


def _swap(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[ranks, …]`: entry i goes to rank i, and what rank i had for this one is put there."""
    ones = [1] * len(x)
    swapped: Tensor = all_to_all_single_autograd(x.contiguous(), ones, ones, group)
    return swapped
