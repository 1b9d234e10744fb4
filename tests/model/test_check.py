"""A run file that does not fit its model is refused in one message that says why."""

from typing import Any

import pytest
from support.models import llava, llava_moe, qwen2_5_vl, qwen3_vl

from meshweave.config import RunConfig, parse_config
from meshweave.errors import ConfigError, LayoutError
from meshweave.model.check import check_executable, check_model

TRAIN = {"steps": 1, "batch_size": 4}


def run_of(vision: dict | None = None, language: dict | None = None, **top: Any) -> RunConfig:
    modules = {"vision": {"ranks": 0} | (vision or {}), "language": {"ranks": 0} | (language or {})}
    return parse_config({"model": "unused", "weights": "seeded", "modules": modules, "train": TRAIN, **top})


def test_pipelines_of_every_module_fit(tmp_path: Any) -> None:
    run = run_of({"ranks": "0-2", "pp": 3}, {"ranks": "0-1", "pp": 2, "frozen": ["norm"]}, output=str(tmp_path))
    check_model(run, qwen3_vl())
    check_executable(run, qwen3_vl())


def test_more_stages_than_blocks_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"modules\.language\.pp=3: more stages than the module's 2 blocks; use at most 2"):
        check_model(run_of({"ranks": "0-2", "dp": 3}, {"ranks": "0-2", "pp": 3}), llava())


def test_a_frozen_text_that_names_nothing_is_refused_with_an_example() -> None:
    with pytest.raises(
        ConfigError, match=r"modules\.vision\.frozen: no .* contains 'visoin'; names look like model\.vision_tower\."
    ):
        check_model(run_of({"frozen": ["embeddings", "visoin"]}), llava())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            None,
            r"mrope_section=\[16, 24, 24\] of qwen2_5_vl_text, which its class takes as config.json does not say: heads cannot",
        ),
        ([1, 1, 1], r"mrope_section=\[1, 1, 1\] of qwen2_5_vl_text: heads cannot be shared so \(.*\); give three numbers"),
    ],
)
def test_sections_of_positions_that_do_not_make_up_a_head_are_refused(section: list[int] | None, message: str) -> None:
    config = qwen2_5_vl()
    rope = config.text_config.rope_parameters
    changed = {key: value for key, value in (rope | {"mrope_section": section}).items() if value is not None}
    config.text_config.rope_parameters = changed
    with pytest.raises(ConfigError, match=message):
        check_model(run_of(), config)


@pytest.mark.parametrize("frozen", [True, ["model.", "lm_head"]])
def test_a_run_that_trains_nothing_is_refused(frozen: Any) -> None:
    with pytest.raises(ConfigError, match="`frozen` leaves nothing to train"):
        check_model(run_of({"frozen": True}, {"frozen": frozen}), llava())


@pytest.mark.parametrize(
    ("language", "message"),
    [
        ({"ranks": "0-2", "ep": 3}, r"modules\.language\.ep=3: does not divide the 4 experts of qwen3_moe; use a divisor of it"),
        ({"ranks": "0-4", "etp": 5}, r"modules\.language\.etp=5: does not divide the width 24 of an expert of qwen3_moe"),
        (
            {"ranks": "0-5", "ep": 2},
            r"modules\.language: the 3 data-parallel copies of the experts .* hidden width 32; use",
        ),
        (
            {"ranks": "0-1", "tp": 2, "sequence_parallel": False},
            r"modules\.language\.tp=2: a model with experts needs sequence_parallel: true there; take the key out",
        ),
    ],
)
def test_experts_that_cannot_be_split_so_are_refused(language: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model(run_of(language=language), llava_moe())


def test_three_copies_of_experts_may_be_replicas(tmp_path: Any) -> None:
    run = run_of(language={"ranks": "0-5", "ep": 2, "data_parallel": "replicate"}, output=str(tmp_path))
    check_model(run, llava_moe())
    check_executable(run, llava_moe())


def test_expert_sizes_of_what_has_no_experts_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        check_model(
            run_of({"ranks": "0-1", "ep": 2}, {"ranks": "0-1", "etp": 2}, train=TRAIN | {"router_aux_loss": 0.1}), llava()
        )
    assert "modules.vision.ep=2: a clip_vision_model model has no experts; set it to 1" in str(caught.value)
    assert "modules.language.etp=2: a qwen3 model has no experts; set it to 1" in str(caught.value)
    assert "train.router_aux_loss=0.1: a qwen3 model has no experts" in str(caught.value)
