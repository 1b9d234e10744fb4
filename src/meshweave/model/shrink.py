"""What is the smallest model of the same architecture? For checking the layout of a large run on a laptop."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from meshweave.config import LANGUAGE, RunConfig
from meshweave.model.modules import VISION
from meshweave.model.stages import stage_count

VOCABULARY = 256


def shrink_run(run: RunConfig, config: PreTrainedConfig) -> tuple[RunConfig, PreTrainedConfig]:
    """A run's layout with random weights and samples on the smallest model that has blocks for all of its pipeline stages.

    `layers` are left out: their sums are those of the large model, so the small one is cut anew.
    """
    stages, slices = {name: stage_count(run, name) for name in (VISION, LANGUAGE)}, run.modules[LANGUAGE].etp
    small = shrink(config, vision_stages=stages[VISION], language_stages=stages[LANGUAGE], slices=slices)
    modules = {name: module.model_copy(update={"layers": None}) for name, module in run.modules.items()}
    return run.model_copy(update={"weights": "seeded", "data": None, "modules": modules}), small


def shrink(config: PreTrainedConfig, *, vision_stages: int = 1, language_stages: int = 1, slices: int = 1) -> PreTrainedConfig:
    """A tiny config of the same architecture and the same numbers of attention heads and experts, so that the same `tp` and `ep`
    divide it; experts are wide enough for so many `slices`.

    Layers, widths, image size and vocabulary become small; special token ids move into the small vocabulary. As many layers are
    kept as the (virtual) pipeline stages need.
    """
    tree = config.to_dict()
    deepstack = tree["vision_config"].get("deepstack_visual_indexes") or ()
    # The layers that deepstack features are added to are all on the first stage.
    layers = max(2, len(deepstack), max(1, len(deepstack)) + language_stages - 1)
    text = tree["text_config"] = _shrink_text(tree["text_config"], layers, slices)
    tree["vision_config"] = _shrink_vision(tree["vision_config"], len(deepstack), text["hidden_size"], vision_stages)
    names = [key for key in tree if key.endswith(("_token_id", "_token_index")) and isinstance(tree[key], int)]
    tree |= {name: number for number, name in enumerate(sorted(names), start=3)}
    return AutoConfig.for_model(**tree)


def _shrink_text(tree: dict[str, Any], layers: int, slices: int) -> dict[str, Any]:
    heads, small = tree["num_attention_heads"], dict(tree)
    rope = dict(tree.get("rope_parameters") or {})
    sections = rope.get("mrope_section")
    head_dim = 16 if sections else 8
    if sections:
        # The sections of M-RoPE share half a head among time, height and width.
        shares = [max(1, section * head_dim // 2 // sum(sections)) for section in sections]
        shares[0] += head_dim // 2 - sum(shares)
        small["rope_parameters"] = rope | {"mrope_section": shares}
    small |= {
        "num_hidden_layers": layers,
        "hidden_size": heads * head_dim,
        "head_dim": head_dim,
        "intermediate_size": heads * 4 * slices,
        "vocab_size": VOCABULARY,
    }
    for key in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        if tree.get(key):
            small[key] = 8 * slices
    if tree.get("layer_types"):
        small["layer_types"] = tree["layer_types"][:layers]
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if small.get(key) is not None:
            small[key] = ("pad_token_id", "bos_token_id", "eos_token_id").index(key)
    return small


def _shrink_vision(tree: dict[str, Any], deepstack: int, text_width: int, stages: int) -> dict[str, Any]:
    small = dict(tree)
    heads_key = "num_attention_heads" if "num_attention_heads" in tree else "num_heads"
    layers_key = "num_hidden_layers" if "num_hidden_layers" in tree else "depth"
    heads = tree[heads_key]
    patch = 4
    small |= {
        layers_key: max(3, deepstack + 1, stages),
        "hidden_size": heads * 8,
        "intermediate_size": heads * 8,
        "patch_size": patch,
    }
    if isinstance(tree.get("image_size"), int):
        small["image_size"] = 4 * patch
    if "out_hidden_size" in tree:
        small["out_hidden_size"] = text_width
    if "num_position_embeddings" in tree:
        small["num_position_embeddings"] = 64
    if deepstack:
        small["deepstack_visual_indexes"] = list(range(deepstack))
    return small
