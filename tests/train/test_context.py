"""Sequences cut over `cp`, over `tp`, or packed: the model trains as in one process."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.models import CONFIGS, llava_moe, with_layers, write_model_folder
from support.runs import module, run_of, verified

FAMILIES = CONFIGS | {"llava_moe": llava_moe}


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
    "colocated: dp2 and cp2": Case("llava", module("0-1", dp=2), module("0-1", cp=2)),
    "colocated: dp4 and cp2 tp2": Case("qwen3_vl", module("0-3", dp=4), module("0-3", cp=2, tp=2)),
    "colocated: dp4 and cp4": Case("llava", module("0-3", dp=4), module("0-3", cp=4)),
    "colocated: dp4 and cp2 dp2": Case("qwen3_vl", module("0-3", dp=4), module("0-3", cp=2, dp=2)),
    "colocated: dp3 and cp3": Case("qwen3_vl", module("0-2", dp=3), module("0-2", cp=3)),
    "colocated: replicas and cp2 dp2": Case("llava", module("0-3", dp=2, replicas=2), module("0-3", cp=2, dp=2)),
    "colocated: replicas 4 and cp4": Case("qwen3_vl", module("0-3", replicas=4), module("0-3", cp=4)),
    "apart: dp2 into cp2 pp2": Case("llava", module("0-1", dp=2), module("2-5", cp=2, pp=2), layers=3),
    "apart: dp3 into cp2 tp2": Case("qwen3_vl", module("0-2", dp=3), module("3-6", cp=2, tp=2)),
    "nested: cp2 pp2": Case(
        "qwen3_vl",
        module("0-3", dp=4),
        module("0-3", cp=2, pp=2),
        {"microbatches": 4},
        {"schedule": {"encoders": "nested"}},
        layers=3,
    ),
    "tied: cp2 tp2": Case("llava", module("0-3", dp=4), module("0-3", cp=2, tp=2), tied=True),
    "tied: cp2 pp2": Case("llava", module("0-1", dp=2), module("0-3", cp=2, pp=2), tied=True),
    "packed": Case("qwen3_vl", module("0-1", dp=2), module("0-1", dp=2), {"pack": True}),
    "without sequence parallelism": Case("llava", module("0-1", dp=2), module("0-1", tp=2, sequence_parallel=False)),
    "without sequence parallelism, cp2": Case(
        "qwen3_vl", module("0-3", dp=4), module("0-3", tp=2, cp=2, sequence_parallel=False)
    ),
    "experts: ep2 etp2, tp2 cp2": Case("llava_moe", module("0-3", dp=4), module("0-3", cp=2, tp=2, ep=2, etp=2), layers=3),
    "experts: ep2, tp2 pp2": Case("llava_moe", module("0-3", dp=4), module("0-3", tp=2, pp=2, ep=2), layers=3),
    "experts: etp2, cp2": Case("llava_moe", module("0-1", dp=2), module("0-1", cp=2, etp=2), {"router_aux_loss": 0.1}, layers=3),
    "experts: ep4, cp2 tp2, even over all lanes": Case(
        "llava_moe",
        module("0-3", dp=4),
        module("0-3", dp=2, tp=2, ep=4),
        {"router_aux_loss": 0.1, "router_aux_scope": "microbatch"},
        layers=3,
    ),
    "ulysses: cp2": Case("llava", module("0-1", dp=2), module("0-1", cp=2, context_parallel="ulysses")),
    "ulysses: cp4 of 4 kv heads, pp1 apart": Case("qwen3_vl", module("0"), module("1-4", cp=4, context_parallel="ulysses")),
    "ulysses: cp4 of 2 kv heads a rank, tp2": Case("llava", module("0"), module("0-7", cp=4, tp=2, context_parallel="ulysses")),
    "encoder: cp2 and dp2": Case("qwen3_vl", module("0-1", cp=2), module("0-1", dp=2)),
    "encoder: cp2 dp2 and cp2 tp2, deepstack": Case("qwen3_vl", module("0-3", cp=2, dp=2), module("0-3", cp=2, tp=2)),
    "encoder: cp2 tp2 into pp2": Case("qwen3_vl", module("0-3", cp=2, tp=2), module("4-5", pp=2), layers=3),
    "encoder: cp4, windows": Case("qwen2_5_vl", module("0-3", cp=4), module("0-3", dp=4)),
    "encoder: cp2, replicas": Case("qwen2_5_vl", module("0-3", cp=2, replicas=2), module("0-3", cp=4)),
    "replicated": Case("llava", module("0-3", dp=4), module("0-3", cp=2, tp=2, data_parallel="replicate")),
}


@pytest.mark.parametrize("case", CASES)
def test_a_cut_sequence_equals_the_single_process(case: str, tmp_path: Path) -> None:
    its = CASES[case]
    config = with_layers(
        FAMILIES[its.family](tied=its.tied) if its.tied else FAMILIES[its.family](),
        3,
        max(its.layers, 2 + (its.family == "qwen3_vl")),
    )
    write_model_folder(config, tmp_path)
    report = verified(run_of(tmp_path, its.vision, its.language, train=its.train, **its.changes), steps=2)
    assert report.passed, report
