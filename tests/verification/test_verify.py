"""Every layout trains the same model as one process: loss, every gradient, and the weights after two steps."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.models import CONFIGS, write_model_folder
from support.runs import STEPS, TextOnly, module, run_of, verified

from meshweave.config import RunConfig
from meshweave.data.loader import Loader
from meshweave.data.quickstart import DigitsSource, build_model_folder
from meshweave.data.synthetic import SyntheticDataset
from meshweave.model.blueprint import read_model_config
from meshweave.model.weights import fill_seeded
from meshweave.parallel.build import LocalModel
from meshweave.schedule.schedule import Schedule
from meshweave.sequence.grid import SequenceRule
from meshweave.step.gradients import local_gradients, scale_gradients
from meshweave.step.loading import build_loader
from meshweave.step.run import Totals, run_step
from meshweave.world import World

PAIRS = {
    "one rank": (module("0"), module("0")),
    "homogeneous dp4": (module("0-3", dp=4), module("0-3", dp=4)),
    "homogeneous tp2 dp2": (module("0-3", dp=2, tp=2), module("0-3", dp=2, tp=2)),
    "vision dp4, language tp2 dp2": (module("0-3", dp=4), module("0-3", dp=2, tp=2)),
    "vision tp4, language dp4": (module("0-3", tp=4), module("0-3", dp=4)),
    "vision tp2 dp2, language dp4": (module("0-3", dp=2, tp=2), module("0-3", dp=4)),
    "vision dp2, language tp2": (module("0-1", dp=2), module("0-1", tp=2)),
    "replicated dp4, replicated tp2 dp2": (
        module("0-3", dp=4, data_parallel="replicate"),
        module("0-3", dp=2, tp=2, data_parallel="replicate"),
    ),
    "sharded tp2 dp2, replicated dp4": (module("0-3", dp=2, tp=2), module("0-3", dp=4, data_parallel="replicate")),
    "three into two": (module("0-2", dp=3), module("0-1", dp=2)),
    "language before vision": (module("2-3", dp=2), module("0-1", tp=2)),
    "disjoint 3 to 1": (module("0-2", dp=3), module("3")),
    "disjoint 1 to 3": (module("3"), module("0-2", dp=3)),
    "overlapping": (module("0-2", dp=3), module("2-3", tp=2)),
}


@pytest.mark.parametrize(
    ("family", "pair"), [("llava", pair) for pair in PAIRS] + [("qwen3_vl", pair) for pair in list(PAIRS)[2::4]]
)
def test_a_layout_pair_equals_the_single_process_in_float64(family: str, pair: str, tmp_path: Path) -> None:
    vision, language = PAIRS[pair]
    report = verified(run_of(write_model_folder(CONFIGS[family](), tmp_path), vision, language))
    assert report.passed, report
    assert report.samples == 10 * STEPS
    assert report.media_items > 10 * STEPS
    assert report.parameters > 80


@pytest.mark.parametrize(
    ("family", "pair"), [("llava", "vision tp2 dp2, language dp4"), ("qwen3_vl", "replicated dp4, replicated tp2 dp2")]
)
def test_a_layout_pair_equals_the_single_process_in_float32(family: str, pair: str, tmp_path: Path) -> None:
    vision, language = PAIRS[pair]
    folder = write_model_folder(CONFIGS[family](), tmp_path)
    report = verified(run_of(folder, vision, language, dtype="float32", train={"microbatches": 1}))
    assert report.passed, report


@pytest.mark.parametrize("pair", ["vision dp4, language tp2 dp2", "vision tp2 dp2, language dp4"])
def test_window_attention_and_gated_towers_equal_the_single_process(pair: str, tmp_path: Path) -> None:
    report = verified(run_of(write_model_folder(CONFIGS["qwen2_5_vl"](), tmp_path), *PAIRS[pair]), steps=2)
    assert report.passed, report


@pytest.mark.parametrize("family", ["llava", "llava_siglip", "qwen3_vl"])
def test_pretrained_weights_train_as_from_pretrained_would_load_them(family: str, tmp_path: Path) -> None:
    folder = write_model_folder(CONFIGS[family](), tmp_path, weights=True)
    vision, language = PAIRS["vision tp2 dp2, language dp4"]
    report = verified(run_of(folder, vision, language, weights="pretrained"), steps=2)
    assert report.passed, report


@pytest.mark.parametrize(("family", "weights"), [("llava", "seeded"), ("qwen3_vl", "pretrained")])
def test_tied_embeddings_stay_tied(family: str, weights: str, tmp_path: Path) -> None:
    folder = write_model_folder(CONFIGS[family](tied=True), tmp_path, weights=weights == "pretrained")
    report = verified(run_of(folder, *PAIRS["vision dp4, language tp2 dp2"], weights=weights), steps=2)
    assert report.passed, report


@pytest.mark.parametrize("microbatches", [1, 5])
def test_any_number_of_microbatches_gives_the_same_gradients(microbatches: int, tmp_path: Path) -> None:
    """Five microbatches of one sample a lane: some have no media at all, and some lanes none."""
    folder = write_model_folder(CONFIGS["qwen3_vl"](), tmp_path)
    train = {"microbatches": microbatches}
    report = verified(run_of(folder, module("0-3", dp=4), module("0-3", dp=2, tp=2), train=train), steps=2)
    assert report.passed, report


def test_planned_lanes_are_in_fact_ragged() -> None:
    """What the table above relies on: text-only samples, single images, seven images, and unequal lanes."""
    dataset = SyntheticDataset(CONFIGS["qwen3_vl"](), 64, seed=3)
    counts = {len(dataset.meta(index).media) for index in range(20)}
    assert {0, 1, 7} <= counts
    assert len({item.tokens for index in range(20) for item in dataset.meta(index).media}) > 3


def test_a_gradient_scaled_by_two_in_one_module_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(model: LocalModel, *args: Any, **options: Any) -> Totals:
        totals = run_step(model, *args, **options)
        scale_gradients({"vision": model.modules["vision"]}, 2.0)
        return totals

    monkeypatch.setattr("meshweave.verification.compare.run_step", doubled)
    report = verified(run_of(write_model_folder(CONFIGS["llava"](), tmp_path), *PAIRS["vision dp4, language tp2 dp2"]), steps=1)
    assert not report.passed
    assert report.gradient.error == pytest.approx(1.0, rel=1e-6)
    assert report.gradient.name.startswith(("model.vision_tower", "model.multi_modal_projector"))
    assert report.loss.error < report.tolerance


def test_two_swapped_images_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Swapped(SyntheticDataset):
        """The images of samples with one image go to the next such sample; tokens and shapes stay as they were."""

        def media(self, index: int, slot: int) -> dict[str, Any]:
            return super().media((index + 4) % len(self) if index % 4 == 0 else index, slot)

    def build_swapped(
        run: RunConfig, dataset: SyntheticDataset, world: World, schedule: Schedule, rule: SequenceRule, **options: Any
    ) -> Loader:
        return build_loader(run, Swapped(read_model_config(run.model), len(dataset), seed=3), world, schedule, rule, **options)

    monkeypatch.setattr("meshweave.verification.compare.build_loader", build_swapped)
    report = verified(run_of(write_model_folder(CONFIGS["llava"](), tmp_path), *PAIRS["vision dp4, language tp2 dp2"]), steps=1)
    assert not report.passed
    assert report.gradient.error > 1e-3


def test_a_missing_sum_over_tp_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshweave.step.run.sum_partial_gradients", lambda module, mesh: None)
    report = verified(run_of(write_model_folder(CONFIGS["llava"](), tmp_path), *PAIRS["vision dp4, language tp2 dp2"]), steps=1)
    assert not report.passed
    # Of norms, whose gradients cover this rank's heads or tokens alone.
    assert "norm.weight" in report.gradient.name


def test_wrong_initial_weights_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank initialises from another seed: its shards differ from what the plain model starts from."""

    def other_seed(targets: Any, blueprint: Any, folder: Path) -> None:
        fill_seeded(targets, blueprint, seed=1)

    monkeypatch.setattr("meshweave.parallel.build.fill_pretrained", other_seed)
    folder = write_model_folder(CONFIGS["llava"](), tmp_path, weights=True)
    report = verified(run_of(folder, *PAIRS["homogeneous dp4"], weights="pretrained"), steps=1)
    assert not report.passed
    assert report.loss.error > 1e-3


