"""A shrunk model is tiny, of the same architecture, and split by the same sizes."""

import pytest
import torch
from support.families import FAMILIES
from support.models import CONFIGS
from transformers import (
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    SiglipVisionConfig,
)

from meshweave.config import RunConfig, parse_config
from meshweave.data.synthetic import SyntheticDataset
from meshweave.model.blueprint import auto_class, blueprint_of
from meshweave.model.check import check_model
from meshweave.model.modules import graph_of
from meshweave.model.shrink import VOCABULARY, shrink, shrink_run
from meshweave.model.stages import stage_cuts
from meshweave.verification.oracle import stock_batch

LARGE = {
    "llava": LlavaConfig(text_config=LlamaConfig(hidden_size=8192, num_attention_heads=64, num_key_value_heads=8)),
    "llava with siglip": LlavaConfig(vision_config=SiglipVisionConfig(), vision_feature_select_strategy="full"),
    "qwen2.5-vl": Qwen2_5_VLConfig(),
    "qwen3-vl": Qwen3VLConfig(),
    "llava with experts": LlavaConfig(text_config=Qwen3MoeConfig()),
}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_5_omni", "qwen3_vl", "qwen3_omni_moe", "qwen3_5"])
def test_sections_of_positions_that_the_class_alone_knows_shrink_with_the_heads(family: str) -> None:
    config = FAMILIES[family]()
    rope = config.text_config.rope_parameters
    config.text_config.rope_parameters = {key: value for key, value in rope.items() if key != "mrope_section"}
    small = shrink(config)
    check_model(shrunk_run(small), small)
    assert sum(small.text_config.rope_parameters["mrope_section"]) == 8


def shrunk_run(config: PreTrainedConfig) -> RunConfig:
    modules = {name: {"ranks": 0} for name in graph_of(blueprint_of(config, torch.float32)).children}
    return parse_config({"model": "unused", "weights": "seeded", "modules": modules, "train": {"steps": 1, "batch_size": 2}})


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
    assert sum(parameter.numel() for parameter in model.parameters()) < 10_000_000


@pytest.mark.parametrize("config", [*LARGE.values(), *(make() for make in CONFIGS.values())], ids=[*LARGE, *CONFIGS])
def test_random_samples_fit_the_small_vocabulary(config: PreTrainedConfig) -> None:
    small = shrink(config)
    ids = [token for index in range(8) for token in SyntheticDataset(small, 8).text(index)[0].tolist()]
    assert max(ids) < VOCABULARY
    assert small.image_token_id in ids


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shrunk_model_of_any_family_takes_its_samples(family: str) -> None:
    small = shrink(FAMILIES[family](), {"language": 2})
    model = auto_class(small).from_config(small, dtype=torch.float32)
    inputs, _ = stock_batch(model, SyntheticDataset(small, 4, most_items=3), [0, 1, 2, 3])
    assert model(**inputs, use_cache=False).logits.isfinite().all()
    assert small.get_text_config().vocab_size == VOCABULARY
    types = getattr(FAMILIES[family]().get_text_config(), "layer_types", None) or ()
    assert set(types) == set(getattr(small.get_text_config(), "layer_types", None) or ())


@pytest.mark.parametrize("name", LARGE)
def test_a_shrunk_run_keeps_its_pipelines_and_cuts_them_anew(name: str) -> None:
    blocks = LARGE[name].get_text_config().num_hidden_layers
    run = parse_config(
        {
            "model": "unused",
            "modules": {
                "vision": {"ranks": "0-5", "pp": 6},
                "language": {"ranks": "0-5", "pp": 6, "layers": [*[1] * 11, blocks - 11]},
            },
            "schedule": {"language": "interleaved", "virtual_stages": 2},
            "train": {"steps": 1, "batch_size": 4},
        }
    )
    small, config = shrink_run(run, LARGE[name])
    cuts = stage_cuts(small, graph_of(blueprint_of(config, torch.float32)))
    assert {module: len(cut) for module, cut in cuts.items()} == {"vision": 6, "language": 12}
    assert (small.weights, small.data) == ("seeded", None)


def test_a_shrunk_run_keeps_its_experts_and_their_slices() -> None:
    language = {"ranks": "0-5", "ep": 2, "etp": 3, "data_parallel": "replicate"}
    modules = {"vision": {"ranks": "0"}, "language": language}
    run = parse_config({"model": "unused", "modules": modules, "train": {"steps": 1, "batch_size": 6}})
    small, config = shrink_run(run, LARGE["llava with experts"])
    check_model(small, config)
    assert config.text_config.num_experts == LARGE["llava with experts"].text_config.num_experts
