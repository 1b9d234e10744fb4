"""A backward in two halves gives what one backward gives, bit for bit, and the first half leaves the matrices alone."""

import torch
from torch import Tensor, nn

from meshweave.step.split_backward import SplitBackward


def model_and_batch() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 8, bias=False), shared, nn.GELU(), shared)
    return (
        model.double(),
        torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 5, 8, dtype=torch.float64),
    )


def test_halves_add_up_to_the_whole_also_over_two_microbatches() -> None:
    model, batch, gradient = model_and_batch()
    for _ in range(2):
        model(batch).backward(gradient)
    expected = [parameter.grad for parameter in model.parameters()]
    assert batch.grad is not None
    expected_input = batch.grad / 2
    model.zero_grad()
    for _ in range(2):
        split = SplitBackward()
        with split.recording():
            output = model(batch)
        (found,) = split.input_gradients([output], [gradient], [batch], model.parameters())
        assert found is not None
        assert torch.equal(found, expected_input)
        split.weight_gradients()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None and grad is not None
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-14, atol=1e-14)


def test_the_first_half_computes_no_gradient_of_a_matrix_and_a_frozen_one_never_gets_any() -> None:
    model, batch, gradient = model_and_batch()
    first = next(iter(model.children()))
    first.requires_grad_(False)
    split = SplitBackward()
    with split.recording():
        output = model(batch)
    split.input_gradients([output], [gradient], [batch], model.parameters())
    frozen, once, twice = (parameter for parameter in model.parameters() if parameter.ndim == 2)
    assert frozen.grad is None and once.grad is None
    assert twice.grad is not None
    split.weight_gradients()
    assert frozen.grad is None
    assert once.grad is not None
