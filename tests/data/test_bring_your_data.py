"""Every form in every container, and every family, trains on the loss of a plain loop over the stock processor and model."""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.folders import IMAGE_FAMILIES, model_folder
from torch.nn import functional
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM

from meshweave.config import parse_config
from meshweave.data.build import build_datasets
from meshweave.data.processed import ProcessedDataset
from meshweave.model.blueprint import auto_class, read_model_config
from meshweave.train.trainer import train
from meshweave.verification.reference_data import stock_sample
from meshweave.world import launch

SAMPLES = 4
QUESTIONS = ("What is in this image?", "Which digits?", "A cat?", "And here?")
ANSWERS = ("A cat.", "The answer is 7.", "Yes, a cat.", "A picture.")


def llava(number: int) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{QUESTIONS[number]}"}, {"from": "gpt", "value": ANSWERS[number]}]
    return {"id": str(number), "image": f"{number}.png", "conversations": turns}


def openai(number: int) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": f"{number}.png"}}, {"type": "text", "text": QUESTIONS[number]}]
    # Parts on both sides: a column of a table has one type.
    said = [{"type": "text", "text": ANSWERS[number]}]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": said}]}


def swift(number: int) -> dict[str, Any]:
    return {
        "query": f"<image>{QUESTIONS[number]}",
        "response": ANSWERS[number],
        "images": [{"path": f"{number}.png", "bytes": None}],
    }


FORMS: dict[str, Callable[[int], dict[str, Any]]] = {"LLaVA": llava, "OpenAI": openai, "ms-swift": swift}


def as_list(records: list[Any], folder: Path) -> Path:
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def as_lines(records: list[Any], folder: Path) -> Path:
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "data.jsonl"


def as_parquet(records: list[Any], folder: Path) -> Path:
    import datasets

    datasets.Dataset.from_list(records).to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


def as_saved(records: list[Any], folder: Path) -> Path:
    import datasets

    datasets.Dataset.from_list(records).save_to_disk(folder / "saved")
    return folder / "saved"


CONTAINERS: dict[str, Callable[[list[Any], Path], Path]] = {
    "JSON list": as_list,
    "JSONL": as_lines,
    "parquet": as_parquet,
    "datasets folder": as_saved,
}


@dataclass(frozen=True)
class Case:
    family: str
    form: str
    container: str


def cases() -> list[Case]:
    """Every form in every container with one family, and every other family with some form in some container."""
    pairs = [(form, container) for form in FORMS for container in CONTAINERS]
    others = [family for family in IMAGE_FAMILIES if family != "qwen3_vl"]
    return [
        *(Case("qwen3_vl", *pair) for pair in pairs),
        *(Case(family, *pairs[number % len(pairs)]) for number, family in enumerate(others)),
    ]


def plain_loss(folder: Path, dataset: ProcessedDataset) -> float:
    """Of all samples, one after the other through the stock model; the mean over targets."""
    config = read_model_config(folder)
    assert auto_class(config) in (AutoModelForImageTextToText, AutoModelForMultimodalLM)
    model = auto_class(config).from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    total, targets = 0.0, 0
    for index in range(SAMPLES):
        ids, labels, media = stock_sample(dataset, index)
        kinds = torch.zeros_like(ids)[None]
        kinds[ids[None] == dataset._placeholder_id] = 1
        types = {"mm_token_type_ids": kinds, "token_type_ids": kinds, "attention_mask": torch.ones_like(kinds)}
        takes = inspect.signature(type(model.base_model).forward).parameters
        with torch.no_grad():
            logits = model(input_ids=ids[None], **media, **{key: value for key, value in types.items() if key in takes}).logits
        total += float(functional.cross_entropy(logits[0, :-1], labels[1:], ignore_index=-100, reduction="sum"))
        targets += int((labels[1:] != -100).sum())
    return total / targets


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.family}, {case.form}, {case.container}")
def test_a_run_on_published_files_has_the_loss_of_a_plain_loop(case: Case, tmp_path: Path) -> None:
    model_folder(case.family, tmp_path / "model", weights=True)
    for number in range(SAMPLES):
        Image.effect_noise((30 + 11 * number, 40), 60).convert("RGB").save(tmp_path / f"{number}.png")
    path = CONTAINERS[case.container]([FORMS[case.form](number) for number in range(SAMPLES)], tmp_path)
    where = {"ranks": "0"}
    run = parse_config(
        {
            "model": str(tmp_path / "model"),
            "modules": {"vision": where, "language": where},
            "data": {"path": str(path), "images": str(tmp_path), "on_error": "stop"},
            "train": {"steps": 1, "batch_size": SAMPLES, "lr": 1e-4},
            "output": str(tmp_path / "out"),
        }
    )
    config = read_model_config(run.model)
    dataset, _ = build_datasets(run, config)
    assert isinstance(dataset, ProcessedDataset)
    expected = plain_loss(run.model, dataset)
    summary = launch(run, lambda world, run: train(world, run, config))
    assert summary is not None
    assert summary.loss == pytest.approx(expected, rel=1e-4)
    assert {file.name for file in (run.output / "model").iterdir()} >= {
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors",
    }
