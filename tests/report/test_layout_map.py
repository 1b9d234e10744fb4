"""Does the layout map say who holds what, and stay readable from one rank to thousands?"""

import re
import time
from io import StringIO

import pytest
import torch
from rich.console import Console
from support.models import llava

from meshweave.batch.plan import plan_step
from meshweave.config import parse_config
from meshweave.data.synthetic import SyntheticDataset
from meshweave.layout import placements
from meshweave.model.blueprint import blueprint_of
from meshweave.model.footprint import footprints
from meshweave.model.modules import graph_of
from meshweave.model.stages import stage_cuts
from meshweave.report.layout_map import render_layout_map, title
from meshweave.report.traffic import boundary_traffic

COLOCATED = {"vision": {"ranks": "0-3"}, "language": {"ranks": "0-3", "tp": 2}}
WORLDS = {
    "4 ranks, colocated": (COLOCATED, {}),
    "1 rank": ({"vision": {"ranks": 0}, "language": {"ranks": 0}}, {}),
    "9 ranks, disjoint, one idle": (
        {"vision": {"ranks": "0-1"}, "language": {"ranks": "2-7", "tp": 2}},
        {"idle_ranks": 8, "node_size": 4},
    ),
    "64 ranks": (
        {"vision": {"ranks": "0-63"}, "language": {"ranks": "0-63", "cp": 2, "tp": 8}},
        {"node_size": 8},
    ),
    "80 ranks, overlapping": (
        {"vision": {"ranks": "0-39"}, "language": {"ranks": "16-79", "tp": 2}},
        {"node_size": 8},
    ),
    "1024 ranks, pipeline": (
        {"vision": {"ranks": "0-511"}, "language": {"ranks": "0-1023", "tp": 8, "pp": 2}},
        {"node_size": 8},
    ),
}


def _run(modules, top):
    train = {"steps": 1, "batch_size": 16}
    return parse_config({"model": "unused", "modules": modules, "train": train, **top})


def _map(modules, top, with_traffic=True):
    run = _run(modules, top)
    placed = placements(run)
    graph = graph_of(blueprint_of(llava(), torch.float32))
    kinds = {name: module.data_parallel for name, module in run.modules.items()}
    traffic = ()
    if with_traffic:
        dataset = SyntheticDataset(llava(), 64)
        lanes = {name: placement.layout.dp for name, placement in placed.items()}
        samples = [dataset.meta(index) for index in range(64)]
        language_lanes = lanes.pop("language")
        plan = plan_step(samples, microbatches=1, language_lanes=language_lanes, encoder_lanes=lanes)
        traffic = boundary_traffic(plan, placed, {"vision": 128}, node_size=run.node_size)
    return render_layout_map(run, placed, footprints(graph, placed, kinds, stage_cuts(run, graph)), traffic), traffic


def _text(renderable, width):
    out = StringIO()
    Console(file=out, width=width).print(renderable)
    return out.getvalue()


def _squeezed(text):
    return [re.sub(r"\s+", " ", line).strip() for line in text.splitlines()]


def test_every_rank_of_a_small_world_has_a_row_with_its_part_of_every_module():
    lines = _squeezed(_text(_map(COLOCATED, {})[0], 100))
    assert lines[0] == "4 ranks · vision and language colocated"
    assert lines[2:8] == [
        "rank vision parameters language parameters",
        "─" * len(lines[3]),
        "0 lane 0 8,672 lane 0 · tp 0/2 6,752",
        "1 lane 1 8,672 lane 0 · tp 1/2 6,752",
        "2 lane 2 8,672 lane 1 · tp 0/2 6,752",
        "3 lane 3 8,576 lane 1 · tp 1/2 6,752",
    ]


def test_every_module_has_its_lanes_groups_parameters_and_memory():
    lines = _squeezed(_text(_map(COLOCATED, {})[0], 100))
    start = lines.index("language dp2 tp2 on ranks 0-3")
    assert lines[start + 1 : start + 6] == [
        "lanes 2 of 2 ranks: 0-1 │ 2-3",
        "dp groups 2 of 2 ranks: 0,2 │ 1,3",
        "tp groups 2 of 2 ranks: 0-1 │ 2-3",
        "parameters 23.7 K in all, 6,752 a rank, sharded over dp",
        "memory 106 KiB a rank for parameters, gradients and AdamW",  # 6752 · 4 copies · 4 bytes
    ]
    assert "Fullest rank: 0, 241 KiB; activations come on top." in lines


