"""A model that lacks what the generic path needs is refused in one message; one that has it is told apart into modules."""

from typing import Any

import pytest
import torch
from support.families import FAMILIES
from transformers import AutoConfig, LlamaConfig, LlavaModel

from meshweave.config import LANGUAGE, parse_config
from meshweave.config.fields import MODULES
from meshweave.errors import ConfigError, LayoutError
from meshweave.model.blueprint import blueprint_of
from meshweave.model.check import check_model
from meshweave.model.families import sliceable
from meshweave.model.modules import ENCODERS, graph_of


def graph(family: str) -> Any:
    return graph_of(blueprint_of(FAMILIES[family](), torch.float32))


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("llava", {"vision": ("model.vision_tower", "model.multi_modal_projector")}),
        ("qwen2_audio", {"audio": ("model.audio_tower", "model.multi_modal_projector")}),
        ("qwen2_5_omni", {"vision": ("model.visual",), "audio": ("model.audio_tower",)}),
        ("gemma4", {"vision": ("model.vision_tower", "model.embed_vision")}),
    ],
)
def test_encoders_are_those_that_the_config_describes(family: str, modules: dict[str, tuple[str, ...]]) -> None:
    children = graph(family).children
    assert {name: found for name, found in children.items() if name != "language"} == modules


def test_a_parameter_of_the_base_model_itself_goes_to_the_encoder() -> None:
    found = graph("llava_next")
    assert "model.image_newline" in found.parameters("vision")
    assert "model.image_newline" not in found.parameters("language")


def test_a_model_that_takes_no_encoder_outputs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, input_ids: Any = None, pixel_values: Any = None) -> None: ...

    monkeypatch.setattr(LlavaModel, "forward", forward)
    with pytest.raises(LayoutError, match=r"does not accept encoder outputs computed elsewhere \(`mm_encoder_outputs`\)"):
        graph("llava")


def test_a_getter_that_wants_what_no_dataset_gives_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_image_features(self: Any, pixel_values: Any, aspect: Any, **kwargs: Any) -> None: ...

    monkeypatch.setattr(LlavaModel, "get_image_features", get_image_features)
    with pytest.raises(LayoutError, match="its vision encoder also wants aspect, which is not built yet"):
        graph("llava")


def run_of(*modules: str) -> Any:
    return parse_config(
        {
            "model": "unused",
            "modules": {name: {"ranks": 0} for name in modules},
            "train": {"steps": 1, "batch_size": 4},
        }
    )


def test_a_model_without_media_is_refused() -> None:
    with pytest.raises(ConfigError, match="transformers knows no model of media and text of type 'llama'"):
        check_model(run_of("vision", "language"), LlamaConfig())


def test_token_types_of_unknown_meaning_are_refused() -> None:
    text = {"model_type": "gemma", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    config = AutoConfig.for_model("paligemma", text_config=text | {"intermediate_size": 32, "vocab_size": 64})
    with pytest.raises(LayoutError, match="its forward wants `token_type_ids`, whose meaning is known for gemma3 only"):
        graph_of(blueprint_of(config, torch.float32))


def test_a_model_whose_encoder_is_not_separate_is_refused() -> None:
    with pytest.raises(LayoutError, match="base has `language_model` and `get_image_features` or `get_audio_features`"):
        graph_of(blueprint_of(AutoConfig.for_model("fuyu"), torch.float32))


def test_an_audio_model_has_no_vision_module() -> None:
    with pytest.raises(ConfigError, match=r"modules\.vision: a qwen2_audio model has no such module; it has audio, language"):
        check_model(run_of("vision", "audio", "language"), FAMILIES["qwen2_audio"]())


def test_an_unproven_model_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("meshweave.model.check.PROVEN", frozenset())
    check_model(run_of("vision", "language"), FAMILIES["llava"]())
    assert "`meshweave verify --shrink` shows whether it holds" in caplog.text


def test_a_model_with_linear_attention_says_why_its_sequence_cannot_be_cut() -> None:
    reasons = {family: sliceable(make().get_text_config()) for family, make in FAMILIES.items()}
    assert {family for family, reason in reasons.items() if reason} == {"qwen3_5"}
    assert reasons["qwen3_5"] == "qwen3_5_text has linear_attention layers, which carry a state along the sequence"


def test_a_run_file_knows_the_modules_that_models_have() -> None:
    assert set(MODULES) == {LANGUAGE, *ENCODERS}
