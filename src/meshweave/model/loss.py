"""What is the loss of next tokens, and which are predicted right? Also where each rank has a part of the vocabulary."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from meshweave.data.dataset import IGNORE


@dataclass(frozen=True)
class Words:
    """A run of the vocabulary whose logits this rank has, where there are several runs."""

    group: dist.ProcessGroup
    """The ranks of all runs; each of them gets the whole loss."""
    first: int
    """Number of its first word."""


def next_tokens(labels: Tensor) -> Tensor:
    """[rows, length] the label of the token after each; -100 where nothing is predicted.

    Labels are shifted, not the logits, which would copy the largest tensor of the step; and before anything is cut, so that no
    slice needs its neighbour's.
    """
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORE)


def token_loss(logits: Tensor, targets: Tensor, part: Words | None = None) -> Tensor:
    """Summed cross-entropy, a scalar.

    Args:
        logits: `[rows, length, words]`.
        targets: `[rows, length]`, of `next_tokens`.
        part: which words these are, if not all.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    logits, targets = logits.flatten(0, 1), targets.flatten()
    if part is None:
        return functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    loss: Tensor = _SplitVocabulary.apply(logits, targets, part)
    return loss


def mistakes(logits: Tensor, targets: Tensor, part: Words | None = None) -> Tensor:
    """`[rows, length]` bool: where the target is not the most likely token; arguments as for `token_loss`."""
    best = logits.amax(-1).flatten()
    mine = _of_targets(logits.flatten(0, 1), targets.flatten(), part)
    if part is not None:
        dist.all_reduce(best, dist.ReduceOp.MAX, group=part.group)
        dist.all_reduce(mine, group=part.group)
    return (mine < best).view_as(targets) & (targets != IGNORE)


class _SplitVocabulary(torch.autograd.Function):
    """Cross-entropy over logits whose words are spread over ranks: Megatron-LM, arXiv 1909.08053, section 3."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, part: Words) -> Tensor:
        highest = logits.amax(-1)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=part.group)
        exponents = (logits - highest[:, None]).exp()
        sums = torch.stack([exponents.sum(-1), _of_targets(logits, targets, part)])
        dist.all_reduce(sums, group=part.group)
        total, chosen = sums
        ctx.save_for_backward(exponents.div_(total[:, None]), targets)
        ctx.part = part
        return ((total.log() + highest - chosen) * (targets != IGNORE)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        probabilities, targets = ctx.saved_tensors
        word, here = _here(targets, probabilities.shape[1], ctx.part)
        found = probabilities * (targets != IGNORE)[:, None]
        found.scatter_add_(1, word[:, None], -here[:, None].to(found.dtype))
        return found.mul_(gradient), None, None


def _of_targets(logits: Tensor, targets: Tensor, part: Words | None) -> Tensor:
    """[tokens] the logit of each target; 0 where another rank has it, or where there is none."""
    word, here = _here(targets, logits.shape[1], part)
    return logits.gather(1, word[:, None])[:, 0] * here


def _here(targets: Tensor, words: int, part: Words | None) -> tuple[Tensor, Tensor]:
    """[tokens] which of this rank's words each target is, and whether it is one of them."""
    local = targets - (part.first if part is not None else 0)
    here = (targets != IGNORE) & (local >= 0) & (local < words)
    return local.clamp(0, words - 1), here
