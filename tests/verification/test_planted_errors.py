"""Errors that cut sequences and experts invite, planted one by one: `verify` finds each, and says where."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import llava, llava_moe, write_model_folder
from support.runs import module, run_of, verified
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig

from meshweave.boundary import crossing
from meshweave.model.language import LanguageStage
from meshweave.parallel.context import SequencePlan
from meshweave.parallel.mesh import build_meshes
from meshweave.sequence import Document, LaneSequence
from meshweave.sequence.grid import LaneGrid
from meshweave.verification.compare import VerifyReport

PACKED = {"pack": True, "microbatches": 1}
CP2 = (module("0-1", dp=2), module("0-1", cp=2))
TP2 = (module("0-1", dp=2), module("0-1", tp=2))


@pytest.fixture
def found(tmp_path: Path) -> Callable[..., VerifyReport]:
    """What `verify` says of one step of a run, which must fail."""

    def report_of(
        vision: dict[str, Any], language: dict[str, Any], train: dict[str, Any], config: PreTrainedConfig | None = None
    ) -> VerifyReport:
        folder = write_model_folder(config or llava(), tmp_path)
        report = verified(run_of(folder, vision, language, train={"batch_size": 8, **train}), steps=1)
        assert not report.passed
        return report

    return report_of


def in_own_mesh(names: tuple[str, ...], *shape: int) -> Callable[..., dict[str, DeviceMesh]]:
    """Makes a mesh for the language model in which nothing of `dp` joins ranks that hold the same parameters."""

    def build(placements: Any, device_type: str) -> dict[str, DeviceMesh]:
        ranks = torch.tensor(placements["language"].ranks).reshape(shape)
        return {"language": DeviceMesh(device_type, ranks, mesh_dim_names=names)}

    return build


def test_a_missing_sum_of_gradients_over_cp_is_found(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unjoined(placements: Any, device_type: str) -> dict[str, DeviceMesh]:
        return build_meshes(placements, device_type) | in_own_mesh(("alone", "dp"), 2, 1)(placements, device_type)

    monkeypatch.setattr("meshweave.world.build_meshes", unjoined)
    report = found(*CP2, {})
    assert report.gradient.error > 0.1
    assert "language_model" in report.gradient.name or "lm_head" in report.gradient.name
    assert report.loss.error < report.tolerance


def test_a_wrong_offset_of_position_ids_in_a_packed_sequence_is_found(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary positions are relative, so an offset shows where it sets in within a document."""
    positions = LanguageStage._positions

    def off_by_one(self: LanguageStage, input_ids: Tensor, grid: LaneGrid, items: Any) -> Tensor | None:
        its = positions(self, input_ids, grid, items)
        assert its is not None
        _, start, stop = max(grid.places, key=lambda place: place[2] - place[1])
        its[..., (start + stop) // 2 : stop] += 1
        return its

    monkeypatch.setattr(LanguageStage, "_positions", off_by_one)
    report = found(module("0"), module("0"), PACKED)
    assert ".self_attn." in report.gradient.name
    assert report.loss.error > 1e-6


def test_attention_across_documents_is_found(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_document(sequence: LaneSequence, *args: Any) -> SequencePlan:
        whole = Document(sequence.documents[0].start, sequence.documents[-1].stop)
        return SequencePlan(replace(sequence, documents=(whole,)), *args)

    monkeypatch.setattr("meshweave.step.worker.SequencePlan", one_document)
    report = found(module("0", frozen=True), module("0"), PACKED)
    assert ".self_attn." in report.gradient.name
    assert report.loss.error > 1e-6


def test_media_tokens_in_the_wrong_slice_are_found(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of a lane, which are all alike in length, go where others of its images belong."""
    runs = crossing._runs
    monkeypatch.setattr(crossing, "_runs", lambda *args: runs(*args)[::-1])
    report = found(*CP2, {})
    assert report.gradient.name.startswith(("model.vision_tower", "model.multi_modal_projector"))
    assert report.gradient.error > 0.1


def test_a_loss_counted_twice_over_tp_is_found(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = LanguageStage.__init__

    def unshared(self: LanguageStage, *args: Any) -> None:
        made(self, *args)
        self.loss_is_shared = False

    monkeypatch.setattr(LanguageStage, "__init__", unshared)
    report = found(*TP2, {})
    assert report.loss.name == "loss"
    assert report.loss.error == pytest.approx(1.0)
    assert report.gradient.error < report.tolerance


def test_a_missing_sum_over_tp_at_the_norms_of_a_cut_sequence_is_found(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshweave.parallel.split.replicated_names", lambda parameters: ())
    report = found(*TP2, {})
    assert "norm" in report.gradient.name
    assert report.loss.error < report.tolerance


def test_a_missing_sum_over_the_copies_of_an_expert_is_found(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshweave.world.build_expert_meshes", in_own_mesh(("copies", "edp", "ep"), 2, 1, 2))
    report = found(module("0"), module("0-3", cp=2, tp=2, ep=2), {}, llava_moe())
    assert ".experts." in report.gradient.name
    assert report.loss.error < report.tolerance


@pytest.mark.parametrize(("language", "config"), [(module("0-1", cp=2), llava), (module("0-1", dp=2, ep=2), llava_moe)])
def test_a_norm_that_counts_every_copy_is_found(
    language: dict[str, Any], config: Callable[[], PreTrainedConfig], found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshweave.step.gradients.counts_here", lambda *args: True)
    report = found(module("0"), language | {"data_parallel": "replicate"}, {}, config())
    assert report.gradient.name == "grad_norm"
    assert report.gradient.error > 0.01
