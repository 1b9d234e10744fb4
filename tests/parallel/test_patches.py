"""Ranks that share the patches of a pass all get all of its tokens, however few there are."""

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from torch import Tensor

from meshweave.parallel.context.patches import _Gather, share_out

UNIT = 4


def gather(rank: int, tokens: int) -> tuple[int, Tensor, Tensor]:
    """Patches of a rank, what it gathers of one number a patch, and the gradients that come back to all patches."""
    every = torch.arange(float(UNIT * tokens)).view(-1, 1).requires_grad_()
    shares = share_out(UNIT * tokens, UNIT, dist.group.WORLD)
    own = shares.part(every)
    gathered = _Gather.apply(own.view(-1, UNIT), shares, UNIT)[:tokens]
    gathered.backward(gathered.detach())
    assert every.grad is not None
    return len(own), gathered.detach(), every.grad


@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
def test_tokens_are_gathered_from_ranks_that_have_one_or_several_or_padding(tokens: int) -> None:
    results = run_ranks(2, gather, tokens)
    every = torch.arange(float(UNIT * tokens))
    assert all(torch.equal(gathered.flatten(), every) for _, gathered, _ in results)
    assert torch.equal(sum(gradient for *_, gradient in results).flatten(), every)
    assert all(patches for patches, *_ in results)
