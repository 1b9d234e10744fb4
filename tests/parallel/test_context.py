"""Attention over packed and cut sequences equals PyTorch's over the whole row with the mask written out."""

from itertools import groupby
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.lanes import packed
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from meshweave.errors import LayoutError
from meshweave.parallel.context import SequencePlan, context_groups
from meshweave.parallel.context import ring as ring_module
from meshweave.parallel.context.attention import sequence_attention
from meshweave.sequence import Document, LaneSequence, Mask, cut_sequence, sight
from meshweave.sequence import tiles as tiles_module
from meshweave.sequence.tiles import rows_of

SCALE = 0.3
DIM = 8

# One token, a span across every cut, spans that touch, a long document, and padding at the end.
RAGGED = LaneSequence(
    96,
    (
        Document(0, 1),
        Document(1, 26, ((4, 9), (20, 26))),
        Document(26, 27),
        Document(27, 91, ((30, 62), (62, 70), (90, 91))),
    ),
)


def inputs(sequence: LaneSequence, heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v of the whole row, and the gradient of the output, zero at padding."""
    draw = torch.Generator().manual_seed(7)
    length = sequence.length
    found = [
        torch.randn(1, count, length, DIM, generator=draw, dtype=torch.float64) for count in (heads, kv_heads, kv_heads, heads)
    ]
    padding = torch.from_numpy(sight(sequence, Mask()).document < 0)
    found[3][:, :, padding] = 0.0
    return [each.to(dtype) for each in found]


def expected(sequence: LaneSequence, mask: Mask, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> list[Tensor]:
    """Output, and gradients of q, k, v, in float64 by PyTorch's attention with a boolean mask."""
    position = np.arange(sequence.length)
    seen = torch.from_numpy(sight(sequence, mask).seen(position, position))
    nothing = ~seen.any(dim=1)
    q, k, v = (each.double().clone().requires_grad_() for each in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    keys, values = (each.repeat_interleave(groups, dim=1) for each in (k, v))
    out = scaled_dot_product_attention(q, keys, values, attn_mask=seen | torch.diag(nothing), scale=SCALE)
    out = out.masked_fill(nothing[:, None], 0.0)
    out.backward(gradient.double())
    return [each.detach() for each in (out, q.grad, k.grad, v.grad) if each is not None]


def attended(plan: SequencePlan, mask: Mask, whole: list[Tensor]) -> list[Tensor]:
    """This rank's rows of the same."""
    rows = torch.from_numpy(rows_of(plan.held))
    q, k, v = (each[:, :, rows].clone().requires_grad_() for each in whole[:3])
    out, _ = sequence_attention(nn.Identity(), q, k, v, None, SCALE, sliding_window=mask.window, sequence=plan)
    out = out.transpose(1, 2)
    out.backward(whole[3][:, :, rows])
    return [each.detach() for each in (out, q.grad, k.grad, v.grad) if each is not None]


def errors(found: list[Tensor], want: list[Tensor], rows: Tensor) -> list[float]:
    """Relative, over this rank's rows."""
    return [float((a - b[:, :, rows]).norm() / b.norm()) for a, b in zip(found, want, strict=True)]


def worst_error(
    rank: int,
    kind: Any,
    heads: int,
    kv_heads: int,
    masks: list[Mask],
    dtype: torch.dtype = torch.float64,
    sequence: LaneSequence = RAGGED,
) -> float:
    """Of this rank's output and gradients, over the masks."""
    cp = dist.get_world_size()
    groups = context_groups(kind, [list(range(cp))], [kv_heads], rank)
    plan = SequencePlan(sequence, cut_sequence(sequence, cp, masks), masks, groups)
    rows = torch.from_numpy(rows_of(plan.held))
    whole = inputs(sequence, heads, kv_heads, dtype)
    return max(
        error
        for mask in masks
        for error in errors([each.double() for each in attended(plan, mask, whole)], expected(sequence, mask, *whole), rows)
    )


CAUSAL = [Mask(), Mask(7)]
TWO_WAY = [Mask(None, True), Mask(7, True)]


@pytest.mark.parametrize("block", [4, 256], ids=["small blocks", "one block"])
@pytest.mark.parametrize(
    ("cp", "kind", "heads", "kv_heads"),
    [
        (2, "ring", 4, 2),
        (3, "ring", 2, 2),
        (4, "ring", 4, 1),
        (2, "ulysses", 4, 2),
        (4, "ulysses", 8, 4),
        (4, "ulysses", 4, 2),
        (6, "ulysses", 4, 2),
        (3, "ulysses", 4, 2),
    ],
    ids=lambda value: str(value),
)
def test_a_cut_sequence_attends_as_the_whole_one(
    monkeypatch: pytest.MonkeyPatch, cp: int, kind: str, heads: int, kv_heads: int, block: int
) -> None:
    monkeypatch.setattr(tiles_module, "BLOCK", block)
    for masks in (CAUSAL, TWO_WAY):
        assert max(run_ranks(cp, worst_error, kind, heads, kv_heads, masks)) <= 1e-12


@pytest.mark.parametrize("block", [1, 4, 256])
@pytest.mark.parametrize("masks", [CAUSAL, TWO_WAY], ids=["causal", "two-way"])
def test_one_rank_attends_over_packed_documents_without_a_group(
    monkeypatch: pytest.MonkeyPatch, block: int, masks: list[Mask]
) -> None:
    monkeypatch.setattr(tiles_module, "BLOCK", block)
    plan = SequencePlan(RAGGED, cut_sequence(RAGGED, 1, masks), masks)
    whole = inputs(RAGGED, 4, 2, torch.float64)
    for mask in masks:
        assert max(errors(attended(plan, mask, whole), expected(RAGGED, mask, *whole), torch.arange(96))) <= 1e-12


def test_kernels_larger_than_their_own_blocks_are_exact() -> None:
    sequence = packed(2560, [1500, 3, 800], span=300, gap=40)
    for masks in (CAUSAL, [Mask(700, True), Mask(None, True)]):
        assert max(run_ranks(2, worst_error, "ring", 2, 1, masks, torch.float64, sequence)) <= 1e-12


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_bfloat16_is_as_close_as_its_digits(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(tiles_module, "BLOCK", 4)
    assert max(run_ranks(2, worst_error, kind, 4, 2, TWO_WAY, torch.bfloat16)) <= 0.01


def test_padding_attends_to_nothing_and_its_gradients_are_zero() -> None:
    plan = SequencePlan(RAGGED, cut_sequence(RAGGED, 1, [Mask()]), [Mask()])
    whole = inputs(RAGGED, 2, 2, torch.float64)
    whole[3] += 1.0
    for found in attended(plan, Mask(), whole):
        assert found.isfinite().all()
        assert (found[:, :, 91:] == 0).all()


def _forgetful(total: Tensor, lse: Tensor, out: Tensor, out_lse: Tensor) -> None:
    total.copy_(out)
    lse.copy_(out_lse)


def test_tiles_put_together_without_their_log_sum_exp_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_module, "_merge", _forgetful)
    assert max(run_ranks(2, worst_error, "ring", 2, 2, CAUSAL)) > 1e-3


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive.

    State: the storages seen, the bytes alive and their peak, and the largest tensor made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = WeakIdKeyDictionary()
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor):
                self.alive[each.untyped_storage()] = each.untyped_storage().nbytes()
                self.largest = max(self.largest, each.untyped_storage().nbytes())
        self.peak = max(self.peak, sum(self.alive.values()))
        return found


def memory(rank: int) -> tuple[int, int]:
    """(peak bytes alive in forward and backward, largest tensor) of one layer, inputs not counted."""
    cp = dist.get_world_size()
    sequence = packed(4096, [4096])
    plan = SequencePlan(
        sequence, cut_sequence(sequence, cp, [Mask()]), [Mask()], context_groups("ring", [list(range(cp))], [2], rank)
    )
    q, k, v = (torch.ones(1, heads, plan.rows, DIM, requires_grad=True) for heads in (4, 2, 2))
    gradient = torch.ones(1, plan.rows, 4, DIM)
    plan.ring(Mask(), 1, q.device, q.dtype)
    with Live() as live:
        out, _ = sequence_attention(nn.Identity(), q, k, v, None, sequence=plan)
        out.backward(gradient)
    return live.peak, live.largest


def test_no_rank_ever_has_a_tensor_of_the_whole_sequence() -> None:
    row = 4 * DIM  # bytes of a row of one head
    for cp in (2, 4):
        rows = 4096 // cp
        for peak, largest in run_ranks(cp, memory):
            assert largest <= rows * row * 4  # queries, or keys and values together, of one rank
            assert peak <= rows * row * 56  # measured: 40 and 52; queries, keys and values themselves are 8


def events(rank: int) -> list[str]:
    """What a rank of a ring does, in order: posts a step's messages, or computes a tile of the forward pass."""
    seen: list[str] = []
    post, attend = ring_module._post, ring_module.attend

    def record(group: Any, send: Any, receive: Any) -> Any:
        seen.append("post")
        return post(group, send, receive)

    with (
        patch.object(ring_module, "_post", record),
        patch.object(ring_module, "attend", lambda *a: (seen.append("tile"), attend(*a))[1]),
    ):
        worst_error(rank, "ring", 2, 2, [Mask()], sequence=packed(96, [96]))
    return seen


def test_the_keys_of_the_next_step_travel_while_tiles_are_computed() -> None:
    for seen in run_ranks(3, events):
        # Before own tiles the first neighbour's keys, before the first neighbour's tiles the second's; then the backward pass.
        assert [each for each, _ in groupby(seen)][:5] == ["post", "tile", "post", "tile", "post"]


def fully_sharded(rank: int) -> tuple[bool, torch.dtype]:
    """Whether a plan comes through FSDP's hooks as it is, in mixed precision."""
    arrived = []

    class Layer(nn.Linear):
        def forward(self, x: Tensor, sequence: Any = None) -> Tensor:
            arrived.append((sequence, x.dtype))
            return super().forward(x)

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True)
    layer = fully_shard(Layer(4, 4), mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    plan = SequencePlan(RAGGED, cut_sequence(RAGGED, 1, [Mask()]), [Mask()])
    layer(torch.ones(2, 4), sequence=plan)
    return arrived[0][0] is plan, arrived[0][1]


def test_fully_sharded_modules_hand_the_plan_on_as_it_is() -> None:
    assert run_ranks(1, fully_sharded) == [(True, torch.bfloat16)]


def test_gradients_may_have_any_strides() -> None:
    plan = SequencePlan(RAGGED, cut_sequence(RAGGED, 1, [Mask()]), [Mask()])
    q, k, v, _ = inputs(RAGGED, 4, 2, torch.float64)
    found = []
    for strided in (True, False):
        value = v.clone().requires_grad_()
        out, _ = sequence_attention(nn.Identity(), q, k, value, None, SCALE, sequence=plan)
        out.backward(torch.ones(()).double().expand(out.shape) if strided else torch.ones_like(out))
        found.append(value.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("rows", "mask", "arguments", "message"),
    [
        (96, None, {"sequence": None}, "Identity got no plan of its sequence"),
        (96, torch.ones(1, 1, 96, 96), {}, "got an attention mask"),
        (95, None, {}, "1 x 95 positions, .* a rank holds 96"),
        (96, None, {"dropout": 0.1}, "dropout 0.1 .* set attention_dropout to 0"),
        (96, None, {"softcap": 50.0}, "soft-capped attention scores"),
        (96, None, {"s_aux": torch.zeros(2)}, "attention sinks"),
        (96, None, {"position_bias": torch.zeros(1)}, "position bias"),
        (96, None, {"sliding_window": 9}, r"sliding_window=9, .* windows None, 7"),
    ],
)
def test_what_is_not_built_is_refused(rows: int, mask: Tensor | None, arguments: dict[str, Any], message: str) -> None:
    plan = SequencePlan(RAGGED, cut_sequence(RAGGED, 1, CAUSAL), CAUSAL)
    q = torch.zeros(1, 2, rows, DIM)
    with pytest.raises(LayoutError, match=message):
        sequence_attention(nn.Identity(), q, q, q, mask, **{"sequence": plan} | arguments)


def test_a_plan_is_for_its_cut_and_its_masks() -> None:
    with pytest.raises(LayoutError, match=r"cut into 2 parts .* for cp=1"):
        SequencePlan(RAGGED, cut_sequence(RAGGED, 2, CAUSAL), CAUSAL)
    with pytest.raises(LayoutError, match="window None differ in two_way"):
        SequencePlan(RAGGED, cut_sequence(RAGGED, 1, CAUSAL), [Mask(), Mask(None, True)])
