"""Does every sample and every media item get exactly one place, and are lanes balanced?"""

import random
import time
from collections import Counter
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshweave.batch.plan import EncoderPasses, MediaMeta, SampleMeta, StepPlan, balance, deal_step, plan_step
from meshweave.batch.slots import Packing
from meshweave.errors import LayoutError

MODULES = ("vision", "audio")


def image(cost: float = 1.0, tokens: int = 4, module: str = "vision") -> MediaMeta:
    return MediaMeta(module, tokens, cost)


media = st.builds(
    MediaMeta,
    module=st.sampled_from(MODULES),
    tokens=st.integers(1, 50),
    cost=st.floats(0, 1e6, allow_nan=False),
)


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[SampleMeta], int, int, dict[str, int], Packing]:
    found = draw(st.lists(st.tuples(st.integers(1, 500), st.lists(media, max_size=9)), max_size=24))
    ids = draw(st.permutations(range(100, 100 + len(found))))
    samples = [SampleMeta(i, t, tuple(m)) for i, (t, m) in zip(ids, found, strict=True)]
    encoder_lanes = {module: draw(st.integers(1, 5)) for module in MODULES}
    packing = Packing(draw(st.booleans()), per_pair=draw(st.sampled_from((0.0, 0.01))))
    return samples, draw(st.integers(1, 5)), draw(st.integers(1, 5)), encoder_lanes, packing


def planned(step: tuple[list[SampleMeta], int, int, dict[str, int], Packing]) -> StepPlan:
    samples, microbatches, language_lanes, encoder_lanes, packing = step
    return plan_step(
        samples, microbatches=microbatches, language_lanes=language_lanes, encoder_lanes=encoder_lanes, packing=packing
    )


@given(steps())
def test_every_sample_is_in_one_lane_of_one_microbatch_and_no_lane_is_empty_while_there_are_enough(step):
    samples, microbatches, language_lanes, *_ = step
    plan = planned(step)
    slots = [lane for microbatch in plan.microbatches for lane in microbatch.lanes]
    assert len(plan.microbatches) == microbatches
    assert len(slots) == microbatches * language_lanes
    assert Counter(sample for slot in slots for sample in slot) == Counter(samples)
    assert sum(map(bool, slots)) == min(len(slots), len(samples))
    order = {sample.sample: place for place, sample in enumerate(samples)}
    assert all([order[s.sample] for s in slot] == sorted(order[s.sample] for s in slot) for slot in slots)


@given(steps())
def test_every_media_item_is_encoded_once_in_the_microbatch_of_its_sample(step):
    for microbatch in planned(step).microbatches:
        for module, lanes in step[3].items():
            expected = [
                (sample.sample, slot, meta)
                for lane in microbatch.lanes
                for sample in lane
                for slot, meta in enumerate(sample.media)
                if meta.module == module
            ]
            assert [(item.sample, item.slot, item.meta) for item in microbatch.items[module]] == expected
            encoder_lanes = microbatch.encoder_lanes[module]
            assert len(encoder_lanes) == lanes
            assert sorted(number for lane in encoder_lanes for number in lane) == list(range(len(expected)))
            assert all(list(lane) == sorted(lane) for lane in encoder_lanes)


@given(steps())
def test_language_lanes_know_the_numbers_of_the_items_they_embed(step):
    for microbatch in planned(step).microbatches:
        for module in MODULES:
            lanes = microbatch.language_items(module)
            assert [n for lane in lanes for n in lane] == list(range(len(microbatch.items[module])))
            for samples, numbers in zip(microbatch.lanes, lanes, strict=True):
                owners = [microbatch.items[module][number].sample for number in numbers]
                assert owners == [s.sample for s in samples for m in s.media if m.module == module]


@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(1, 8))
def test_no_lane_carries_more_than_the_mean_and_a_part_of_the_largest_item(costs, lanes):
    loads = [sum(costs[item] for item in lane) for lane in balance(costs, [1.0] * lanes)]
    # A lane that ends heaviest was the lightest before its last item, i.e. at most the mean of the others.
    assert max(loads) <= sum(costs) / lanes + (1 - 1 / lanes) * max(costs, default=0) + 1e-9


