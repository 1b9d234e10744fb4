"""What does each layer of a language model let a query see? Read from its config, as the family's modeling file reads it."""

from transformers import PreTrainedConfig

from meshweave.errors import LayoutError
from meshweave.sequence import Mask

_EVERY_LAYER = frozenset({"ministral3", "mistral", "mixtral", "phi3", "phimoe", "qwen3_moe", "starcoder2"})
"""transformers gives each layer of these the config's `sliding_window`, whatever its `layer_types`."""

_NO_LAYER = frozenset({"gemma", "llama", "qwen3_vl_moe_text", "qwen3_vl_text"})
"""transformers gives no layer of these a window, whatever the config says."""

_UNSUPPORTED = {
    "gemma2": "soft-capped attention scores",
    "vaultgemma": "soft-capped attention scores",
    "gpt_oss": "attention sinks",
}


def layer_sizes(config: PreTrainedConfig, key: str) -> tuple[int, ...]:
    """The values that a key has in the layers of the text model with this config, ascending; none where it has no such key.

    Gemma 4's layers differ in some, and transformers then refuses to say what the config as a whole has.
    """
    layers = (config.per_layer_config[layer] for layer in range(config.num_hidden_layers))
    found = {getattr(layer, key, None) for layer in layers}
    return tuple(sorted(size for size in found if isinstance(size, int)))


def kv_head_counts(config: PreTrainedConfig) -> tuple[int, ...]:
    """The numbers of key-value heads that layers of the text model with this config have, ascending."""
    return layer_sizes(config, "num_key_value_heads") or layer_sizes(config, "num_attention_heads")


def masks_of(config: PreTrainedConfig) -> tuple[Mask, ...]:
    """One mask per layer of the text model with this config (`config.get_text_config()` of a multimodal model's).

    Raises LayoutError: a layer does something else than causal or two-way attention with or without a window, or it is not known
    whether the family reads the config's window.
    """
    family = config.model_type
    two_way = getattr(config, "use_bidirectional_attention", None)
    if two_way not in (None, False, "vision"):
        raise LayoutError(f"{family}: use_bidirectional_attention={two_way!r} lets text see what follows: that is not built")
    if family in _UNSUPPORTED:
        raise LayoutError(f"{family}: {_UNSUPPORTED[family]} are not built with packed or cut sequences")
    window = getattr(config, "sliding_window", None)
    masks = []
    for layer, kind in enumerate(_kinds(config, window)):
        if kind not in ("full_attention", "sliding_attention"):
            raise LayoutError(f"{family}: layer {layer} is of type {kind!r}, which cannot work on packed or cut sequences yet")
        sliding = window if kind == "sliding_attention" else None
        # See `Mask`: of the families whose images are two-way, Gemma 4's are in layers with a window only.
        spans = family == "gemma3_text" or (two_way == "vision" and kind == "sliding_attention")
        masks.append(Mask(sliding, spans))
    return tuple(masks)


def _kinds(config: PreTrainedConfig, window: int | None) -> list[str]:
    """The type of each layer."""
    layers: int = config.num_hidden_layers
    types = getattr(config, "layer_types", None)
    if config.model_type in _NO_LAYER or (window is None and types is None):
        return ["full_attention"] * layers
    if config.model_type in _EVERY_LAYER:
        return ["sliding_attention"] * layers
    if types is None:
        raise LayoutError(
            f"{config.model_type}: sliding_window={window} without layer_types: it is not known which layers use it"
        )
    return list(types)
