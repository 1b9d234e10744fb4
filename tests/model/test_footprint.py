"""Does the footprint say what ranks really hold?"""

import time

import pytest
import torch
from support.models import CONFIGS, llava, llava_moe
from support.ranks import run_ranks
from torch.distributed.tensor import DTensor

from meshweave.config import parse_config
from meshweave.errors import LayoutError
from meshweave.layout import Layout, Placement, placements
from meshweave.model.blueprint import STORED, blueprint_of
from meshweave.model.experts import expert_parameters
from meshweave.model.footprint import COPIES, footprints
from meshweave.model.modules import graph_of
from meshweave.model.stages import stage_cuts
from meshweave.parallel.build import build_model
from meshweave.parallel.mesh import build_expert_meshes, build_meshes

LAYOUTS = {
    "dp 4 and tp 2 × dp 2": ({"ranks": "0-3", "dp": 4}, {"ranks": "0-3", "tp": 2, "dp": 2}),
    "tp 2 × dp 2 and tp 4": ({"ranks": "0-3", "tp": 2, "dp": 2}, {"ranks": "0-3", "tp": 4}),
    "tp 4 and dp 4": ({"ranks": "0-3", "tp": 4}, {"ranks": "0-3", "dp": 4}),
    "dp 1 and dp 3, disjoint": ({"ranks": 0}, {"ranks": "1-3", "dp": 3}),
    "overlapping": ({"ranks": "0-2", "dp": 3}, {"ranks": "2-3", "tp": 2}),
    "replicas 2 × dp 2 and cp 2 × dp 2": ({"ranks": "0-3", "replicas": 2, "dp": 2}, {"ranks": "0-3", "cp": 2, "dp": 2}),
    "dp 4 and cp 2 × tp 2": ({"ranks": "0-3", "dp": 4}, {"ranks": "0-3", "cp": 2, "tp": 2}),
    "pp 2 × dp 2 and pp 2 × tp 2": ({"ranks": "0-3", "pp": 2, "dp": 2}, {"ranks": "0-3", "pp": 2, "tp": 2}),
}


def _run(vision, language, kind="shard", **top):
    return parse_config(
        {
            "model": "unused",
            "weights": "seeded",
            "modules": {
                "vision": {**vision, "data_parallel": kind},
                "language": {**language, "data_parallel": kind},
            },
            "train": {"steps": 1, "batch_size": 4},
            **top,
        }
    )


def _footprints(run, model_config, dtype=torch.float32):
    kinds = {name: module.data_parallel for name, module in run.modules.items()}
    graph = graph_of(blueprint_of(model_config, dtype))
    return footprints(graph, placements(run), kinds, stage_cuts(run, graph))


def _held(rank, runs, model_config):
    """Parameters of every module on this rank, one dict per run."""
    found = []
    for run in runs:
        placed = placements(run)
        meshes, expert_meshes = build_meshes(placed, "cpu"), build_expert_meshes(placed, "cpu")
        model = build_model(run, model_config, placed, meshes, rank, torch.device("cpu"), expert_meshes)
        found.append({name: _numel(module) for name, module in model.modules.items()})
    return found


def _numel(module):
    local = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters.values())
    return sum(part.numel() for part in local)


@pytest.mark.parametrize("model", ["llava", "llava_tied", "qwen3_vl"])
def test_equals_what_is_really_built(model):
    model_config = llava(tied=True) if model == "llava_tied" else CONFIGS[model]()
    cases = [(layouts, "shard") for layouts in LAYOUTS] + [("tp 2 × dp 2 and tp 4", "replicate")]
    runs = [_run(*LAYOUTS[layouts], kind) for layouts, kind in cases]
    built = run_ranks(4, _held, runs, model_config)
    for number, run in enumerate(runs):
        expected = _footprints(run, model_config)
        for rank in range(4):
            assert built[rank][number] == {
                name: footprint.local[rank] for name, footprint in expected.items() if rank in footprint.local
            }, f"rank {rank}, {cases[number]}"


EXPERT_LAYOUTS = {
    "ep 2 of dp 4": {"ranks": "0-3", "dp": 4, "ep": 2},
    "ep 4": {"ranks": "0-3", "dp": 4, "ep": 4},
    "etp 2 of dp 4": {"ranks": "0-3", "dp": 4, "etp": 2},
    "ep 2 × etp 2": {"ranks": "0-3", "dp": 4, "ep": 2, "etp": 2},
    "pp 2, ep 2": {"ranks": "0-3", "pp": 2, "dp": 2, "ep": 2},
    "cp 2 × tp 2": {"ranks": "0-3", "cp": 2, "tp": 2},
    "cp 2 × tp 2, ep 2": {"ranks": "0-3", "cp": 2, "tp": 2, "ep": 2},
}


@pytest.mark.parametrize("kind", ["shard", "replicate"])
def test_experts_equal_what_is_really_built(kind):
    runs = [_run({"ranks": "0"}, language, kind) for language in EXPERT_LAYOUTS.values()]
    built = run_ranks(4, _held, runs, llava_moe())
    for number, run in enumerate(runs):
        local = _footprints(run, llava_moe())["language"].local
        assert [found[number]["language"] for found in built] == [local[rank] for rank in range(4)], list(EXPERT_LAYOUTS)[number]


