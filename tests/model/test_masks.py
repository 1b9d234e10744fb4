"""The masks read from a config are those that transformers builds from it."""

from typing import Any

import pytest
from transformers import (
    AutoConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLTextConfig,
)

from meshweave.errors import LayoutError
from meshweave.model.masks import kv_head_counts, masks_of
from meshweave.sequence import Mask


@pytest.mark.parametrize(
    ("config", "masks"),
    [
        (LlamaConfig(num_hidden_layers=2, sliding_window=7), [Mask(), Mask()]),
        (Qwen3VLTextConfig(num_hidden_layers=1, sliding_window=7), [Mask()]),
        (MistralConfig(num_hidden_layers=2, sliding_window=7), [Mask(7), Mask(7)]),
        (MistralConfig(num_hidden_layers=1, sliding_window=None), [Mask()]),
        (Qwen3MoeConfig(num_hidden_layers=1, sliding_window=7), [Mask()]),
        (Qwen3MoeConfig(num_hidden_layers=1, sliding_window=7, use_sliding_window=True), [Mask(7)]),
        (Qwen2Config(num_hidden_layers=2, sliding_window=7, max_window_layers=1), [Mask(), Mask()]),
        (Qwen2Config(num_hidden_layers=2, sliding_window=7, max_window_layers=1, use_sliding_window=True), [Mask(), Mask(7)]),
        (Gemma3TextConfig(num_hidden_layers=6, sliding_window=7), [*[Mask(7, True)] * 5, Mask(None, True)]),
        (Gemma4TextConfig(num_hidden_layers=6, sliding_window=7), [*[Mask(7)] * 5, Mask()]),
        (
            Gemma4TextConfig(num_hidden_layers=6, sliding_window=7, use_bidirectional_attention="vision"),
            [*[Mask(7, True)] * 5, Mask()],
        ),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_each_layer_has_the_mask_of_its_family(config: PreTrainedConfig, masks: list[Mask]) -> None:
    assert list(masks_of(config)) == masks


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
        ("gemma2", {}, "soft-capped"),
        ("gpt_oss", {}, "attention sinks"),
        ("qwen3_5_text", {}, "layer 0 is of type 'linear_attention'"),
        ("granite", {"sliding_window": 7}, "not known which layers"),
    ],
)
def test_attention_that_is_not_built_is_refused_by_name(family: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        masks_of(AutoConfig.for_model(family, **keys))


def test_layers_may_have_different_numbers_of_key_value_heads() -> None:
    gemma = Gemma4TextConfig(
        num_attention_heads=4, num_key_value_heads=2, num_global_key_value_heads=1, num_hidden_layers=6, attention_k_eq_v=True
    )
    assert kv_head_counts(gemma) == (1, 2)
    assert kv_head_counts(Qwen3Config(num_attention_heads=8, num_key_value_heads=4)) == (4,)
