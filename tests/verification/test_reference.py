"""What a run gets wrong in its optimizer, its schedule, its targets or its inputs, `verify` finds: the reference has its own."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.folders import IMAGE_FAMILIES, model_folder
from support.runs import module, run_of, verified
from torch.optim import AdamW

from meshweave.config import TrainConfig
from meshweave.data.build import build_datasets
from meshweave.data.dataset import IGNORE
from meshweave.data.processed import ProcessedDataset
from meshweave.data.targets import Answers
from meshweave.model.blueprint import read_model_config
from meshweave.train import optimizer
from meshweave.verification import compare
from meshweave.verification.compare import VerifyReport
from meshweave.verification.reference_data import stock_sample
from meshweave.verification.reference_update import rate_at

ONE = module("0"), module("0")
TALK = [
    {"from": "human", "value": "<image>\nWhat is in this image?"},
    {"from": "gpt", "value": "A cat. "},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "Yes, a picture of a cat."},
]
RECORDS = [
    {"image": "a.png", "conversations": TALK},
    {"image": "b.png", "system": "Be terse.", "conversations": TALK[:2]},
    {"conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "The answer."}]},
    {"image": "b.png", "conversations": [*TALK[:3], TALK[3] | {"loss": False}]},
    {
        "conversations": [
            {"from": "human", "value": "Why?"},
            {"from": "gpt", "value": "<think>\nFur.\n</think>\n\nA cat."},
            *TALK[2:],
        ]
    },
    {"conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "This one.", "loss": True}]},
]


def with_data(folder: Path, family: str = "llava", **data: Any) -> dict[str, Any]:
    """A folder of a family, and data, as a run file names them."""
    for name, size in (("a.png", (40, 30)), ("b.png", (90, 50))):
        Image.effect_noise(size, 60).convert("RGB").save(folder / name)
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    model_folder(family, folder / "model")
    return {"path": str(folder / "data.jsonl"), **data}


def report_of(folder: Path, *, steps: int = 2, layout: Any = ONE, family: str = "llava", **options: Any) -> VerifyReport:
    data = with_data(folder, family, **options.pop("data", {}))
    train = {"batch_size": 6, "microbatches": 1, "weight_decay": 0.1, "warmup_steps": 3, "steps": 6} | options.pop("train", {})
    vision, language = layout
    run = run_of(folder / "model", vision | options.pop("vision", {}), language, data=data, train=train, **options)
    return verified(run, steps=steps)


def test_a_right_run_of_every_rule_passes(tmp_path: Path) -> None:
    report = report_of(tmp_path, steps=5, vision={"lr": 3e-4}, train={"max_grad_norm": 0.01, "min_lr_ratio": 0.2})
    assert report.passed, report
    assert report.shared.startswith("reading of records and pictures")


@pytest.mark.parametrize("train_on", ["last", "flagged"])
def test_a_right_run_of_some_answers_passes(train_on: str, tmp_path: Path) -> None:
    """A step in which no record flags an answer with yes has nothing to learn, and makes no update, under `flagged`."""
    report = report_of(tmp_path, data={"train_on": train_on})
    assert report.passed, report


def wrong_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    class Decaying(AdamW):
        def __init__(self, groups: Any, **options: Any) -> None:
            super().__init__([group | {"weight_decay": 0.1} for group in groups], **options)

    monkeypatch.setattr(optimizer, "AdamW", Decaying)


def no_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    class Still(AdamW):
        def __init__(self, groups: Any, **options: Any) -> None:
            super().__init__([group | {"weight_decay": 0.0} for group in groups], **options)

    monkeypatch.setattr(optimizer, "AdamW", Still)


def one_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "peak_rate", lambda run, module: run.train.lr)


def late_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    right = optimizer.rate_factor
    monkeypatch.setattr(optimizer, "rate_factor", lambda train, step: right(train, step + 1))


def swapped_betas(monkeypatch: pytest.MonkeyPatch) -> None:
    class Swapped(AdamW):
        def __init__(self, groups: Any, *, betas: Any, **options: Any) -> None:
            super().__init__(groups, betas=betas[::-1], **options)

    monkeypatch.setattr(optimizer, "AdamW", Swapped)


def unclipped(monkeypatch: pytest.MonkeyPatch) -> None:
    right = compare.finish_gradients
    monkeypatch.setattr(compare, "finish_gradients", lambda model, totals, most: right(model, totals, None))


WRONG_UPDATES: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "decay on norms and biases": (wrong_decay, "norm|bias"),
    "no decay": (no_decay, "weight"),
    "a module's rate ignored": (one_rate, "vision_tower|multi_modal_projector"),
    "warm-up off by one": (late_warm_up, r"\.weight|\.bias"),
    "betas swapped": (swapped_betas, r"\.weight|\.bias"),
    "not clipped": (unclipped, r"\.weight|\.bias"),
}


@pytest.mark.parametrize(("plant", "name"), WRONG_UPDATES.values(), ids=WRONG_UPDATES)
def test_a_wrong_update_is_found_by_the_weights(
    plant: Callable[[pytest.MonkeyPatch], None], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    # eps as large as gradients: to AdamW alone a common factor of all gradients would be nothing.
    report = report_of(tmp_path, vision={"lr": 3e-4}, train={"eps": 1e-3, "max_grad_norm": 0.01})
    assert not report.passed
    assert report.weight.error > 1e-6
    assert re.search(name, report.weight.name), report.weight


def questions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ProcessedDataset.text

    def everything(self: ProcessedDataset, index: int) -> Any:
        ids, _ = right(self, index)
        return ids, ids.clone()

    monkeypatch.setattr(ProcessedDataset, "text", everything)


def no_end_of_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ProcessedDataset.text

    def without(self: ProcessedDataset, index: int) -> Any:
        ids, labels = right(self, index)
        return ids, torch.where(labels == self.processor.tokenizer.eos_token_id, IGNORE, labels)

    monkeypatch.setattr(ProcessedDataset, "text", without)


def no_system_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Answers.conversation

    def without(self: Answers, sample: Any) -> Any:
        kept = [message for message in sample.messages if message["role"] != "system"]
        return right(self, replace(sample, messages=kept))

    monkeypatch.setattr(Answers, "conversation", without)


@pytest.mark.parametrize("plant", [questions_too, no_end_of_turn])
def test_wrong_targets_are_found_and_counted(
    plant: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    report = report_of(tmp_path, steps=1)
    assert not report.passed
    found = re.fullmatch(r"(\d+) target tokens, the plain model has (\d+)", report.loss.name)
    assert found is not None
    mine, its = map(int, found.groups())
    assert mine > its if plant is questions_too else mine < its


def test_a_system_turn_that_is_lost_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_system_turn(monkeypatch)
    assert not report_of(tmp_path, steps=1).passed


def test_pixels_that_are_shifted_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ProcessedDataset.media
    monkeypatch.setattr(
        ProcessedDataset, "media", lambda self, *at: {key: value.roll(1, -1) for key, value in right(self, *at).items()}
    )
    report = report_of(tmp_path, steps=1)
    assert not report.passed
    assert report.gradient.error > 1e-3


@pytest.mark.parametrize("reasoning", ["keep", "drop"])
@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_both_sides_make_the_same_of_every_familys_samples(family: str, reasoning: str, tmp_path: Path) -> None:
    data = with_data(tmp_path, family, reasoning=reasoning)
    run = run_of(tmp_path / "model", *ONE, data=data, train={"batch_size": 2})
    dataset, _ = build_datasets(run, read_model_config(run.model))
    assert isinstance(dataset, ProcessedDataset)
    for index, record in enumerate(RECORDS):
        ids, labels, media = stock_sample(dataset, index)
        mine = dataset.text(index)
        assert (mine[0].tolist(), mine[1].tolist()) == (ids.tolist(), labels.tolist())
        assert bool(media) == ("image" in record)
        if media:
            (item,) = dataset.meta(index).media
            made = dataset.media(index, 0)["pixel_values"]
            assert torch.equal(media["pixel_values"].reshape(made.shape), made)
            assert item.tokens == int((ids == dataset._placeholder_id).sum())


@pytest.mark.parametrize(("step", "share"), [(0, 0.25), (3, 1.0), (4, 1.0), (8, 0.2 + 0.8 * 0.5), (12, 0.2), (20, 0.2)])
def test_the_reference_rates_are_those_that_the_run_file_documents(step: int, share: float) -> None:
    train = TrainConfig(steps=12, batch_size=1, warmup_steps=4, min_lr_ratio=0.2)
    assert rate_at(train, 2.0, step) == pytest.approx(2.0 * share)
