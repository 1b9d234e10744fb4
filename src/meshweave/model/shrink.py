"""What is the smallest model of the same architecture? For checking the layout of a large run on a laptop."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

VOCABULARY = 256


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """A tiny config of the same architecture and the same numbers of attention heads, so that the same `tp` divides it.

    Layers, widths, image size and vocabulary become small; special token ids move into the small vocabulary.
    """
    tree = config.to_dict()
    deepstack = tree["vision_config"].get("deepstack_visual_indexes") or ()
    text = tree["text_config"] = _shrink_text(tree["text_config"], layers=max(2, len(deepstack)))
    tree["vision_config"] = _shrink_vision(tree["vision_config"], len(deepstack), text["hidden_size"])
    names = [key for key in tree if key.endswith(("_token_id", "_token_index")) and isinstance(tree[key], int)]
    tree |= {name: number for number, name in enumerate(sorted(names), start=3)}
    return AutoConfig.for_model(**tree)


def _shrink_text(tree: dict[str, Any], layers: int) -> dict[str, Any]:
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
        "intermediate_size": heads * 4,
        "vocab_size": VOCABULARY,
    }
    if tree.get("layer_types"):
        small["layer_types"] = tree["layer_types"][:layers]
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if small.get(key) is not None:
            small[key] = ("pad_token_id", "bos_token_id", "eos_token_id").index(key)
    return small


def _shrink_vision(tree: dict[str, Any], deepstack: int, text_width: int) -> dict[str, Any]:
    small = dict(tree)
    heads_key = "num_attention_heads" if "num_attention_heads" in tree else "num_heads"
    layers_key = "num_hidden_layers" if "num_hidden_layers" in tree else "depth"
    heads = tree[heads_key]
    patch = 4
    small |= {layers_key: max(3, deepstack + 1), "hidden_size": heads * 8, "intermediate_size": heads * 8, "patch_size": patch}
    if isinstance(tree.get("image_size"), int):
        small["image_size"] = 4 * patch
    if "out_hidden_size" in tree:
        small["out_hidden_size"] = text_width
    if "num_position_embeddings" in tree:
        small["num_position_embeddings"] = 64
    if deepstack:
        small["deepstack_visual_indexes"] = list(range(deepstack))
    return small
