"""Ranks that share the patches of a pass all get all of its tokens, however few each has."""

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from torch import Tensor

from meshweave.parallel.context.patches import _Gather, share_out

UNIT = 4


def gather(rank: int, tokens: int) -> tuple[Tensor, Tensor]:
    every = torch.arange(3.0 * tokens).view(tokens, 3)
    shares = share_out(UNIT * tokens, UNIT, dist.group.WORLD)
    first = sum(shares.counts[:rank]) // UNIT
    own = every[first : first + shares.counts[rank] // UNIT].clone().requires_grad_()
    gathered = _Gather.apply(own, shares, UNIT)
    gathered.backward(every)
    assert own.grad is not None
    return gathered.detach(), own.grad


@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
def test_tokens_are_gathered_from_ranks_that_have_none_one_or_several(tokens: int) -> None:
    every = torch.arange(3.0 * tokens).view(tokens, 3)
    results = run_ranks(2, gather, tokens)
    assert all(torch.equal(gathered, every) for gathered, _ in results)
    assert torch.equal(torch.cat([gradient for _, gradient in results]), every)
