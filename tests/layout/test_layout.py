"""Does the geometry of ranks agree with a numpy array of the same shape, for any layout?"""

import time
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshweave.config import parse_config
from meshweave.errors import LayoutError
from meshweave.layout import AXES, EXPERT_AXES, Layout, Placement, format_ranks, placements, relation

SIZES = st.sampled_from([1, 1, 2, 3, 4])


@st.composite
def placed(draw):
    """A layout with any sizes, on any ranks in any order."""
    pp, dp, replicas, cp, tp = (draw(SIZES) for _ in AXES)
    stage = dp * replicas * cp * tp
    ep = draw(st.sampled_from([size for size in range(1, stage + 1) if stage % size == 0]))
    etp = draw(st.sampled_from([size for size in range(1, stage // ep + 1) if stage // ep % size == 0]))
    layout = Layout(pp=pp, dp=dp, replicas=replicas, cp=cp, tp=tp, ep=ep, etp=etp)
    highest = layout.size + draw(st.integers(0, 10))
    shuffled = draw(st.randoms(use_true_random=False)).sample(range(highest), highest)
    return Placement(layout, tuple(shuffled[: layout.size])), highest


def _grid(placement, axes):
    return np.array(placement.ranks).reshape(placement.layout.sizes(axes))


@settings(max_examples=50, deadline=None)
@given(placed(), st.sampled_from([AXES, EXPERT_AXES]))
def test_coordinates_and_groups_are_those_of_a_reshaped_array(case, axes):
    placement, _ = case
    grid = _grid(placement, axes)
    for index in np.ndindex(grid.shape):
        rank = int(grid[index])
        assert placement.coordinate(rank, axes) == dict(zip(axes, index, strict=True))
        for number, axis in enumerate(axes):
            line = grid[tuple(slice(None) if at == number else place for at, place in enumerate(index))]
            assert placement.group(rank, axis, axes) == tuple(line.tolist())


@settings(max_examples=50, deadline=None)
@given(placed())
def test_lanes_are_the_ranks_of_one_dp_index_of_one_stage(case):
    placement, _ = case
    grid = _grid(placement, AXES)
    for stage in range(placement.layout.pp):
        lanes = placement.lanes(stage)
        assert lanes == tuple(tuple(grid[stage, lane].ravel().tolist()) for lane in range(placement.layout.dp))
        for lane, ranks in enumerate(lanes):
            assert {placement.lane(rank) for rank in ranks} == {lane}
            assert len(ranks) == placement.layout.lane_size


@settings(max_examples=40, deadline=None)
@given(placed())
def test_the_nested_grid_has_the_shape_of_the_layout(case):
    placement, _ = case
    assert np.array(placement.grid()).shape == placement.layout.sizes()
    assert np.array_equal(np.array(placement.grid()), _grid(placement, AXES))


@settings(max_examples=40, deadline=None)
@given(placed())
def test_a_rank_outside_a_placement_has_no_coordinate_no_lane_and_no_group(case):
    placement, highest = case
    outside = sorted({*range(highest), highest, highest + 7} - set(placement.ranks))
    for rank in outside:
        assert rank not in placement
        assert placement.coordinate(rank) is None
        assert placement.coordinate(rank, EXPERT_AXES) is None
        assert placement.lane(rank) is None
        assert placement.group(rank, "tp") == ()


@settings(max_examples=40, deadline=None)
@given(placed())
def test_the_expert_view_covers_the_same_ranks_and_stays_inside_a_pipeline_stage(case):
    placement, _ = case
    layout = placement.layout
    assert prod(layout.sizes(EXPERT_AXES)) == layout.size == prod(layout.sizes())
    for rank in placement.ranks:
        stage = placement.coordinate(rank)["pp"]
        assert placement.coordinate(rank, EXPERT_AXES)["pp"] == stage
        group = placement.group(rank, "ep", EXPERT_AXES)
        assert len(group) == layout.ep
        assert {placement.coordinate(other)["pp"] for other in group} == {stage}


def test_tp_is_innermost_then_cp_replicas_dp_and_pp():
    placement = Placement(Layout(pp=2, dp=2, replicas=2, cp=2, tp=2), tuple(range(32)))
    strides = {axis: placement.group(0, axis)[1] for axis in AXES}
    assert strides == {"tp": 1, "cp": 2, "replicas": 4, "dp": 8, "pp": 16}


def test_the_order_in_which_ranks_are_given_is_the_order_of_the_layout():
    placement = Placement(Layout(dp=2, tp=2), (7, 3, 5, 1))
    assert placement.lanes() == ((7, 3), (5, 1))
    assert placement.group(1, "dp") == (3, 1)
    assert placement.coordinate(5) == {"pp": 0, "dp": 1, "replicas": 0, "cp": 0, "tp": 0}


def test_geometry_of_4096_ranks_is_right_and_quick():
    layout = Layout(pp=4, dp=16, cp=8, tp=8, ep=32, etp=2)
    ranks = np.random.default_rng(0).permutation(5000)[:4096]
    grid, experts = ranks.reshape(4, 16, 1, 8, 8), ranks.reshape(4, 16, 32, 2)
    where = {int(rank): index for index, rank in np.ndenumerate(grid)}
    where_expert = {int(rank): index for index, rank in np.ndenumerate(experts)}
    start = time.perf_counter()
    placement = Placement(layout, tuple(ranks.tolist()))
    for rank in placement.ranks:
        pp, dp, replica, cp, tp = where[rank]
        assert placement.coordinate(rank) == {"pp": pp, "dp": dp, "replicas": replica, "cp": cp, "tp": tp}
        assert placement.group(rank, "tp") == tuple(grid[pp, dp, replica, cp].tolist())
        assert placement.group(rank, "dp") == tuple(grid[pp, :, replica, cp, tp].tolist())
        stage, edp, _, etp = where_expert[rank]
        assert placement.group(rank, "ep", EXPERT_AXES) == tuple(experts[stage, edp, :, etp].tolist())
    assert [len(lane) for lane in placement.lanes(3)] == [64] * 16
    assert time.perf_counter() - start < 5.0


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 1, 2, 3), (3, 2, 1, 0), "colocated"),
        ((0, 1), (2, 3), "non-colocated"),
        ((0, 1, 2), (2, 3), "overlapping"),
        ((0, 1), (0, 1, 2, 3), "overlapping"),
    ],
)
def test_the_relation_of_two_placements_follows_from_their_rank_sets(first, second, expected):
    one, two = (Placement(Layout(dp=len(ranks)), ranks) for ranks in (first, second))
    assert relation(one, two) == relation(two, one) == expected


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 0}, r"tp=0.*at least 1"),
        ({"replicas": -2}, r"replicas=-2.*at least 1"),
        ({"dp": 4, "ep": 3}, r"ep=3 × etp=1 does not divide the 4 ranks.*dp=4"),
        ({"dp": 2, "ep": 2, "etp": 2}, r"ep=2 × etp=2 does not divide the 2 ranks"),
    ],
)
def test_impossible_sizes_are_refused_by_name_and_value(sizes, message):
    with pytest.raises(LayoutError, match=message):
        Layout(**sizes)


