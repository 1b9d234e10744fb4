"""Sequences cut over `cp`, over `tp`, or packed: the model trains as in one process."""

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from support.families import gemma3
from support.models import CONFIGS, EXPERT_CONFIGS, llava_moe, with_layers, write_model_folder
from support.runs import module, run_of, verified

from meshweave import layout
from meshweave.batch.plan import SampleMeta
from meshweave.config import RunConfig
from meshweave.data.build import dataset_of
from meshweave.data.synthetic import SyntheticDataset
from meshweave.errors import DataError
from meshweave.layout import relation
from meshweave.model.blueprint import TRAVELS_AS, read_model_config
from meshweave.model.modules import media_widths
from meshweave.parallel.build import build_model
from meshweave.step.loading import build_loader, build_planner
from meshweave.step.run import run_step
from meshweave.step.schedules import agreed_schedule, run_schedule
from meshweave.step.worker import Travel
from meshweave.world import World, launch

FAMILIES = CONFIGS | EXPERT_CONFIGS | {"gemma3": gemma3}
AUX = {"router_aux_loss": 0.1}


@dataclass(frozen=True)
class Case:
    """A model and a run of it."""

    family: str
    vision: dict[str, Any]
    language: dict[str, Any]
    train: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    layers: int = 2


CASES = {
    # The first eight meet every axis of the language model with every other, every axis of an encoder and every placement, and
    # every axis of an encoder with every placement.
    "cp2 tp2 replicas2 on the ranks of dp2 tp2 pp2 ep2": Case(
        "qwen3_vl_moe", module("0-7", cp=2, tp=2, replicas=2), module("0-7", dp=2, tp=2, pp=2, ep=2), AUX, layers=3
    ),
    "dp2 pp2 on the ranks of cp2 pp2 ep2": Case(
        "llava_moe", module("0-3", dp=2, pp=2), module("0-3", cp=2, pp=2, ep=2), {"microbatches": 3}, layers=3
    ),
    "tp2 pp2, one rank shared with cp2 tp2 ep2, pretrained": Case(
        "llava_moe", module("0-3", tp=2, pp=2), module("3-6", cp=2, tp=2, ep=2), AUX, {"weights": "pretrained"}, layers=3
    ),
    "dp2 pp2 apart from dp2 tp2 ep4": Case(
        "llava_moe",
        module("0-3", dp=2, pp=2),
        module("4-7", dp=2, tp=2, ep=4),
        AUX | {"router_aux_scope": "microbatch"},
        layers=3,
    ),
    "replicas2, one rank shared with cp2 dp2": Case("llava", module("0-1", replicas=2), module("1-4", cp=2, dp=2)),
    "cp2 replicas2 apart from cp2 ep2": Case(
        "qwen3_vl_moe", module("0-3", cp=2, replicas=2), module("4-5", cp=2, ep=2), layers=3
    ),
    "cp2 dp2, one rank shared with pp2": Case("qwen2_5_vl", module("0-3", cp=2, dp=2), module("3-4", pp=2)),
    "tp2 apart from pp2": Case("llava", module("0-1", tp=2), module("2-3", pp=2), {"pack": True}),
    "dp4 on the ranks of cp4": Case("llava", module("0-3", dp=4), module("0-3", cp=4)),
    "dp4 on the ranks of cp2 dp2": Case("qwen3_vl", module("0-3", dp=4), module("0-3", cp=2, dp=2)),
    "dp3 on the ranks of cp3": Case("qwen3_vl", module("0-2", dp=3), module("0-2", cp=3)),
    "replicas4 on the ranks of cp4": Case("qwen3_vl", module("0-3", replicas=4), module("0-3", cp=4)),
    "dp3 apart from dp2 cp2": Case("qwen3_vl", module("0-2", dp=3), module("3-6", dp=2, cp=2), {"microbatches": 1}),
    "dp3, one rank shared with dp2 cp2": Case("llava", module("0-2", dp=3), module("2-5", dp=2, cp=2)),
    "cp2 dp2 on the ranks of cp2 tp2, deepstack": Case("qwen3_vl", module("0-3", cp=2, dp=2), module("0-3", cp=2, tp=2)),
    "cp4, windows, on the ranks of dp4": Case("qwen2_5_vl", module("0-3", cp=4), module("0-3", dp=4)),
    "nested: cp2 pp2": Case(
        "qwen3_vl",
        module("0-3", dp=4),
        module("0-3", cp=2, pp=2),
        {"microbatches": 4},
        {"schedule": {"encoders": "nested"}},
        layers=3,
    ),
    "zero bubble: cp2 tp2 pp2": Case(
        "llava",
        module("0-7", dp=4, tp=2),
        module("0-7", cp=2, tp=2, pp=2),
        {"microbatches": 3},
        {"schedule": {"language": "zero_bubble"}},
    ),
    "two-way attention in images, windows: cp2 tp2": Case("gemma3", module("0-3", dp=4), module("0-3", cp=2, tp=2), layers=3),
    "tied: cp2 tp2": Case("llava", module("0-3", dp=4), module("0-3", cp=2, tp=2), tied=True),
    "tied: tp2 pp2": Case("llava", module("0-1", dp=2), module("0-3", tp=2, pp=2), tied=True),
    "packed": Case("qwen3_vl", module("0-1", dp=2), module("0-1", dp=2), {"pack": True, "max_tokens": 200}),
    "without sequence parallelism, cp2": Case(
        "qwen3_vl", module("0-3", dp=4), module("0-3", tp=2, cp=2, sequence_parallel=False)
    ),
    # Ranks whose slices have no media must go backward with those whose have some.
    "only the encoder trains: cp2 pp2": Case(
        "qwen3_vl", module("0-1", dp=2), module("0-3", cp=2, pp=2, frozen=True), {"microbatches": 10}, layers=3
    ),
    "only the encoder trains: tp2 pp2": Case(
        "qwen3_vl", module("0-1", dp=2), module("0-3", tp=2, pp=2, frozen=True), {"microbatches": 10}, layers=3
    ),
    "experts: ep2 etp2, tp2 cp2": Case("llava_moe", module("0-3", dp=4), module("0-3", cp=2, tp=2, ep=2, etp=2), layers=3),
    "experts: etp2, cp2": Case("llava_moe", module("0-1", dp=2), module("0-1", cp=2, etp=2), AUX, layers=3),
    "ulysses: cp4 of 4 kv heads, apart": Case("qwen3_vl", module("0"), module("1-4", cp=4, context_parallel="ulysses")),
    "ulysses: cp4 of 2 kv heads a rank, tp2": Case("llava", module("0"), module("0-7", cp=4, tp=2, context_parallel="ulysses")),
    "replicated": Case("llava", module("0-3", dp=4), module("0-3", cp=2, tp=2, data_parallel="replicate")),
    "float32": Case("qwen3_vl", module("0-3", dp=4), module("0-3", cp=2, tp=2), changes={"dtype": "float32"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_cut_sequence_equals_the_single_process(case: str, tmp_path: Path) -> None:
    its = CASES[case]
    config = with_layers(
        FAMILIES[its.family](tied=its.tied) if its.tied else FAMILIES[its.family](),
        3,
        max(its.layers, 2 + (its.family == "qwen3_vl")),
    )
    write_model_folder(config, tmp_path, weights=its.changes.get("weights") == "pretrained")
    report = verified(run_of(tmp_path, its.vision, its.language, train=its.train, **its.changes), steps=2)
    assert report.passed, report


def test_the_table_meets_every_pair_of_axes_and_placements() -> None:
    language, encoder = ("dp", "cp", "tp", "pp", "ep"), ("dp", "cp", "tp", "pp", "replicas")
    placements = ("colocated", "non-colocated", "overlapping")
    met: set[tuple[str, str]] = set()
    for case in CASES.values():
        run = run_of(Path("unused"), case.vision, case.language)
        where = relation(*layout.placements(run).values())
        ours, theirs = (
            [f"{name} {axis}" for axis in axes if getattr(run.modules[name], axis) > 1]
            for name, axes in (("language", language), ("vision", encoder))
        )
        met |= {*product(ours, ours), *product(ours, theirs), *product([*ours, *theirs], [where])}
    ours, theirs = [f"language {axis}" for axis in language], [f"vision {axis}" for axis in encoder]
    assert {*product(ours, ours), *product(ours, theirs), *product([*ours, *theirs], placements)} <= met


class WithoutEveryFourth(SyntheticDataset):
    """Its third sample of four cannot be read."""

    def meta(self, index: int) -> SampleMeta:
        if index % 4 == 2:
            raise DataError(f"sample {index} is broken")
        return super().meta(index)


def test_lanes_with_one_image_seven_text_alone_and_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshweave.data.build.SyntheticDataset", WithoutEveryFourth)
    config = CONFIGS["qwen3_vl"]()
    folder = write_model_folder(config, tmp_path)
    run = run_of(
        folder,
        module("0-2", dp=3),
        module("0-7", dp=4, cp=2),
        data={"source": "synthetic", "samples": 4},
        train={"batch_size": 4, "microbatches": 1},
    )
    where = layout.placements(run)
    data = dataset_of(run, config)
    (part,) = build_planner(run, data, where, run_schedule(run, config, where, data)).plan(0).microbatches
    assert sorted([len(sample.media) for sample in lane] for lane in part.lanes) == [[], [0], [1], [7]]
    report = verified(run, steps=1)
    assert report.passed, report
    assert report.samples == 3


def first_step(world: World, run: RunConfig) -> tuple[float, float]:
    """Loss and gradient norm of a run's first step."""
    config = read_model_config(run.model)
    data = dataset_of(run, config)
    model = build_model(run, config, world.placements, world.meshes, world.rank, world.device, world.expert_meshes)
    schedule = agreed_schedule(world, run, config, data)
    step = build_loader(run, data, world, schedule, model.part.rule).step(0)
    travel = Travel(media_widths(config), config.get_text_config().hidden_size, TRAVELS_AS[run.dtype])
    totals = run_step(model, step, world, schedule, travel)
    return totals.loss, totals.grad_norm


def test_bfloat16_is_float32_to_its_digits(tmp_path: Path) -> None:
    folder = write_model_folder(llava_moe(), tmp_path)
    found = {}
    for dtype in ("float32", "bfloat16"):
        run = run_of(folder, module("0-1", dp=2), module("0-3", cp=2, tp=2, ep=2), dtype=dtype)
        found[dtype] = launch(run, first_step)
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.03)
    assert found["bfloat16"] != found["float32"]


def test_large_gradients_are_summed_over_tp_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshweave.step.gradients._LARGE", 256)  # embedding and norms on either side of it
    folder = write_model_folder(CONFIGS["llava"](tied=True), tmp_path)
    report = verified(run_of(folder, module("0-1", dp=2), module("0-1", tp=2)), steps=1)
    assert report.passed, report
