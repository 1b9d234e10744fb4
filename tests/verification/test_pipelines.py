"""Every pipeline trains the same model as one process: whatever the placement, the schedule and what is frozen, tied or empty."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.models import CONFIGS, with_layers, write_model_folder
from support.runs import TextOnly, module, run_of, verified
from torch import Tensor

from meshweave.data.synthetic import SyntheticDataset
from meshweave.step.token_mail import TokenMail
from meshweave.verification.compare import VerifyReport

NESTED = {"encoders": "nested"}
ZERO_BUBBLE = {"language": "zero_bubble"}
INTERLEAVED = {"language": "interleaved"}


STEPS = 2


@dataclass(frozen=True)
class Case:
    """A model and a run of it."""

    family: str
    vision: dict[str, Any]
    language: dict[str, Any]
    microbatches: int = 5
    schedule: dict[str, Any] = field(default_factory=dict)
    vision_layers: int = 3
    language_layers: int = 3
    tied: bool = False
    batch_size: int = 10
    changes: Mapping[str, Any] = field(default_factory=dict)

    def verified(self, folder: Path, steps: int = STEPS) -> VerifyReport:
        config = CONFIGS[self.family](tied=True) if self.tied else CONFIGS[self.family]()
        config = with_layers(config, self.vision_layers, self.language_layers)
        write_model_folder(config, folder, weights=self.changes.get("weights") == "pretrained")
        train = {"microbatches": self.microbatches, "batch_size": self.batch_size}
        run = run_of(folder, self.vision, self.language, train=train, schedule=self.schedule, **self.changes)
        return verified(run, steps)


CASES = {
    # Encoder and language model on ranks of their own.
    "apart: one rank into pp2 tp2": Case("qwen3_vl", module("0"), module("1-4", pp=2, tp=2), 2),
    "apart: dp2 into pp3": Case("llava", module("0-1", dp=2), module("2-4", pp=3)),
    "apart: tp2 into dp4": Case("qwen3_vl", module("0-1", tp=2), module("2-5", dp=4), 2),
    "apart: pp2 into pp2, deepstack": Case("qwen3_vl", module("0-1", pp=2), module("2-3", pp=2)),
    "apart: pp3 into one rank": Case("llava", module("0-2", pp=3), module("3"), 2, vision_layers=4),
    "apart: tp2 pp2 into pp2": Case("qwen3_vl", module("0-3", tp=2, pp=2), module("4-5", pp=2), 2),
    "apart: tp2 pp2 dp2 into one rank": Case("llava", module("0-7", tp=2, pp=2, dp=2), module("8"), 2),
    "apart: pp2 dp2 into tp2 pp2": Case("llava", module("0-3", dp=2, pp=2), module("4-7", tp=2, pp=2), 2),
    "apart: dp3 into pp2 dp2": Case("llava", module("0-2", dp=3), module("3-6", pp=2, dp=2), 2),
    "apart: ranks with gaps": Case("qwen3_vl", module("0,4", dp=2), module("1,3", pp=2), 2, changes={"idle_ranks": "2"}),
    "apart: encoder last": Case("llava", module("2-3", dp=2), module("0-1", pp=2), 8),
    "apart: window attention in a pipeline": Case("qwen2_5_vl", module("0-1", pp=2), module("2-3", pp=2), 2),
    # On the same ranks, in three phases.
    "colocated: dp2 and pp2, macro-batches of 2": Case(
        "qwen3_vl", module("0-1", dp=2), module("0-1", pp=2), schedule={"macro_batch": 2}
    ),
    "colocated: dp2 and pp2, one macro-batch": Case("qwen3_vl", module("0-1", dp=2), module("0-1", pp=2)),
    "colocated: dp4 and pp4": Case("llava", module("0-3", dp=4), module("0-3", pp=4), 8, {"macro_batch": 4}, language_layers=4),
    "colocated: tp2 across stages": Case("llava", module("0-1", tp=2), module("0-1", pp=2), schedule={"macro_batch": 2}),
    "colocated: tp2 dp2 across stages of pp4": Case(
        "qwen3_vl", module("0-3", tp=2, dp=2), module("0-3", pp=4), 2, language_layers=5
    ),
    "colocated: pp2 and pp2, deepstack": Case("qwen3_vl", module("0-1", pp=2), module("0-1", pp=2), 2),
    "colocated: pp2 dp2 and pp2 tp2": Case("qwen3_vl", module("0-3", pp=2, dp=2), module("0-3", pp=2, tp=2), 2),
    "colocated: pp2 and dp2": Case("llava", module("0-1", pp=2), module("0-1", dp=2), schedule={"macro_batch": 2}),
    # Inside the bubbles.
    "nested: dp2 and pp2": Case("qwen3_vl", module("0-1", dp=2), module("0-1", pp=2), 5, NESTED),
    "nested: tp2 across stages": Case("llava", module("0-1", tp=2), module("0-1", pp=2), 5, NESTED),
    "nested: on one stage only": Case("qwen3_vl", module("1"), module("0-1", pp=2), 5, NESTED),
    "nested: zero bubble": Case("llava", module("0-1", dp=2), module("0-1", pp=2), 5, NESTED | ZERO_BUBBLE),
    "nested: virtual stages": Case(
        "qwen3_vl", module("0-1", dp=2), module("0-1", pp=2), 4, NESTED | INTERLEAVED, language_layers=5
    ),
    "nested: frozen": Case("llava", module("0-1", dp=2, frozen=True), module("0-1", pp=2), 5, NESTED),
    # On some ranks in common.
    "overlapping: around pp2": Case("qwen3_vl", module("0-3", dp=4), module("1-2", pp=2), 2),
    "overlapping: within pp2": Case("qwen3_vl", module("1"), module("0-1", pp=2)),
    "overlapping: macro-batches of 2": Case("llava", module("0-2", dp=3), module("2-3", pp=2), 5, {"macro_batch": 2}),
    # Other orders of the language model.
    "virtual stages, colocated": Case("llava", module("0-1", dp=2), module("0-1", pp=2), 4, INTERLEAVED, language_layers=4),
    "virtual stages, apart": Case(
        "qwen3_vl", module("0"), module("1-2", pp=2), 5, INTERLEAVED | {"virtual_stages": 3}, language_layers=7
    ),
    "zero bubble, colocated": Case("qwen3_vl", module("0-1", tp=2), module("0-1", pp=2), 2, ZERO_BUBBLE | {"macro_batch": 1}),
    "zero bubble, apart": Case("llava", module("0"), module("1-3", pp=3), 5, ZERO_BUBBLE),
    "zero bubble, apart from dp2 to dp2": Case("qwen3_vl", module("0-1", dp=2), module("2-5", pp=2, dp=2), 2, ZERO_BUBBLE),
    # Few samples: lanes and microbatches without media, and stages without samples.
    "one microbatch": Case("qwen3_vl", module("0-1", dp=2), module("2-3", pp=2), 1),
    "a sample a lane and microbatch": Case("qwen3_vl", module("0-1", dp=2), module("2-5", pp=2, dp=2), 4, batch_size=8),
    "two samples": Case("llava", module("0-1", dp=2), module("0-1", pp=2), 2, batch_size=2),
    # Not trained.
    "frozen: vision runs ahead": Case("llava", module("0", frozen=True), module("1-2", pp=2), 10),
    "frozen: vision in a pipeline": Case("qwen3_vl", module("0-1", pp=2, frozen=True), module("2-3", pp=2)),
    "frozen: tower alone": Case("llava", module("0-1", dp=2, frozen=["vision_tower"]), module("2-3", pp=2)),
    "frozen: tower alone, its pipeline": Case("qwen3_vl", module("0-1", pp=2, frozen=["visual.blocks"]), module("0-1", pp=2), 2),
    "frozen: language model": Case("qwen3_vl", module("0-1", dp=2), module("0-1", pp=2, frozen=True), 2),
    "frozen: language model, lanes without media": Case("llava", module("0-1", dp=2), module("0-1", dp=2, frozen=True)),
    "frozen: language model, zero bubble": Case("llava", module("0"), module("1-2", pp=2, frozen=True), 2, ZERO_BUBBLE),
    "frozen: a stage of the language model": Case(
        "llava", module("0", frozen=True), module("1-2", pp=2, layers=[1, 2], frozen=["embed_tokens", "layers.0."]), 2
    ),
    # Embedding and head on different stages, and the same.
    "tied: pp2 tp2": Case("llava", module("0-1", dp=2), module("0-3", pp=2, tp=2), 2, tied=True),
    "tied: pp2 dp2, replicated": Case(
        "llava", module("0"), module("1-4", pp=2, dp=2, data_parallel="replicate"), 2, ZERO_BUBBLE, tied=True
    ),
    "tied: virtual stages": Case("llava", module("0"), module("0-1", pp=2), 2, INTERLEAVED, language_layers=4, tied=True),
    # Other options.
    "uneven stages": Case("llava", module("0"), module("0-2", pp=3, layers=[1, 3, 2]), 2, language_layers=6),
    "nodes of two ranks": Case("qwen3_vl", module("1-2", dp=2), module("0-3", pp=2, tp=2), 4, changes={"node_size": 2}),
    "replicated": Case(
        "llava",
        module("0-3", dp=4, data_parallel="replicate"),
        module("0-3", pp=2, dp=2, data_parallel="replicate"),
        4,
        {"macro_batch": 2},
    ),
    "pretrained: pp2 dp2": Case(
        "qwen3_vl", module("0-3", dp=2, pp=2), module("0-3", pp=2, dp=2), 2, changes={"weights": "pretrained"}
    ),
    "float32: apart": Case("qwen3_vl", module("0"), module("1-2", pp=2), 2, changes={"dtype": "float32"}),
    "float32: nested": Case("llava", module("0-1", dp=2), module("0-1", pp=2), 2, NESTED, changes={"dtype": "float32"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_pipeline_equals_the_single_process(case: str, tmp_path: Path) -> None:
    its = CASES[case]
    report = its.verified(tmp_path)
    assert report.passed, report
    assert report.samples == its.batch_size * STEPS
    assert report.media_items > its.batch_size


@pytest.mark.parametrize("case", ["apart: pp2 into pp2, deepstack", "colocated: tp2 across stages", "nested: dp2 and pp2"])
def test_a_pipeline_may_meet_steps_without_any_media(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshweave.verification.compare.SyntheticDataset", TextOnly)
    report = CASES[case].verified(tmp_path)
    assert report.passed, report
    assert report.media_items == 0


def test_a_missing_sum_over_tied_copies_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshweave.step.run.sum_tied_gradients", lambda module, placement, rank: None)
    report = CASES["tied: virtual stages"].verified(tmp_path)
    assert not report.passed
    assert "embed_tokens" in report.gradient.name


def test_gradients_of_swapped_microbatches_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Alike(SyntheticDataset):
        """Every sample has one image and as much text: messages of all microbatches look the same."""

        def _shape(self, index: int) -> tuple[list[int], list[tuple[int, int]]]:
            return [6, 6], [self._images.draw(self._random(index, 0))]

    def swapped(mail: TokenMail, encoder: str, microbatch: int, back: bool) -> Tensor:
        return taken(mail, encoder, 1 - microbatch if back else microbatch, back)

    taken = TokenMail.taken
    case = Case("llava", module("0-1", dp=2), module("0-1", pp=2), 2, batch_size=4)
    monkeypatch.setattr("meshweave.verification.compare.SyntheticDataset", Alike)
    assert case.verified(tmp_path).passed
    monkeypatch.setattr(TokenMail, "taken", swapped)
    report = case.verified(tmp_path)
    assert not report.passed
    assert report.gradient.name.startswith(("model.vision_tower", "model.multi_modal_projector"))


def test_a_reduction_left_out_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshweave.step.worker.reduce", lambda part: None)
    report = CASES["colocated: dp2 and pp2, one macro-batch"].verified(tmp_path, steps=1)
    assert not report.passed
    assert report.gradient.name.startswith("model.visual")