@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(1, 3))
def test_the_heaviest_lane_is_within_grahams_bound_of_the_best_possible(costs, lanes):
    def heaviest(choice):
        return max(sum(c for c, lane in zip(costs, choice, strict=True) if lane == n) for n in range(lanes))

    best = min(heaviest(choice) for choice in product(range(lanes), repeat=len(costs)))
    loads = [sum(costs[item] for item in lane) for lane in balance(costs, [1.0] * lanes)]
    assert max(loads) <= (4 / 3 - 1 / (3 * lanes)) * best + 1e-9


def test_one_sample_with_nine_images_does_not_stall_one_encoder_lane():
    samples = [SampleMeta(0, 900, (image(),) * 9), *(SampleMeta(n, 100, (image(),)) for n in range(1, 4))]
    [microbatch] = plan_step(samples, microbatches=1, language_lanes=4, encoder_lanes={"vision": 4}).microbatches
    assert [len(lane) for lane in microbatch.encoder_lanes["vision"]] == [3, 3, 3, 3]


def test_items_are_balanced_by_cost_not_by_number():
    samples = [SampleMeta(0, 9, (image(6), image(1), image(1), image(1), image(1), image(2)))]
    [microbatch] = plan_step(samples, microbatches=1, language_lanes=1, encoder_lanes={"vision": 2}).microbatches
    assert microbatch.encoder_lanes["vision"] == ((0,), (1, 2, 3, 4, 5))


def lengths_of(plan):
    return [sorted(sample.tokens for sample in lane) for microbatch in plan.microbatches for lane in microbatch.lanes]


def test_long_samples_are_spread_over_packed_slots_and_share_rows_with_samples_of_their_length_in_padded_ones():
    lengths = [1000, 990, 980, 970, 10, 20, 30, 40]
    samples = [SampleMeta(n, tokens) for n, tokens in enumerate(lengths)]
    options = {"microbatches": 2, "language_lanes": 2, "encoder_lanes": {}}
    packed = plan_step(samples, **options, packing=Packing(packed=True))
    assert [sum(slot) for slot in lengths_of(packed)] == [1010, 1010, 1010, 1010]
    # The long ones in one microbatch: the other waits for none of them.
    samples = [SampleMeta(n, tokens) for n, tokens in enumerate([1000, 10] * 4)]
    assert lengths_of(plan_step(samples, **options)) == [[1000, 1000], [1000, 1000], [10, 10, 10], [10]]


def test_dealt_steps_keep_the_order_and_tie_encoder_work_to_samples():
    samples = [SampleMeta(n, 10 + n, (image(),) * n) for n in range(6)]
    plan = deal_step(samples, microbatches=2, language_lanes=1, encoder_lanes={"vision": 3})
    assert [[s.sample for s in microbatch.lanes[0]] for microbatch in plan.microbatches] == [[0, 1, 2], [3, 4, 5]]
    assert [[len(lane) for lane in microbatch.encoder_lanes["vision"]] for microbatch in plan.microbatches] == [
        [0, 1, 2],
        [3, 4, 5],
    ]


def test_text_only_steps_and_fewer_samples_than_lanes_leave_empty_lanes():
    plan = plan_step([SampleMeta(7, 5)], microbatches=2, language_lanes=3, encoder_lanes={"vision": 2})
    assert [[len(lane) for lane in m.lanes] for m in plan.microbatches] == [[1, 0, 0], [0, 0, 0]]
    assert all(m.items == {"vision": ()} for m in plan.microbatches)
    assert all(m.encoder_lanes == {"vision": ((), ())} for m in plan.microbatches)
    assert plan_step([], microbatches=1, language_lanes=1, encoder_lanes={}).microbatches[0].lanes == ((),)


