"""How is one tile of attention computed? PyTorch's fused kernels, with the log-sum-exp by which tiles are merged.

Shapes: queries `[1, heads, queries, dim]`, keys and values `[1, kv heads, keys, dim]`, log-sum-exp `[1, heads, queries]`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_cuda = torch.ops.aten._scaled_dot_product_efficient_attention
_cuda_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward

ALIGNED = 16
"""Elements that a row of a bias must be a multiple of on CUDA."""


class Bias(NamedTuple):
    """What a tile's queries see, as the kernels want it."""

    added: Tensor
    """`[queries, keys]`: 0 where seen, -inf elsewhere; dtype of the queries."""
    blind: Tensor | None
    """`[queries]` bool: sees no key of the tile; None if every query sees one."""


def bias_of(seen: Tensor, dtype: torch.dtype, device: torch.device) -> Bias:
    """On `device`, from `[queries, keys]` bool on the CPU: what is decided here must not wait for the device."""
    queries, keys = seen.shape
    # Rows lie at a multiple of ALIGNED, which CUDA's kernel wants and the CPU's does not mind.
    added = torch.zeros(queries, -(-keys // ALIGNED) * ALIGNED, dtype=dtype)
    added[:, :keys].masked_fill_(~seen, float("-inf"))
    blind = ~seen.any(dim=1)
    return Bias(added.to(device)[:, :keys], blind.to(device) if bool(blind.any()) else None)


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, bias: Bias | None = None
) -> tuple[Tensor, Tensor]:
    """Output `[1, heads, queries, dim]`, and log-sum-exp, natural: -inf where a query sees no key of the tile."""
    if q.is_cuda and q.dtype == torch.float64:
        return plain(q, k, v, scale, causal, bias)
    if q.is_cuda:
        k, v = _repeated(k, q), _repeated(v, q)
        out, lse, *_ = _cuda(q, k, v, _expanded(bias, q, k), True, 0.0, causal, scale=scale)
        lse = lse[..., : q.shape[2]]  # the kernel rounds its length up
    else:
        out, lse = _cpu(q, k, v, 0.0, causal, attn_mask=bias.added if bias else None, scale=scale)
    if bias is not None and bias.blind is not None:
        out = out.masked_fill(bias.blind[:, None], 0.0)
        lse = lse.masked_fill(bias.blind, float("-inf"))
    return out, lse


def attend_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool = False,
    bias: Bias | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A tile's part of the gradients of q, k and v.

    `out` and `lse` are those of the queries over all their keys: the tile's probabilities follow from `lse` alone.
    """
    if q.is_cuda and q.dtype == torch.float64:
        return plain_backward(gradient, q, k, v, out, lse, scale, causal, bias)
    if not q.is_cuda:
        added = bias.added if bias else None
        return _cpu_backward(gradient, q, k, v, out, lse, 0.0, causal, attn_mask=added, scale=scale)
    keys, values = _repeated(k, q), _repeated(v, q)
    rounded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
    zero = torch.zeros((), dtype=torch.int64, device=q.device)  # state of the random numbers of dropout
    added = _expanded(bias, q, k)
    dq, dk, dv, _ = _cuda_backward(
        gradient, q, keys, values, added, out, rounded, zero, zero, 0.0, [True, True, True, False], causal, scale=scale
    )
    return dq, _summed(dk, k), _summed(dv, v)


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    """The CUDA kernel has no grouped heads: `[1, kv heads, keys, dim]` to `[1, heads, keys, dim]`."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _summed(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient if gradient.shape == x.shape else gradient.unflatten(1, (x.shape[1], -1)).sum(dim=2)


def _expanded(bias: Bias | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if bias is None else bias.added.expand(1, q.shape[1], q.shape[2], k.shape[2])


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Bias | None) -> tuple[Tensor, Tensor]:
    """`attend` in matrix products: for float64 on CUDA, which no fused kernel knows and a comparison with the oracle needs."""
    scores = _scores(q, k, scale, causal, bias)
    lse = scores.logsumexp(-1)
    return _probabilities(scores, lse) @ _repeated(v, q), lse


def plain_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    bias: Bias | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_backward` likewise."""
    probabilities = _probabilities(_scores(q, k, scale, causal, bias), lse)
    reached = gradient @ _repeated(v, q).transpose(-1, -2) - (gradient * out).sum(-1, keepdim=True)
    scores = probabilities * reached * scale
    dk, dv = scores.transpose(-1, -2) @ q, probabilities.transpose(-1, -2) @ gradient
    return scores @ _repeated(k, q), _summed(dk, k), _summed(dv, v)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, bias: Bias | None) -> Tensor:
    scores = scale * (q @ _repeated(k, q).transpose(-1, -2))
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores if bias is None else scores + bias.added


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """0, and not NaN, where a query sees no key."""
    return (scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)).exp()
