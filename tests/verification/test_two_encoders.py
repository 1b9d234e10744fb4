"""A model with two encoders trains in any placement as one process trains it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.models import write_model_folder
from support.runs import module, run_of, verified
from support.two_towers import ImagesAndSounds, TwoTowersForConditionalGeneration, two_towers
from transformers import AutoModelForImageTextToText

from meshweave.config import RunConfig
from meshweave.errors import ConfigError
from meshweave.model.blueprint import blueprint_of, read_model_config
from meshweave.model.check import check_model
from meshweave.model.modules import graph_of
from meshweave.preview.inspect import inspect_run
from meshweave.train.trainer import train
from meshweave.world import launch

PLACEMENTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "all on one rank": (module("0"), module("0"), module("0"), {}),
    "different layouts on the same ranks": (module("0-1", tp=2), module("0-1", dp=2), module("0-1", dp=2), {}),
    "three sets of ranks": (module("0-1", dp=2), module("2"), module("3-4", pp=2), {}),
    "three sets, tp2 and pp2": (module("0-1", pp=2), module("2-3", tp=2), module("4", dp=1), {}),
    "audio on a language rank, vision elsewhere": (module("0"), module("1"), module("1-2", pp=2), {}),
    "colocated with pp2": (module("0-1", dp=2), module("0-1", tp=2), module("0-1", pp=2), {"macro_batch": 1}),
    "colocated pipelines": (module("0-1", dp=2), module("0-1", pp=2), module("0-1", pp=2), {"language": "zero_bubble"}),
    "nested in pp2": (module("0-1", dp=2), module("0-1", dp=2), module("0-1", pp=2), {"encoders": "nested"}),
    "nested in pp2, audio across stages": (
        module("0-1", dp=2),
        module("0-1", tp=2),
        module("0-1", pp=2),
        {"encoders": "nested"},
    ),
    "frozen audio": (module("0"), module("1", frozen=True), module("0-1", pp=2), {}),
}


def run_on(placement: str, folder: Path, **changes: Any) -> RunConfig:
    vision, audio, language, schedule = PLACEMENTS[placement]
    write_model_folder(two_towers(), folder)
    return run_of(folder, vision, language, modules={"audio": audio}, schedule=schedule, **changes)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_two_encoders_equal_the_single_process(placement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshweave.verification.compare.SyntheticDataset", ImagesAndSounds)
    report = verified(run_on(placement, tmp_path, train={"microbatches": 3}), steps=2)
    assert report.passed, report
    assert report.samples == 20
    assert report.media_items > 20


def test_the_modules_of_two_towers_are_told_apart() -> None:
    graph = graph_of(blueprint_of(two_towers(), torch.float32))
    assert graph.children == {
        "vision": ("model.vision_tower", "model.multi_modal_projector"),
        "audio": ("model.audio_tower", "model.audio_projector"),
        "language": ("model.language_model", "lm_head"),
    }


def test_a_run_file_must_place_the_second_encoder() -> None:
    with pytest.raises(ConfigError, match=r"modules\.audio: missing; give this module of the model ranks"):
        check_model(run_of(Path("unused"), module("0"), module("0")), two_towers())


def test_a_run_with_two_encoders_trains_evaluates_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshweave.data.build.SyntheticDataset", ImagesAndSounds)
    data = {"source": "synthetic", "eval_samples": 6}
    run = run_on("nested in pp2", tmp_path / "model", data=data, train={"steps": 3}, output=str(tmp_path / "out"))
    config = read_model_config(run.model)
    inspect_run(run, Console(quiet=True))
    summary = launch(run, lambda world, run: train(world, run, config))
    assert summary is not None
    assert summary.evaluated == 6
    assert summary.flops["audio"] > 0 < summary.crossings["audio"].forward_bytes
    written = AutoModelForImageTextToText.from_pretrained(summary.model)
    assert type(written) is TwoTowersForConditionalGeneration
    assert all(value.isfinite().all() for value in written.parameters())