def test_equal_inputs_give_equal_plans_also_with_ties():
    samples = [SampleMeta(n, 8, (image(), image(module="audio"))) for n in range(20)]
    lanes = {"vision": 3, "audio": 2}
    plans = [plan_step(samples, microbatches=3, language_lanes=2, encoder_lanes=lanes) for _ in range(2)]
    assert plans[0] == plans[1]
    assert str(plans[0]) == str(plans[1])
    assert str(plans[0]).splitlines()[0].startswith("microbatch 0: samples: ")


def test_a_medium_without_an_encoder_is_refused_by_name():
    with pytest.raises(LayoutError, match=r"sample 3, media item 1: module 'audio' .*encoders: vision"):
        plan_step(
            [SampleMeta(3, 9, (image(), image(module="audio")))],
            microbatches=1,
            language_lanes=1,
            encoder_lanes={"vision": 1},
        )


@pytest.mark.parametrize(("packed", "count"), [(False, 66_000), (True, 100_000)])
def test_planning_4096_lanes_and_16_microbatches_takes_seconds(packed, count):
    draw = random.Random(0)
    few = [(image(draw.random()),) * (n % 4) for n in range(97)]
    samples = [SampleMeta(n, draw.randrange(100, 4000), few[n % 97]) for n in range(count)]
    begun = time.process_time()
    lanes = {"language_lanes": 4096, "encoder_lanes": {"vision": 4096}}
    plan = plan_step(samples, microbatches=16, **lanes, packing=Packing(packed))
    seconds = time.process_time() - begun
    assert sum(len(microbatch.items["vision"]) for microbatch in plan.microbatches) >= count * 1.4
    assert seconds < 30, f"{seconds:.2f} s"  # 1.5 and 4 s on an idle core


def test_planning_an_ordinary_step_takes_milliseconds():
    draw = random.Random(0)
    samples = [SampleMeta(n, int(draw.lognormvariate(6, 1)) + 1, (image(),) * (n % 4)) for n in range(512)]
    for packing in (Packing(), Packing(packed=True)):
        begun = time.process_time()
        for _ in range(10):
            plan_step(samples, microbatches=8, language_lanes=8, encoder_lanes={"vision": 8}, packing=packing)
        seconds = (time.process_time() - begun) / 10
        assert seconds < 0.2, f"{seconds:.3f} s"  # about 0.01 s on an idle core


def test_a_pass_is_balanced_over_all_its_microbatches() -> None:
    samples = [SampleMeta(index, 10, (MediaMeta("vision", 4, 1.0),)) for index in range(4)]
    options = {"microbatches": 4, "language_lanes": 1, "encoder_lanes": {"vision": 4}}
    alone = plan_step(samples, **options)
    together = plan_step(samples, **options, passes={"vision": EncoderPasses(per_pass=4)})
    assert [part.encoder_lanes["vision"].index((0,)) for part in alone.microbatches] == [0, 0, 0, 0]
    assert sorted(part.encoder_lanes["vision"].index((0,)) for part in together.microbatches) == [0, 1, 2, 3]
    assert [len(served) for served in together.passes("vision")] == [4]


def test_unequal_shares_hold_over_the_step_and_a_share_of_nothing_gets_nothing() -> None:
    samples = [SampleMeta(index, 10, (MediaMeta("vision", 4, 1.0),) * 3) for index in range(8)]
    shares = ((0.0, 1.5, 1.5), *((0.5, 1.0, 1.5),) * 7)
    passes = {"vision": EncoderPasses(shares=shares)}
    plan = plan_step(samples, microbatches=8, language_lanes=1, encoder_lanes={"vision": 3}, passes=passes)
    assert plan.microbatches[0].encoder_lanes["vision"][0] == ()
    counts = [sum(len(part.encoder_lanes["vision"][lane]) for part in plan.microbatches) for lane in range(3)]
    assert sum(counts) == 24
    for count, wanted in zip(counts, [sum(share[lane] for share in shares) for lane in range(3)], strict=True):
        assert abs(count - wanted) <= 1
