"""Are the numbers of an uneven step right, on plans small enough to count by hand?"""

import time
from itertools import pairwise

import numpy as np
import pytest

from meshweave.batch.plan import MediaItem, MediaMeta, MicrobatchPlan, SampleMeta, StepPlan, plan_step
from meshweave.batch.slots import Packing
from meshweave.layout import Layout, Placement
from meshweave.report.imbalance import Uneven, imbalance, slowest_rank


def microbatch(*lanes: tuple[int, ...], costs: tuple[tuple[float, ...], ...]) -> MicrobatchPlan:
    """Samples of these lengths in each language lane; items of these costs in each encoder lane."""
    samples = tuple(tuple(SampleMeta(0, tokens) for tokens in lane) for lane in lanes)
    items = tuple(MediaItem(0, 0, MediaMeta("vision", 1, cost)) for lane in costs for cost in lane)
    ends = np.cumsum([0, *map(len, costs)])
    numbers = tuple(tuple(range(begin, end)) for begin, end in pairwise(ends))
    return MicrobatchPlan(samples, {"vision": items}, {"vision": numbers})


UNEVEN = StepPlan(
    (
        microbatch((10, 30), (20,), costs=((6.0,), (2.0,))),
        microbatch((10,), (10,), costs=((1.0, 1.0), (2.0,))),
    ),
    {"vision": 1},
)


def test_padded_rows_cost_as_much_as_the_longest():
    found = imbalance(UNEVEN, Packing())
    assert (found.tokens, found.positions, found.fullest) == (80, 100, 60)
    assert found.padding == pytest.approx(0.2)
    assert found.slots == Uneven(60 / 25, 30 / 25)
    assert found.microbatch_lanes == Uneven(70 / 50)
    assert found.language_lanes == Uneven(70 / 50)
    assert found.microbatches == Uneven(80 / 50)


def test_packed_sequences_are_padded_to_a_multiple_only_and_cost_their_samples():
    found = imbalance(UNEVEN, Packing(packed=True, multiple=16))
    assert (found.tokens, found.positions, found.fullest) == (80, 48 + 32 + 16 + 16, 48)
    assert found.slots == Uneven(40 / 20, 30 / 20)
    squares = imbalance(UNEVEN, Packing(packed=True, per_token=0.0, per_pair=1.0))
    assert squares.slots.ratio == pytest.approx((100 + 900) / (1600 / 4))


def test_encoder_lanes_wait_for_each_other_in_every_pass():
    found = imbalance(UNEVEN, Packing())
    assert found.encoder_lanes["vision"] == Uneven((6 + 2) / (4 + 2), (6 + 2) / (4 + 2))
    assert found.encoder_passes["vision"] == Uneven(8 / 6)
    together = imbalance(StepPlan(UNEVEN.microbatches, {"vision": 2}), Packing())
    assert together.encoder_lanes["vision"] == Uneven(8 / 6)
    assert together.encoder_passes["vision"] == Uneven(1.0)


def test_equal_items_that_lanes_do_not_divide_bound_how_even_lanes_can_be():
    plan = StepPlan((microbatch((9,), costs=((1.0, 1.0), (1.0,))),), {"vision": 1})
    assert imbalance(plan, Packing()).encoder_lanes["vision"] == Uneven(2 / 1.5, 2 / 1.5)


def test_a_step_of_nothing_is_even():
    plan = plan_step([], microbatches=2, language_lanes=2, encoder_lanes={"vision": 2})
    found = imbalance(plan, Packing())
    assert found.padding == 0.0
    assert found.slots == found.encoder_lanes["vision"] == found.encoder_passes["vision"] == Uneven(1.0)


def placed(first: int, **sizes: int) -> Placement:
    layout = Layout(**sizes)
    return Placement(layout, tuple(range(first, first + layout.size)))


@pytest.mark.parametrize(
    ("vision", "language", "expected"),
    [
        (placed(0, dp=2), placed(0, dp=2), 8 + 60 + 10),  # one after the other on the same ranks
        (placed(2, dp=2), placed(0, dp=2), 60 + 10),  # at the same time
        (placed(0, dp=2, tp=2), placed(0, dp=2, tp=2), (8 + 60 + 10) / 2),
        (placed(0, dp=4), placed(0, pp=2, dp=2), 8 + (60 + 10 + 60) / 2),  # a pipeline runs at its heaviest microbatch's pace
    ],
)
def test_the_slowest_rank_waits_for_the_heaviest_lanes(vision, language, expected):
    where = {"vision": vision, "language": language}
    assert slowest_rank(UNEVEN, Packing(), {"vision": lambda meta: meta.cost}, where) == pytest.approx(expected)


def test_thousands_of_lanes_take_seconds():
    samples = [SampleMeta(n, 10 + n % 99, (MediaMeta("vision", 4, 1.0 + n % 7),) * 2) for n in range(20_000)]
    begun = time.process_time()
    plan = plan_step(samples, microbatches=4, language_lanes=2048, encoder_lanes={"vision": 4096})
    found = imbalance(plan, Packing())
    seconds = time.process_time() - begun
    assert found.tokens == sum(sample.tokens for sample in samples)
    assert seconds < 10, f"{seconds:.2f} s"  # about 0.6 s on an idle core
