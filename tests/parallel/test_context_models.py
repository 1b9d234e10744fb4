"""Stock text models over packed documents equal themselves over one document after another, and cut models the whole ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2_5_VLTextConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLTextConfig,
)
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model, get_block_sequence_ids_for_mask
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from meshweave.model.masks import masks_of
from meshweave.parallel.context import IMPLEMENTATION, SequencePlan, context_groups
from meshweave.sequence import Document, LaneSequence, cut_sequence
from meshweave.sequence import tiles as tiles_module
from meshweave.sequence.tiles import rows_of
from meshweave.verification.precision import full_precision

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"experts_implementation": "eager"}  # the default refuses float64
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
SLIDING = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**TINY),
    "mistral": lambda: MistralConfig(**TINY, sliding_window=5),
    "mixtral": lambda: MixtralConfig(**TINY, sliding_window=5, num_local_experts=4, **EXPERTS),
    "qwen2": lambda: Qwen2Config(**TINY, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**TINY),
    "qwen3 sliding": lambda: Qwen3Config(**TINY, use_sliding_window=True, sliding_window=5, layer_types=SLIDING),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **TINY,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        use_sliding_window=True,
        sliding_window=5,
        **EXPERTS,
    ),
    "qwen2_5_vl": lambda: Qwen2_5_VLTextConfig(
        **TINY, rope_parameters=ROPE, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3_vl": lambda: Qwen3VLTextConfig(**TINY, rope_parameters=ROPE),
    "gemma3": lambda: Gemma3TextConfig(**TINY, sliding_window=5, layer_types=SLIDING),
    "gemma4": lambda: Gemma4TextConfig(
        **TINY,
        sliding_window=5,
        layer_types=SLIDING,
        global_head_dim=16,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64,
        use_bidirectional_attention="vision",
    ),
}
BARE = {"qwen2_5_vl": Qwen2_5_VLTextModel, "qwen3_vl": Qwen3VLTextModel}  # their heads belong to the multimodal model
TWO_WAY = {"gemma3": ((3, 12),), "gemma4": ((3, 12),)}


def lane(spans: tuple[tuple[int, int], ...]) -> LaneSequence:
    """Documents of 1, 17, 4 and 22 tokens, the second with spans, and 4 of padding."""
    moved = tuple((1 + start, 1 + stop) for start, stop in spans)
    return LaneSequence(48, (Document(0, 1), Document(1, 18, moved), Document(18, 22), Document(22, 44)))


def built(family: str, attention: str) -> nn.Module:
    config = FAMILIES[family]()
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = BARE[family](config) if family in BARE else AutoModelForCausalLM.from_config(config)
        model = model.double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.1)
    return model


def tokens(sequence: LaneSequence) -> tuple[Tensor, Tensor]:
    """Token ids `[1, length]`, and positions that start anew with every document."""
    ids = torch.randint(1, 64, (1, sequence.length), generator=torch.Generator().manual_seed(5))
    positions = torch.zeros_like(ids)
    for each in sequence.documents:
        positions[0, each.start : each.stop] = torch.arange(each.stop - each.start)
    return ids, positions


def run(model: nn.Module, **arguments: Any) -> Tensor:
    with full_precision(torch.float64):
        found = model(**arguments, use_cache=False)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def learn(out: Tensor, rows: Tensor) -> None:
    """Backward of a sum with other weights at every position; padding has none."""
    weights = torch.randn(48, out.shape[-1], generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    weights[44:] = 0.0
    with full_precision(torch.float64):
        (out[0] * weights[rows]).sum().backward()


def one_by_one(family: str, sequence: LaneSequence) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of all documents, and gradients, by PyTorch's attention over one document at a time."""
    model = built(family, "sdpa")
    ids, positions = tokens(sequence)
    outs = []
    for each in sequence.documents:
        rows = slice(each.start, each.stop)
        arguments: dict[str, Any] = {"input_ids": ids[:, rows], "position_ids": positions[:, rows]}
        if each.two_way:
            arguments["attention_mask"] = image_masks(family, model, each)
        out = run(model, **arguments)
        learn(out, torch.arange(each.start, each.stop))
        outs.append(out.detach())
    return torch.cat(outs, dim=1), gradients(model)


def image_masks(family: str, model: Any, document: Document) -> dict[str, Tensor]:
    """The masks that the multimodal model would hand to its text model."""
    module = modeling_gemma4 if family == "gemma4" else None
    create = module.create_masks_for_vision_model if module else create_masks_for_vision_model
    blocks = module.get_block_sequence_ids_for_mask if module else get_block_sequence_ids_for_mask
    length = document.stop - document.start
    image = torch.zeros(1, length, dtype=torch.int64)
    for start, stop in document.two_way:
        image[:, start - document.start : stop - document.start] = 1
    embeddings = torch.zeros(1, length, 1, dtype=torch.float64)
    arguments = {"attention_mask": None, "past_key_values": None, "position_ids": None}
    found: dict[str, Tensor] = create(model.config, embeddings, block_sequence_ids=blocks(image, image.device), **arguments)
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def differences(found: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The worst relative difference of a gradient; those that are zero but for rounding against the whole."""
    assert found.keys() == want.keys()
    whole = torch.stack([each.norm() for each in want.values()]).norm()
    return max(float((found[name] - want[name]).norm() / max(want[name].norm(), 1e-3 * whole)) for name in want)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_give_the_logits_and_gradients_of_each_alone(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr(tiles_module, "BLOCK", 4)
    sequence = lane(TWO_WAY.get(family, ()))
    logits, want = one_by_one(family, sequence)
    model = built(family, IMPLEMENTATION)
    masks = masks_of(model.config)
    ids, positions = tokens(sequence)
    plan = SequencePlan(sequence, cut_sequence(sequence, 1, masks), masks)
    out = run(model, input_ids=ids, position_ids=positions, sequence=plan)
    assert out.isfinite().all()
    learn(out, torch.arange(48))
    assert float((out[:, :44].detach() - logits).norm() / logits.norm()) <= 1e-12
    assert differences(gradients(model), want) <= 1e-9


def cut_model(rank: int, family: str, kind: Any) -> dict[str, Tensor]:
    """Gradients of a model whose sequence is cut over all ranks, summed over them."""
    cp = dist.get_world_size()
    sequence = lane(TWO_WAY.get(family, ()))
    model = built(family, IMPLEMENTATION)
    masks = masks_of(model.config)
    groups = context_groups(kind, [list(range(cp))], [model.config.num_key_value_heads], rank)
    plan = SequencePlan(sequence, cut_sequence(sequence, cp, masks), masks, groups)
    rows = torch.from_numpy(rows_of(plan.held))
    ids, positions = tokens(sequence)
    learn(run(model, input_ids=ids[:, rows], position_ids=positions[:, rows], sequence=plan), rows)
    found = gradients(model)
    for each in found.values():
        dist.all_reduce(each)
    return found


@pytest.mark.parametrize(
    ("family", "kind", "cp"), [("qwen3 sliding", "ring", 3), ("gemma3", "ulysses", 4), ("gemma4", "ring", 2)]
)
def test_a_model_whose_sequence_is_cut_has_the_gradients_of_each_document_alone(
    monkeypatch: pytest.MonkeyPatch, family: str, kind: str, cp: int
) -> None:
    monkeypatch.setattr(tiles_module, "BLOCK", 4)
    _, want = one_by_one(family, lane(TWO_WAY.get(family, ())))
    for found in run_ranks(cp, cut_model, family, kind):
        assert differences(found, want) <= 1e-9
