"""Tiles in plain matrix products, which float64 on CUDA takes, equal the fused kernels."""

import pytest
import torch

from meshweave.parallel.context.kernels import attend, attend_backward, bias_of, plain, plain_backward


@pytest.mark.parametrize("kind", ["full", "causal", "partial"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_plain_tiles_equal_fused_ones(kind: str, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(heads: int, rows: int) -> torch.Tensor:
        return torch.randn(1, heads, rows, 8, generator=generator, dtype=torch.float64)

    queries, keys = 7, 7 if kind == "causal" else 11
    q, k, v, gradient = draw(4, queries), draw(kv_heads, keys), draw(kv_heads, keys), draw(4, queries)
    bias = None
    if kind == "partial":
        seen = torch.rand(queries, keys, generator=generator) < 0.5
        seen[2] = False
        bias = bias_of(seen, torch.float64, torch.device("cpu"))
        assert bias.blind is not None
    out, lse = attend(q, k, v, 0.3, kind == "causal", bias)
    mine, my_lse = plain(q, k, v, 0.3, kind == "causal", bias)
    torch.testing.assert_close(mine, out, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(my_lse, lse, rtol=1e-12, atol=1e-13)
    # As in a ring: the output and its log-sum-exp are those over other keys, too.
    whole = torch.logaddexp(lse, torch.full_like(lse, 0.5))
    expected = attend_backward(gradient, q, k, v, out, whole, 0.3, kind == "causal", bias)
    found = plain_backward(gradient, q, k, v, out, whole, 0.3, kind == "causal", bias)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
