"""A shrunk model is tiny, of the same architecture, and split by the same sizes."""

import pytest
import torch
from support.models import CONFIGS
from transformers import (
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    SiglipVisionConfig,
)

from meshweave.data.synthetic import SyntheticDataset
from meshweave.model.blueprint import blueprint_of
from meshweave.model.modules import graph_of
from meshweave.model.shrink import VOCABULARY, shrink

LARGE = {
    "llava": LlavaConfig(text_config=LlamaConfig(hidden_size=8192, num_attention_heads=64, num_key_value_heads=8)),
    "llava with siglip": LlavaConfig(vision_config=SiglipVisionConfig(), vision_feature_select_strategy="full"),
    "qwen2.5-vl": Qwen2_5_VLConfig(),
    "qwen3-vl": Qwen3VLConfig(),
}


def heads(config: PreTrainedConfig) -> tuple[int, ...]:
    text, vision = config.get_text_config(), config.vision_config
    return text.num_attention_heads, text.num_key_value_heads, vision.num_attention_heads


@pytest.mark.parametrize("name", LARGE)
def test_a_large_config_becomes_tiny_and_keeps_its_heads(name: str) -> None:
    large = LARGE[name]
    small = shrink(large)
    model = blueprint_of(small, torch.float32)
    assert graph_of(model).children.keys() == graph_of(blueprint_of(large, torch.float32)).children.keys()
    assert heads(small) == heads(large)
    assert small.model_type == large.model_type
    assert small.get_text_config().model_type == large.get_text_config().model_type
    assert sum(parameter.numel() for parameter in model.parameters()) < 5_000_000


@pytest.mark.parametrize("config", [*LARGE.values(), *(make() for make in CONFIGS.values())], ids=[*LARGE, *CONFIGS])
def test_random_samples_fit_the_small_vocabulary(config: PreTrainedConfig) -> None:
    small = shrink(config)
    ids = [token for index in range(8) for token in SyntheticDataset(small, 8).text(index)[0].tolist()]
    assert max(ids) < VOCABULARY
    assert small.image_token_id in ids