def test_experts_may_span_data_and_context_parallel_ranks_but_not_stages():
    assert Layout(pp=2, dp=2, cp=2, ep=4).sizes(EXPERT_AXES) == (2, 1, 4, 1)
    with pytest.raises(LayoutError, match="ep=8"):
        Layout(pp=2, dp=2, cp=2, ep=8)


@pytest.mark.parametrize(
    ("layout", "ranks", "message"),
    [
        (Layout(dp=4), (0, 1, 1, 2), "ranks 1 appear twice"),
        (Layout(dp=2), (0, -1), "counted from 0, got -1"),
        (Layout(dp=2, tp=2), (0, 1, 2), r"dp2 tp2 needs 4 ranks, but 3 are given: 0-2"),
    ],
)
def test_ranks_that_do_not_fit_the_layout_are_refused(layout, ranks, message):
    with pytest.raises(LayoutError, match=message):
        Placement(layout, ranks)


@pytest.mark.parametrize(
    ("layout", "text"),
    [(Layout(), "dp1"), (Layout(dp=8), "dp8"), (Layout(pp=2, dp=2, cp=2, tp=4, ep=8), "pp2 dp2 cp2 tp4 ep8")],
)
def test_a_layout_reads_as_its_sizes_above_one(layout, text):
    assert str(layout) == text


@pytest.mark.parametrize(
    ("ranks", "text"),
    [((), ""), ((3,), "3"), ((0, 1, 2, 3), "0-3"), ((0, 2, 4, 5, 6), "0,2,4-6"), ((1, 0), "1,0")],
)
def test_ranks_read_as_runs(ranks, text):
    assert format_ranks(ranks) == text


def test_a_placement_reads_as_its_layout_and_ranks():
    assert str(Placement(Layout(dp=2, tp=2), (4, 5, 6, 9))) == "dp2 tp2 on ranks 4-6,9"


def _run(**modules):
    return parse_config({"model": "m", "modules": modules, "train": {"steps": 1, "batch_size": 1}})


def test_placements_of_a_run_keep_its_order_and_sizes():
    run = _run(vision={"ranks": "0-3", "tp": 2}, language={"ranks": "0-7", "cp": 2, "tp": 2})
    found = placements(run)
    assert list(found) == ["vision", "language"]
    assert found["vision"] == Placement(Layout(dp=2, tp=2), (0, 1, 2, 3))
    assert found["language"] == Placement(Layout(dp=2, cp=2, tp=2), tuple(range(8)))


def test_sizes_of_experts_that_do_not_divide_are_refused_with_the_name_of_the_module():
    run = _run(language={"ranks": "0-3", "tp": 2, "ep": 3})
    with pytest.raises(LayoutError, match=r"modules\.language: ep=3 × etp=1 does not divide the 4 ranks"):
        placements(run)