def test_steps_without_any_media_leave_the_encoder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshweave.verification.compare.SyntheticDataset", TextOnly)
    folder = write_model_folder(CONFIGS["llava"](), tmp_path)
    report = verified(run_of(folder, *PAIRS["vision dp4, language tp2 dp2"]), steps=2)
    assert report.passed, report
    assert report.media_items == 0


def test_ranks_may_idle_if_the_run_file_says_so(tmp_path: Path) -> None:
    folder = write_model_folder(CONFIGS["llava"](), tmp_path)
    report = verified(run_of(folder, module("0,3", dp=2), module("1,3", tp=2), idle_ranks="2,4"), steps=2)
    assert report.passed, report


@pytest.mark.parametrize("language", [module("0-1", tp=2), module("0-1", dp=2, data_parallel="replicate")])
def test_a_replica_that_drifts_away_is_found(language: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drifting(model: LocalModel, step: Any, world: World, *args: Any, **options: Any) -> Totals:
        totals = run_step(model, step, world, *args, **options)
        norm = model.modules["language"].parameters["model.language_model.norm.weight"]
        if world.rank == 1:
            local_gradients([norm])[0].mul_(-5.0)
        return totals

    monkeypatch.setattr("meshweave.verification.compare.run_step", drifting)
    report = verified(run_of(write_model_folder(CONFIGS["llava"](), tmp_path), module("0-1", dp=2), language), steps=1)
    assert not report.passed
    assert "replica on rank 1" in report.gradient.name


def test_verify_of_data_with_a_broken_picture_compares_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_model_folder(folder)
    pictures = DigitsSource("train", samples=16)
    (tmp_path / "images").mkdir()
    entries = []
    for index in range(16):
        names = [f"{index}-{slot}.png" for slot in range(len(pictures[index].media))]
        for name, media in zip(names, pictures[index].media, strict=True):
            media.load().save(tmp_path / "images" / name)
        text = next(part["text"] for part in pictures[index].messages[0]["content"] if part["type"] == "text")
        question = "<image>" * len(names) + text
        answer = pictures[index].messages[1]["content"][0]["text"]
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        entries.append({"id": str(index), "image": names, "conversations": turns})
    broken = next(entry["image"][0] for entry in entries if entry["image"])
    (tmp_path / "images" / broken).write_bytes((tmp_path / "images" / broken).read_bytes()[:60])
    (tmp_path / "data.json").write_text(json.dumps(entries))
    data = {"source": "files", "path": str(tmp_path / "data.json"), "images": str(tmp_path / "images")}
    train = {"batch_size": 16, "microbatches": 2}
    run = run_of(folder, module("0-1", dp=2), module("0-1", tp=2), data=data, train=train, weights="pretrained")
    report = verified(run, steps=2)
    assert report.passed, report
    assert report.samples == 2 * 15