def test_replicated_parameters_say_so():
    modules = {name: module | {"data_parallel": "replicate"} for name, module in COLOCATED.items()}
    assert "parameters 34.6 K in all, 34.6 K a rank, replicated over dp" in _squeezed(_text(_map(modules, {})[0], 100))


def test_the_boundary_shows_bytes_over_links_beside_the_lower_bound():
    renderable, (traffic,) = _map(COLOCATED, {})
    lines = _squeezed(_text(renderable, 100))
    contents = f"{traffic.items} media items, {traffic.tokens:,} tokens of 128 B"
    start = lines.index(f"vision → language, a step of 64 samples: {contents}")
    moved, copied = (f"{count * 128 / 1024:.0f} KiB" for count in (traffic.forward.moved, traffic.forward.copied))
    assert lines[start + 4].startswith(f"forward {moved} {moved} {copied}")
    assert lines[start + 5].startswith("backward")
    assert not any("between" in line for line in lines)


def test_ranks_that_no_module_uses_are_shown_as_idle():
    lines = _squeezed(_text(_map(*WORLDS["9 ranks, disjoint, one idle"])[0], 100))
    assert lines[0] == "9 ranks · vision and language non-colocated · idle: 8"
    assert "8 idle idle" in lines
    assert "0 lane 0 17.3 K –" in lines


def test_the_same_layout_on_the_same_ranks_is_called_homogeneous():
    run = _run({name: {"ranks": "0-3", "tp": 2} for name in ("vision", "language")}, {})
    assert title(run, placements(run)) == "4 ranks · vision and language colocated and homogeneous"


def test_above_32_ranks_the_ranks_of_a_lane_share_a_row():
    lines = _squeezed(_text(_map(*WORLDS["64 ranks"])[0], 100))
    assert "0-15 lanes 0-15 997 lane 0 · cp 0-1/2 · tp 0-7/8 872" in lines
    assert "16-31 lanes 16-31 965 to 997 lane 1 · cp 0-1/2 · tp 0-7/8 872" in lines
    assert "lanes 64 of 1 rank: 0-63" in lines


def test_long_runs_of_equal_rows_are_left_out_and_counted():
    lines = _squeezed(_text(_map(*WORLDS["80 ranks, overlapping"])[0], 100))
    rows = lines[4 : lines.index("", 4)]
    assert rows[:4] == ["0 lane 0 1,096 –", "1 lane 1 1,096 –", "⋮ 13 more like these", "15 lane 15 1,096 –"]
    assert rows[-1].startswith("78-79 – lane 31 · tp 0-1/2")
    assert len(rows) == 12


def test_interleaved_ranks_are_grouped_by_their_modules():
    even, odd = list(range(0, 80, 2)), list(range(1, 80, 2))
    text = _text(_map({"vision": {"ranks": even}, "language": {"ranks": odd, "tp": 2}}, {})[0], 100)
    lines = _squeezed(text)
    assert "0 lane 0 1,096 –" in lines
    assert any(line.startswith("1,3 – lane 0 · tp 0-1/2") for line in lines)
    assert len(lines) < 40


def test_groups_of_the_expert_view_are_shown():
    modules = {"vision": {"ranks": "0-7"}, "language": {"ranks": "0-7", "ep": 2, "etp": 2}}
    lines = _squeezed(_text(_map(modules, {})[0], 140))
    assert "ep groups 4 of 2 ranks: 0,2 │ 1,3 │ 4,6 │ 5,7" in lines
    assert "etp groups 4 of 2 ranks: 0-1 │ 2-3 │ 4-5 │ 6-7" in lines
    assert "edp groups 4 of 2 ranks: 0,4 │ 1,5 │ 2,6 │ 3,7" in lines


def test_a_pipeline_shows_each_ranks_stage_and_its_part():
    lines = _squeezed(_text(_map(*WORLDS["1024 ranks, pipeline"])[0], 140))
    (last,) = [line for line in lines if line.startswith("1016-1023 ")]
    assert last.startswith("1016-1023 – lane 63 · stage 1/2 · tp 0-7/8 ")
    assert not last.endswith("?")


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("world", WORLDS)
def test_the_map_fits_the_terminal_and_one_or_two_screens(world, width):
    text = _text(_map(*WORLDS[world])[0], width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= 60
    assert "…" not in lines[0]


def test_4096_ranks_are_drawn_quickly():
    modules = {"vision": {"ranks": "0-4095"}, "language": {"ranks": "0-4095", "tp": 8, "cp": 4}}
    start = time.perf_counter()
    text = _text(_map(modules, {"node_size": 8}, with_traffic=False)[0], 80)
    assert time.perf_counter() - start < 5.0
    assert len(text.splitlines()) < 60
