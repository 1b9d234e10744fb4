"""What is the smallest model of the same architecture? For checking the layout of a large run on a laptop."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from meshweave.config import LANGUAGE, RunConfig
from meshweave.model.blueprint import blueprint_of
from meshweave.model.modules import ENCODERS, has_encoder
from meshweave.model.stages import stage_count

VOCABULARY = 256
PATCH = 4
_SQUARE = 4 * PATCH  # pixels a side of an image, where that is fixed


def shrink_run(run: RunConfig, config: PreTrainedConfig) -> tuple[RunConfig, PreTrainedConfig]:
    """A run's layout with random weights and samples on the smallest model that has blocks for all of its pipeline stages.

    `layers` are left out: their sums are those of the large model, so the small one is cut anew.
    """
    small = shrink(config, {name: stage_count(run, name) for name in run.modules}, run.modules[LANGUAGE].etp)
    modules = {name: module.model_copy(update={"layers": None}) for name, module in run.modules.items()}
    return run.model_copy(update={"weights": "seeded", "data": None, "modules": modules}), small


def shrink(config: PreTrainedConfig, stages: Mapping[str, int] | None = None, slices: int = 1) -> PreTrainedConfig:
    """A tiny config of the same architecture and the same numbers of attention heads and experts, so that the same `tp` and `ep`
    divide it; experts are wide enough for so many `slices`.

    Layers, widths, image sizes, experts and vocabulary become small; special token ids move into the small vocabulary. As many
    layers are kept as there are (virtual) pipeline `stages` of each module, and one of every type.
    """
    small = _shrunk(config.to_dict(), config, stages or {}, slices)
    default = next(
        (module.mrope_section for module in blueprint_of(small, torch.float32).modules() if _has_sections(module)), None
    )
    if default is not None and "mrope_section" not in (small.text_config.rope_parameters or {}):
        # Only the class knows it, and it shares out the heads of the large model.
        tree = config.to_dict()
        tree["text_config"]["rope_parameters"] = tree["text_config"]["rope_parameters"] | {"mrope_section": default}
        small = _shrunk(tree, config, stages or {}, slices)
    return small


def _has_sections(module: nn.Module) -> bool:
    return hasattr(module, "mrope_section")


def _shrunk(tree: dict[str, Any], config: PreTrainedConfig, stages: Mapping[str, int], slices: int) -> PreTrainedConfig:
    """`tree`: of `config`, with what its class alone knows."""
    encoders = {name: ENCODERS[name].config for name in ENCODERS if has_encoder(config, name)}
    deepstack = max(len(tree[key].get("deepstack_visual_indexes") or ()) for key in encoders.values())
    # The layers that deepstack features are added to are all on the first stage.
    layers = max(2, deepstack, max(1, deepstack) + stages.get(LANGUAGE, 1) - 1)
    text = tree["text_config"] = _shrink_text(tree["text_config"], layers, slices)
    for name, key in encoders.items():
        tree[key] = _shrink_encoder(tree[key], text["hidden_size"], stages.get(name, 1))
    if tree.get("image_grid_pinpoints"):
        tree["image_grid_pinpoints"] = [[_SQUARE, 2 * _SQUARE], [2 * _SQUARE, _SQUARE], [2 * _SQUARE, 2 * _SQUARE]]
    if "mm_tokens_per_image" in tree:
        tree["mm_tokens_per_image"] = 4
    names = sorted(name for name in _token_names(config))
    return AutoConfig.for_model(**tree | {name: number for number, name in enumerate(names, start=3)})


def _token_names(config: PreTrainedConfig) -> set[str]:
    """Keys of a config that hold the id of a special token; some are told by the class alone, and some have two names."""
    names = {name for name in (*config.to_dict(), *dir(config)) if name.endswith(("_token_id", "_token_index"))}
    return {name for name in names - set(config.attribute_map) if isinstance(getattr(config, name, None), int)}


def _shrink_text(tree: dict[str, Any], layers: int, slices: int) -> dict[str, Any]:
    heads, small = tree["num_attention_heads"], dict(tree)
    rope = dict(tree.get("rope_parameters") or {})
    sections = rope.get("mrope_section")
    head_dim = 16 if sections else 8
    if isinstance(factor := rope.get("partial_rotary_factor"), float):
        head_dim = round(head_dim / factor)
    if sections:
        # The sections of M-RoPE share half of what is rotated of a head among time, height and width.
        half = 8
        shares = [max(1, section * half // sum(sections)) for section in sections]
        shares[0] += half - sum(shares)
        small["rope_parameters"] = rope | {"mrope_section": shares}
    if kinds := list(dict.fromkeys(tree.get("layer_types") or ())):
        # Layers that share keys and values take them from an earlier one of their type.
        shared = len(kinds) if tree.get("num_kv_shared_layers") else 0
        small["layer_types"] = [*tree["layer_types"][: max(0, layers - len(kinds) - shared)], *kinds, *kinds[:shared]]
        layers = len(small["layer_types"])
        if shared:
            small["num_kv_shared_layers"] = shared
    if special := small.pop("per_layer_config", None):  # Gemma 4: layers with other heads
        others = next(iter(special.values()))
        if "head_dim" in others:
            small["global_head_dim"] = 2 * head_dim
        if "num_key_value_heads" in others:
            small["num_global_key_value_heads"] = others["num_key_value_heads"]
    width = heads * (8 if "head_dim" in tree else head_dim)
    small |= {"num_hidden_layers": layers, "hidden_size": width, "head_dim": head_dim, "intermediate_size": heads * 4 * slices}
    small |= {key: VOCABULARY for key in ("vocab_size", "vocab_size_per_layer_input") if key in tree}
    for key, size in _SMALL_TEXT.items():
        if small.get(key):
            small[key] = min(small[key], size)
    for key in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        if small.get(key):
            small[key] = 8 * slices
    if "mlp_only_layers" in small:
        small["mlp_only_layers"] = []
    for number, key in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")):
        if small.get(key) is not None:
            small[key] = number
    return small


_SMALL_TEXT = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 16,
}
"""Sizes of some text models that heads do not set."""


def _shrink_encoder(tree: dict[str, Any], text_width: int, stages: int) -> dict[str, Any]:
    small = dict(tree)
    deepstack = len(tree.get("deepstack_visual_indexes") or ())
    heads = next(tree[key] for key in _HEADS if key in tree)
    sizes = {
        **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers"), max(3, deepstack + 1, stages)),
        **dict.fromkeys(("hidden_size", "d_model", "intermediate_size", "encoder_ffn_dim"), heads * 8),
        **dict.fromkeys(("out_hidden_size", "output_dim"), text_width),
        "head_dim": 8,
        "num_position_embeddings": 64,
        "position_embedding_size": 16,
        "num_mel_bins": 8,
        "downsample_hidden_size": 8,
        # Sounds longer than one chunk of Qwen3-Omni's.
        "max_source_positions": 75 if "n_window_infer" in tree else 16,
    }
    small |= {key: size for key, size in sizes.items() if key in tree}
    for key, size in (("patch_size", PATCH), ("image_size", _SQUARE)):
        if key in tree:
            small[key] = [size, size] if isinstance(tree[key], (list, tuple)) else size
    if "fullatt_block_indexes" in tree:
        small["fullatt_block_indexes"] = [1]
    if deepstack:
        small["deepstack_visual_indexes"] = list(range(deepstack))
    return small


_HEADS = ("num_attention_heads", "num_heads", "encoder_attention_heads")
