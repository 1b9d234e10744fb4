"""A run file that does not fit its model is refused in one message that says why."""

from typing import Any

import pytest
from support.models import llava, qwen3_vl

from meshweave.config import RunConfig, parse_config
from meshweave.errors import ConfigError, LayoutError
from meshweave.model.check import check_executable, check_model


def run_of(vision: dict | None = None, language: dict | None = None, **top: Any) -> RunConfig:
    modules = {"vision": {"ranks": 0} | (vision or {}), "language": {"ranks": 0} | (language or {})}
    train = {"steps": 1, "batch_size": 4}
    return parse_config({"model": "unused", "weights": "seeded", "modules": modules, "train": train, **top})


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


@pytest.mark.parametrize("frozen", [True, ["model.", "lm_head"]])
def test_a_run_that_trains_nothing_is_refused(frozen: Any) -> None:
    with pytest.raises(ConfigError, match="`frozen` leaves nothing to train"):
        check_model(run_of({"frozen": True}, {"frozen": frozen}), llava())
