"""How do ranks share the patches of one encoder pass? Each works on a run of them; attention trades heads for rows (Ulysses).

For encoders that take the patches of all items as one sequence. What comes before the blocks is done by every rank, on all
patches; what comes out, media tokens, is gathered, so that every rank has all of them and gets the gradient of all of them.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import AttentionInterface

from meshweave.model.families.plan import PatchPlan, matches
from meshweave.parallel.context.ulysses import to_heads, to_rows

PATCH_IMPLEMENTATION = "meshweave_flash_patches"
"""Models that find `flash` in it give attention all patches at once, and where each sequence of them ends."""


@dataclass(frozen=True)
class Shares:
    """How the patches of a pass are shared out."""

    group: dist.ProcessGroup
    counts: tuple[int, ...]
    """Patches of each rank of the group, one run after another, padding included."""
    padding: int = 0
    """Patches at the end that are none: no model's blocks work on nothing, so every rank has some."""

    @property
    def own(self) -> slice:
        """Those of this rank."""
        rank = dist.get_rank(self.group)
        first = sum(self.counts[:rank])
        return slice(first, first + self.counts[rank])

    def part(self, patches: Tensor) -> Tensor:
        """Of `[patches, …]` of all items those of this rank."""
        if self.padding:
            patches = torch.cat([patches, patches[:1].expand(self.padding, *patches.shape[1:])])
        return patches[self.own]


def share_out(patches: int, unit: int, group: dist.ProcessGroup) -> Shares:
    """As even shares as can be, of whole units: patches that become one media token."""
    ranks = dist.get_world_size(group)
    units = max(ranks, patches // unit)
    each, more = divmod(units, ranks)
    return Shares(group, tuple(unit * (each + (rank < more)) for rank in range(ranks)), unit * units - patches)


def share_patches(tower: nn.Module, plan: PatchPlan, unit: int, group: dist.ProcessGroup) -> None:
    """Lets the ranks of `group` share the blocks' work on every pass of `tower`, a transformers model; changes it in place."""
    blocks = list(tower.get_submodule(plan.blocks).children())
    under_way: list[Shares] = []  # of the forward that is running

    def enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        angles = kwargs["position_embeddings"]
        hidden = args[0]
        if block is blocks[0]:
            under_way[:] = [share_out(len(hidden), unit, group)]
            hidden = under_way[0].part(hidden)
        shares = under_way[0]
        own = {"position_embeddings": tuple(shares.part(each) for each in angles), "shares": shares}
        return (hidden, *args[1:]), kwargs | own

    def leave(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        shares = under_way[0]
        gathered: Tensor = _Gather.apply(output, shares, unit)
        return gathered[: len(gathered) - shares.padding // unit]

    for block in blocks:
        block.register_forward_pre_hook(enter, with_kwargs=True)
    for pattern in plan.merged:
        for _, module in matches(tower, pattern):
            if isinstance(module, nn.Module):
                module.register_forward_hook(leave)


def patch_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor,
    shares: Shares,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of this rank's patches to all of their sequences, as transformers calls it.

    Args:
        query, key, value: `[1, heads, own patches, dim]`.
        cu_seq_lens_q: `[sequences + 1]` where each sequence of the pass (an image, a frame, a window) starts.

    Returns `[1, own patches, heads, dim]` and no weights.
    """
    lengths = [*cu_seq_lens_q.diff().tolist(), shares.padding]
    parts = [to_heads(x[0], shares.counts, shares.group).split(lengths, dim=1) for x in (query, key, value)]
    outputs = [
        functional.scaled_dot_product_attention(q[None], k[None], v[None], dropout_p=dropout, scale=scaling)[0]
        for q, k, v in zip(*parts, strict=True)
        if q.shape[1]
    ]
    return to_rows(torch.cat(outputs, dim=1), shares.counts, shares.group).transpose(0, 1)[None], None


AttentionInterface.register(PATCH_IMPLEMENTATION, patch_attention)


class _Gather(torch.autograd.Function):
    """`[own tokens, …]` of every rank, one after another; each rank then has the gradient of all of it, its own part too."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, shares: Shares, unit: int) -> Tensor:
        size, rank = len(shares.counts), dist.get_rank(shares.group)
        counts = [count // unit for count in shares.counts]
        gathered = own.new_empty(sum(counts), *own.shape[1:])
        every = own.repeat(size, *(1 for _ in own.shape[1:]))
        dist.all_to_all_single(gathered, every, counts, [counts[rank]] * size, group=shares.group)
        ctx.own = slice(shares.own.start // unit, shares.own.stop // unit)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.own], None, None
