"""Evaluation counts the same samples as exact, and measures the same loss, however sequences are cut."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import llava, write_model_folder
from support.runs import module, run_of
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForImageTextToText

from meshweave.config import RunConfig
from meshweave.data.synthetic import SyntheticDataset
from meshweave.model.blueprint import read_model_config
from meshweave.model.modules import media_widths
from meshweave.parallel.build import build_model
from meshweave.step.worker import Travel
from meshweave.train.evaluation import Evaluation, evaluate
from meshweave.verification.oracle import stock_batch
from meshweave.world import World, launch

SAMPLES = 11
EXACT = 6


class Labelled(SyntheticDataset):
    """With other targets than the text itself."""

    labels: Sequence[Tensor] = ()

    def text(self, index: int) -> tuple[Tensor, Tensor]:
        ids, labels = super().text(index)
        return ids, self.labels[index] if self.labels else labels


def expect_most_words(folder: Path) -> tuple[Labelled, float]:
    """Targets that the plain model finds most likely, but for the last of every second sample; and its loss per target."""
    data = Labelled(read_model_config(folder), SAMPLES, seed=5)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64)
    inputs, labels = stock_batch(model, data, range(SAMPLES))
    with torch.no_grad():
        logits = model(**inputs).logits[:, :-1]
    targets = torch.where(labels[:, 1:] == -100, -100, logits.argmax(-1))
    for row in targets[1::2]:
        last = int(torch.where(row != -100)[0][-1])
        row[last] = (row[last] + 1) % logits.shape[-1]
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    whole = functional.pad(targets, (1, 0), value=-100)
    data.labels = [whole[sample, : len(data.text(sample)[0])] for sample in range(SAMPLES)]
    return data, float(loss)


def evaluated(run: RunConfig, data: Labelled) -> Evaluation:
    config = read_model_config(run.model)
    travel = Travel(media_widths(config), config.get_text_config().hidden_size, torch.float64)

    def work(world: World, run: RunConfig) -> Evaluation:
        model = build_model(run, config, world.placements, world.meshes, world.rank, world.device, world.expert_meshes)
        return evaluate(world, run, config, model, data, travel)

    found = launch(run, work)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("language", "tied"),
    [
        (module("0-3", tp=2, cp=2), False),
        (module("0-3", tp=2, cp=2), True),
        (module("0-3", dp=2, cp=2), False),
        (module("0-3", pp=2, tp=2), True),
        (module("0-1", tp=2, sequence_parallel=False), False),
    ],
    ids=lambda its: (
        " ".join(f"{key}{its[key]}" for key in ("pp", "dp", "cp", "tp") if its.get(key, 1) > 1)
        if isinstance(its, dict)
        else "tied"
        if its
        else "untied"
    ),
)
def test_exact_samples_and_loss_are_those_of_the_plain_model(language: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    """The last step has fewer samples than lanes and microbatches: a lane stays empty."""
    folder = write_model_folder(llava(tied=tied), tmp_path, weights=True)
    data, loss = expect_most_words(folder)
    train = {"batch_size": 4 * language["dp"], "microbatches": 4}
    run = run_of(folder, module("0-1", dp=2), language, weights="pretrained", train=train)
    found = evaluated(run, data)
    assert (found.exact, found.samples) == (EXACT, SAMPLES)
    assert found.loss == pytest.approx(loss, rel=1e-5)  # the plain model rounds norms to float32
