"""The loss of a vocabulary that is spread over ranks is that of the whole one; labels are shifted within samples."""

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from torch import Tensor
from torch.nn import functional

from meshweave.model.loss import Words, mistakes, next_tokens, token_loss

VOCABULARY, TOKENS = 17, 12


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = 4 * torch.randn(2, TOKENS, VOCABULARY, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (2, TOKENS), generator=generator)
    targets[0, 3:6] = -100
    right = logits.argmax(-1)
    targets[1, ::2] = right[1, ::2]
    return logits, targets


@pytest.mark.parametrize("world", [2, 3])
def test_the_loss_and_its_gradient_are_those_of_the_whole_vocabulary(world: int) -> None:
    """17 words over 2 and 3 ranks: the last has fewer, as torch.chunk cuts."""
    logits, targets = batch()
    whole = logits.clone().requires_grad_()
    expected = functional.cross_entropy(whole.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    (3 * expected).backward()
    size = -(-VOCABULARY // world)

    def spread(rank: int) -> tuple[float, Tensor, Tensor]:
        assert dist.group.WORLD is not None
        part = Words(dist.group.WORLD, rank * size)
        mine = logits[..., rank * size : (rank + 1) * size].clone().requires_grad_()
        loss = token_loss(mine, targets, part)
        (3 * loss).backward()
        assert mine.grad is not None
        return loss.item(), mine.grad, mistakes(mine.detach(), targets, part)

    found = run_ranks(world, spread)
    assert whole.grad is not None
    for rank, (loss, gradient, wrong) in enumerate(found):
        assert loss == pytest.approx(expected.item(), rel=1e-14)
        torch.testing.assert_close(gradient, whole.grad[..., rank * size : (rank + 1) * size], rtol=1e-12, atol=1e-14)
        assert torch.equal(wrong, mistakes(logits, targets))


def test_mistakes_are_targets_that_are_not_the_most_likely_word() -> None:
    logits, targets = batch()
    wrong = (logits.argmax(-1) != targets) & (targets != -100)
    assert torch.equal(mistakes(logits, targets), wrong)
    assert not wrong[1, ::2].any()
    assert wrong.any()


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits, targets = batch()
    exact = token_loss(logits, targets).item()
    assert token_loss(logits.bfloat16(), targets).dtype == torch.float32
    assert token_loss(logits.bfloat16(), targets).item() == pytest.approx(exact, rel=1e-2)


def test_labels_are_shifted_by_one_and_the_last_predicts_nothing() -> None:
    assert next_tokens(torch.tensor([[-100, 7, 8, -100, 9]])).tolist() == [[7, 8, -100, 9, -100]]
