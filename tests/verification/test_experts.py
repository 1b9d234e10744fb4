"""Experts split over ranks train the same model as one process: routed evenly, unevenly or not at all, in every schedule."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import EXPERT_CONFIGS, with_layers, write_model_folder
from support.runs import TextOnly, module, run_of, verified
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional
from transformers import AutoModelForImageTextToText
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from meshweave.model.blueprint import blueprint_of, read_model_config
from meshweave.model.modules import graph_of
from meshweave.model.routing import Balance, Routing, balance, routing_of
from meshweave.train.trainer import train
from meshweave.verification.compare import VerifyReport
from meshweave.world import launch

LANE = {"router_aux_loss": 0.5}
MICROBATCH = {"router_aux_loss": 0.5, "router_aux_scope": "microbatch"}
ZERO_BUBBLE = {"language": "zero_bubble"}
FIRST_LAYERS = ["embed_tokens", "layers.0.", "layers.1."]


@dataclass(frozen=True)
class Case:
    """A model with experts and a run of it."""

    family: str
    vision: dict[str, Any]
    language: dict[str, Any]
    train: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    layers: int = 3

    def verified(self, folder: Path, steps: int = 2) -> VerifyReport:
        config = with_layers(EXPERT_CONFIGS[self.family](), 3, self.layers)
        write_model_folder(config, folder, weights=self.changes.get("weights") == "pretrained")
        changes = {"train": dict(self.train), "schedule": dict(self.schedule), **self.changes}
        return verified(run_of(folder, self.vision, self.language, **changes), steps)


FEW = {"batch_size": 4}

CASES = {
    "one rank": Case("llava_moe", module("0"), module("0"), LANE),
    "not split": Case("llava_moe", module("0-1", dp=2), module("0-1", dp=2), MICROBATCH),
    "ep2": Case("llava_mixtral", module("0-1", dp=2), module("0-1", dp=2, ep=2), LANE),
    "ep2, two copies": Case("llava_moe", module("0-1", dp=2), module("0-3", dp=4, ep=2), MICROBATCH),
    "ep4": Case("llava_moe", module("0-3", dp=4), module("0-3", dp=4, ep=4), LANE),
    "etp2": Case("llava_moe", module("0-1", dp=2), module("0-1", dp=2, etp=2)),
    "etp2, two copies": Case("llava_mixtral", module("0"), module("0-3", dp=4, etp=2), LANE),
    "ep2 etp2": Case("llava_moe", module("0-3", dp=4), module("0-3", dp=4, ep=2, etp=2), LANE),
    "replicated ep2": Case("llava_moe", module("0"), module("0-3", dp=4, ep=2, data_parallel="replicate"), LANE),
    "apart": Case("llava_moe", module("0-1", dp=2), module("2-3", dp=2, ep=2), LANE),
    "pp2 ep2": Case("llava_moe", module("0-1", dp=2), module("0-3", pp=2, dp=2, ep=2), MICROBATCH),
    "pp2 ep2, zero bubble": Case("llava_moe", module("0-1", dp=2), module("0-3", pp=2, dp=2, ep=2), MICROBATCH, ZERO_BUBBLE),
    "pp2 etp2, zero bubble, apart": Case("qwen3_vl_moe", module("0"), module("1-4", pp=2, dp=2, etp=2), LANE, ZERO_BUBBLE),
    "pp2 ep2, nested": Case("llava_moe", module("0-3", dp=4), module("0-3", pp=2, dp=2, ep=2), LANE, {"encoders": "nested"}),
    "pp2 ep2, virtual stages": Case(
        "llava_mixtral", module("0-1", dp=2), module("0-3", pp=2, dp=2, ep=2), MICROBATCH, {"language": "interleaved"}, layers=4
    ),
    "pp2 ep2, vision on half a stage": Case("llava_moe", module("1"), module("0-3", pp=2, dp=2, ep=2), FEW),
    "tp2 etp2": Case("qwen3_vl_moe", module("0"), module("0-1", tp=2, etp=2), MICROBATCH),
    "tp2 dp2 ep2 etp2": Case("llava_moe", module("0-3", dp=4), module("0-3", tp=2, dp=2, ep=2, etp=2), LANE),
    "tp2 pp2 ep2, zero bubble": Case("llava_moe", module("0"), module("0-3", pp=2, tp=2, ep=2), MICROBATCH, ZERO_BUBBLE),
    "tp4 ep2": Case("llava_moe", module("0"), module("0-3", tp=4, ep=2), LANE),
    "tp2, not split": Case("llava_mixtral", module("0"), module("0-1", tp=2), LANE),
    "cp2 pp2 ep2": Case("llava_moe", module("0"), module("0-3", pp=2, cp=2, ep=2), LANE),
    "cp2 tp2 ep4": Case("llava_moe", module("0"), module("0-3", cp=2, tp=2, ep=4), LANE),
    # Lanes without media must still take part in the backward of experts that lanes with media go through.
    "frozen below": Case("llava_moe", module("0-1", dp=2), module("0-1", dp=2, ep=2, frozen=FIRST_LAYERS), FEW),
    "frozen below, zero bubble": Case(
        "llava_moe", module("0-1", dp=2), module("0-3", pp=2, dp=2, ep=2, frozen=FIRST_LAYERS), FEW, ZERO_BUBBLE
    ),
    "frozen experts": Case("llava_moe", module("0"), module("0-1", dp=2, ep=2, frozen=["experts"]), LANE),
    "pretrained ep2 etp2": Case(
        "llava_mixtral", module("0"), module("0-3", dp=4, ep=2, etp=2), LANE, changes={"weights": "pretrained"}
    ),
    "pretrained pp2 ep2": Case("qwen3_vl_moe", module("0"), module("0-3", pp=2, dp=2, ep=2), changes={"weights": "pretrained"}),
    "float32": Case("llava_moe", module("0"), module("0-3", dp=4, ep=2, etp=2), MICROBATCH, changes={"dtype": "float32"}),
}


@pytest.mark.parametrize("case", CASES)
def test_experts_equal_the_single_process(case: str, tmp_path: Path) -> None:
    report = CASES[case].verified(tmp_path)
    assert report.passed, report
    assert report.media_items > 0


IDLE = {
    "ep2, two copies": (0.0, 9.0, 0.0, -9.0),
    "ep2 etp2": (9.0, 9.0, -9.0, -9.0),
    "pp2 ep2, zero bubble": (-9.0, -9.0, 9.0, 9.0),
}


@pytest.mark.parametrize("case", IDLE)
def test_an_expert_or_all_of_a_rank_may_get_no_token(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(router: Qwen3MoeTopKRouter, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = hidden.reshape(-1, router.hidden_dim)
        logits = functional.linear(hidden, router.weight) + hidden.new_tensor(IDLE[case])
        scores, chosen = logits.softmax(-1).topk(router.top_k)
        return logits, scores, chosen

    monkeypatch.setattr(Qwen3MoeTopKRouter, "forward", forward)
    report = CASES[case].verified(tmp_path)
    assert report.passed, report


def test_steps_without_any_media_route_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshweave.verification.compare.SyntheticDataset", TextOnly)
    report = CASES["pp2 ep2"].verified(tmp_path)
    assert report.passed, report
    assert report.media_items == 0


def test_a_missing_sum_over_the_copies_of_an_expert_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsummed(placements: Any, device_type: str) -> dict[str, DeviceMesh]:
        names = ("copies", "edp", "ep")
        return {"language": DeviceMesh(device_type, torch.arange(4).reshape(2, 1, 2), mesh_dim_names=names)}

    monkeypatch.setattr("meshweave.world.build_expert_meshes", unsummed)
    report = CASES["ep2, two copies"].verified(tmp_path, steps=1)
    assert not report.passed
    assert ".experts." in report.gradient.name
    assert report.loss.error < report.tolerance


def test_a_wrong_coefficient_of_the_balance_is_found_at_the_routers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(*args: Any) -> Routing:
        routing = routing_of(*args)
        assert routing is not None
        return replace(routing, coefficient=2 * routing.coefficient)

    monkeypatch.setattr("meshweave.parallel.build.routing_of", doubled)
    report = CASES["ep2"].verified(tmp_path, steps=1)
    assert not report.passed
    assert "mlp.gate" in report.gradient.name
    assert report.loss.error < report.tolerance


def test_a_balance_of_one_lane_in_place_of_all_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshweave.step.worker._token_groups", lambda part, mesh, scope: [])
    report = CASES["not split"].verified(tmp_path, steps=1)
    assert not report.passed
    assert report.loss.name == "router_aux_loss"
    assert report.gradient.error > 1e-4


def test_the_balance_is_one_where_load_and_probability_are_even_and_counts_no_padding() -> None:
    routing = Routing(layers=2, experts=4, chosen=1, coefficient=1.0, scope="lane")
    even = 5 * torch.eye(4, dtype=torch.float64)
    padded = torch.cat([even, 7 * even[:1].expand(3, 4)])
    real = torch.tensor([True] * 4 + [False] * 3)
    found = balance([padded, padded], real, 11, routing, ())
    assert float(found.loss) == pytest.approx(11.0)
    assert found.load.tolist() == [[1.0] * 4] * 2
    uneven = balance([padded, padded], ~real, 11, routing, ())
    assert float(uneven.loss) == pytest.approx(11 * 4 * float(padded[4].softmax(-1)[0]))
    nothing = balance([padded, padded], torch.zeros(7, dtype=torch.bool), 0, routing, ())
    assert isinstance(nothing, Balance)
    assert float(nothing.loss) == 0.0


@pytest.mark.parametrize(
    ("asked", "given", "expected"), [(True, None, 0.02), (False, None, 0.0), (True, 0.0, 0.0), (False, 0.3, 0.3)]
)
def test_the_coefficient_is_the_runs_or_the_models_if_it_asks_for_it(
    asked: bool, given: float | None, expected: float, tmp_path: Path
) -> None:
    config = EXPERT_CONFIGS["llava_moe"]()
    config.text_config.output_router_logits, config.text_config.router_aux_loss_coef = asked, 0.02
    run = run_of(tmp_path, module("0"), module("0"), train={} if given is None else {"router_aux_loss": given})
    routing = routing_of(run, graph_of(blueprint_of(config, torch.float32)))
    assert routing is not None
    assert routing == Routing(2, 4, 2, expected, "lane")


def test_a_bfloat16_run_logs_the_balance_and_leaves_a_model_that_transformers_loads(tmp_path: Path) -> None:
    folder = write_model_folder(EXPERT_CONFIGS["llava_moe"](), tmp_path / "model", weights=True)
    run = run_of(
        folder,
        module("0"),
        module("0-3", pp=2, dp=2, ep=2),
        dtype="bfloat16",
        weights="pretrained",
        data={"source": "synthetic", "samples": 64, "eval_samples": 5},
        train={"steps": 3, **MICROBATCH},
        output=str(tmp_path / "out"),
    )
    config = read_model_config(folder)
    assert launch(run, lambda world, run: train(world, run, config)) is not None
    records = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    assert all(0.9 < record["router_aux_loss"] < 4 and 1 <= record["expert_imbalance"] <= 2 for record in records)
    before = dict(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict())
    after = dict(AutoModelForImageTextToText.from_pretrained(run.output / "model", dtype=torch.float32).state_dict())
    assert before.keys() == after.keys()
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 4
    for name in experts:
        assert 0 < float((before[name] - after[name]).norm() / before[name].norm()) < 0.1