def test_what_experts_gather_for_a_step_is_counted():
    run = _run({"ranks": "0"}, {"ranks": "0-3", "dp": 4, "ep": 2})
    graph = graph_of(blueprint_of(llava_moe(), torch.float32))
    kinds = {name: module.data_parallel for name, module in run.modules.items()}
    found = footprints(graph, placements(run), kinds, stage_cuts(run, graph), kinds)["language"]
    experts = sum(value.numel() for value in expert_parameters(graph, "language").values())
    assert found.local[0] + found.gathered[0] == found.parameters - experts // 2


@pytest.mark.parametrize("model", sorted(CONFIGS))
def test_shards_over_dp_add_up_to_the_whole_module_once(model):
    run = _run({"ranks": "0-2", "dp": 3}, {"ranks": "0-4", "dp": 5})
    found = _footprints(run, CONFIGS[model]())
    for footprint in found.values():
        assert sum(footprint.local.values()) == footprint.parameters
    whole = sum(p.numel() for p in blueprint_of(CONFIGS[model](), torch.float32).parameters())
    assert sum(footprint.parameters for footprint in found.values()) == whole


def test_tied_embeddings_count_once_and_stay_whole_over_tp():
    run = _run({"ranks": "0-1", "dp": 2}, {"ranks": "0-1", "tp": 2})
    tied = _footprints(run, llava(tied=True))["language"]
    loose = _footprints(run, llava())["language"]
    head = 96 * 32
    assert loose.parameters - tied.parameters == head
    assert loose.local[0] - tied.local[0] == head // 2


@pytest.mark.parametrize(("dtype", "stored"), [("float32", 4), ("bfloat16", 4), ("float64", 8)])
def test_bytes_cover_parameter_gradient_and_both_moments_in_the_stored_dtype(dtype, stored):
    run = _run({"ranks": 0}, {"ranks": 0}, dtype=dtype)
    vision = _footprints(run, llava(), STORED[dtype])["vision"]
    assert COPIES == 4
    assert vision.local_bytes(0) == vision.parameters * 4 * stored
    assert vision.local_bytes(7) == 0


def test_replicas_hold_the_same_parameters_and_context_parallel_ranks_share_them():
    graph = graph_of(blueprint_of(llava(), torch.float32))
    layout = Layout(dp=2, cp=2, replicas=2)
    placed = {"language": Placement(layout, tuple(range(8)))}
    found = footprints(graph, placed, {"language": "shard"}, {"language": (range(2),)})["language"]
    local = [found.local[rank] for rank in range(8)]
    assert local[0:2] == local[2:4]
    assert local[4:6] == local[6:8]
    assert sum(local) == 2 * found.parameters


@pytest.mark.parametrize("tied", [False, True])
def test_stages_add_up_to_the_whole_module_and_tied_embeddings_count_on_both_ends(tied):
    run = _run({"ranks": "0-1", "pp": 2}, {"ranks": "0-1", "pp": 2})
    found = _footprints(run, llava(tied=tied))
    assert sum(found["vision"].local.values()) == found["vision"].parameters
    assert sum(found["language"].local.values()) == found["language"].parameters + tied * 96 * 32


def test_a_module_without_a_tensor_parallel_plan_is_refused(monkeypatch):
    monkeypatch.setattr("meshweave.model.families._plan_of", lambda config: None)
    run = _run({"ranks": "0-1", "tp": 2}, {"ranks": "0-1", "dp": 2})
    with pytest.raises(LayoutError, match=r"modules\.vision.*tensor-parallel plan.*set its tp to 1"):
        _footprints(run, llava())


def test_four_thousand_ranks_are_counted_quickly():
    graph = graph_of(blueprint_of(llava(), torch.float32))
    placed = {
        "vision": Placement(Layout(dp=4096), tuple(range(4096))),
        "language": Placement(Layout(dp=512, tp=4, cp=2), tuple(range(4096))),
    }
    start = time.perf_counter()
    found = footprints(graph, placed, {"vision": "shard", "language": "shard"}, {"vision": (range(3),), "language": (range(2),)})
    assert time.perf_counter() - start < 2.0
    assert sum(found["vision"].local.values()) == found["vision"].parameters


def test_what_stays_gathered_through_a_step_is_counted_with_its_gradients():
    """Whole parameters of the rank's stage, less its shard of them."""
    run = _run({"ranks": "0-3"}, {"ranks": "0-3", "pp": 2, "dp": 2})
    graph = graph_of(blueprint_of(llava(), torch.float32))
    kinds = {name: module.data_parallel for name, module in run.modules.items()}
    apart, together = (footprints(graph, placements(run), kinds, stage_cuts(run, graph), gathered) for gathered in ((), kinds))
    vision = together["vision"]
    assert vision.local == apart["vision"].local
    assert all(vision.local[rank] + vision.gathered[rank] == vision.parameters for rank in range(4))
    assert vision.local_bytes(0) == apart["vision"].local_bytes(0) + 2 * 4 * vision.gathered[0]
    language = together["language"]
    assert language.local[0] + language.local[1] == language.local[0] + language.gathered[0]
