"""Where samples lie in a lane's batch, and which columns each rank holds."""

import numpy as np
import pytest

from meshweave.batch.plan import MediaMeta, SampleMeta
from meshweave.sequence import Mask
from meshweave.sequence.grid import UNCUT, SequenceRule, lay_out

SAMPLES = [
    SampleMeta(0, 7, (MediaMeta("vision", 3, 3.0, runs=((1, 3),)), MediaMeta("vision", 2, 2.0, runs=((4, 2),)))),
    SampleMeta(1, 4),
    SampleMeta(2, 9, (MediaMeta("audio", 2, 1.0, runs=((1, 2),)), MediaMeta("vision", 4, 4.0, runs=((3, 2), (6, 2))))),
]


def test_uncut_samples_lie_one_a_row() -> None:
    grid = lay_out(SAMPLES, UNCUT)
    assert (grid.rows, grid.length, grid.places) == (3, 9, ((0, 0, 7), (1, 0, 4), (2, 0, 9)))
    assert grid.real().sum(axis=1).tolist() == [7, 4, 9]
    assert not grid.cut


@pytest.mark.parametrize(("cp", "tp"), [(1, 1), (2, 1), (1, 4), (3, 2), (4, 2)])
def test_packed_samples_lie_in_one_row_of_which_every_rank_holds_as_much(cp: int, tp: int) -> None:
    grid = lay_out(SAMPLES, SequenceRule(True, cp, tp, (Mask(),)))
    assert (grid.rows, grid.places) == (1, ((0, 0, 7), (0, 7, 11), (0, 11, 20)))
    assert grid.length - 20 in range(cp * tp)
    held = [np.concatenate([np.arange(*interval) for interval in part]) for part in grid.parts]
    assert sorted(np.concatenate(held).tolist()) == list(range(grid.length))
    assert {len(its) for its in held} == {grid.part_length}
    assert grid.part_length % tp == 0
    assert grid.cut == (cp * tp > 1)


def test_media_tokens_that_touch_see_each_other_if_some_layer_lets_them() -> None:
    grid = lay_out(SAMPLES, SequenceRule(True, masks=(Mask(two_way=True),), two_way="vision"))
    assert grid.sequence is not None
    assert [document.two_way for document in grid.sequence.documents] == [((1, 6),), (), ((14, 16), (17, 19))]
    causal = lay_out(SAMPLES, SequenceRule(True, masks=(Mask(),)))
    assert causal.sequence is not None
    assert not any(document.two_way for document in causal.sequence.documents)


@pytest.mark.parametrize("rule", [UNCUT, SequenceRule(True, 2, 2, (Mask(),))])
def test_a_lane_without_samples_is_padding_alone(rule: SequenceRule) -> None:
    grid = lay_out([], rule)
    assert (grid.rows, grid.places) == (1, ())
    assert grid.length == rule.cp * rule.tp
    assert not grid.real().any()
