"""Does encoder work fit into the language model's bubbles: always runnable, in bounded memory, and nearly as fast as can be?"""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshweave.config import LANGUAGE
from meshweave.layout import Layout, Placement
from meshweave.schedule.actions import Kind
from meshweave.schedule.bound import lower_bound
from meshweave.schedule.check import check
from meshweave.schedule.durations import Durations, Key, equal_durations
from meshweave.schedule.generators.bubbles.play import LEAST_SHARE
from meshweave.schedule.generators.bubbles.run_ahead import run_ahead
from meshweave.schedule.generators.graph_1f1b import graph_1f1b
from meshweave.schedule.generators.nested import nested
from meshweave.schedule.generators.three_phase import three_phase
from meshweave.schedule.lower import lower
from meshweave.schedule.schedule import Schedule
from meshweave.schedule.simulate import simulate
from meshweave.schedule.work import ModuleWork, StepWork, plan_work


def place(layout: Layout, first: int = 0) -> Placement:
    return Placement(layout, tuple(range(first, first + layout.size)))


def colocated(pipeline: int, microbatches: int, dp: int = 1, backward: bool = True) -> StepWork:
    """One encoder rank, a lane, on every rank of a 1F1B language model."""
    placements = {"vision": place(Layout(dp=pipeline * dp)), LANGUAGE: place(Layout(pp=pipeline, dp=dp))}
    modules = {
        "vision": ModuleWork("vision", backward=backward),
        LANGUAGE: ModuleWork(LANGUAGE, pipeline, backward=backward),
    }
    return plan_work(placements, modules, microbatches)


def seconds(work: StepWork, ratio: float, link: float = 0.0) -> Durations:
    """Encoder passes take `ratio` of what a stage of the language model takes for a microbatch: forward 1, backward 2."""
    table: dict[Key, float] = dict(equal_durations(work, link=link).table)
    for key in table:
        if key[1] != LANGUAGE and key[0] in (Kind.FORWARD, Kind.BACKWARD):
            table[key] *= ratio
    return Durations(table)


def scheduled(work: StepWork, pipeline: int, durations: Durations) -> Schedule:
    queues, shares = nested(work, pipeline, durations)
    return lower(work, queues, durations, shares)


@st.composite
def works(draw: st.DrawFn) -> tuple[StepWork, int]:
    """Two to four stages on four or eight ranks, in any of the three orders; up to two encoders, on all ranks or some."""
    pipeline = draw(st.sampled_from([2, 4]))
    size = draw(st.sampled_from([4, 8]))
    tp = draw(st.sampled_from([count for count in (1, 2) if size // pipeline % count == 0]))
    training = draw(st.booleans())
    order = draw(st.sampled_from(["1f1b", "interleaved", "zero_bubble"]))
    pieces = 2 if order == "interleaved" else 1
    language = ModuleWork(LANGUAGE, pipeline * pieces, backward=training, split=training and order == "zero_bubble")
    placements = {LANGUAGE: place(Layout(pp=pipeline, dp=size // pipeline // tp, tp=tp))}
    modules = {LANGUAGE: language}
    for name in draw(st.sampled_from([("vision",), ("vision", "audio")])):
        count = draw(st.sampled_from([1, 2, size // 2, size]))
        first = draw(st.integers(0, size - count))
        wide = draw(st.sampled_from([width for width in (1, 2, 4) if count % width == 0]))
        stages = draw(st.sampled_from([depth for depth in (1, 1, 2) if count // wide % depth == 0]))
        placements[name] = place(Layout(pp=stages, dp=count // wide // stages, tp=wide), first)
        per_pass = draw(st.sampled_from([1, 1, 2]))
        modules[name] = ModuleWork(name, stages, per_pass, backward=training and draw(st.booleans()))
    return plan_work(placements, modules, draw(st.sampled_from([1, 2, 5, 8]))), pipeline


@settings(deadline=None, max_examples=60)
@given(works(), st.sampled_from([0.0, 0.1, 1.0, 3.0]), st.sampled_from([0.0, 0.2]))
def test_whatever_the_work_the_schedule_passes_the_checker_keeps_its_bounds_and_shares_add_up(drawn, ratio, link):
    work, pipeline = drawn
    durations = seconds(work, ratio, link)
    schedule = scheduled(work, pipeline, durations)
    budget = {name: run_ahead(work, pipeline, durations, name) * work.modules[name].per_pass for name in work.encoders}
    check(schedule, budget)
    if not link:
        assert simulate(schedule, durations).seconds >= lower_bound(work, pipeline, durations) * (1 - 1e-9)
    for name, shares in schedule.shares.items():
        ranks = [len(program.ranks) if name in program.stages else 0 for program in work.programs]
        assert len(shares) == work.modules[name].passes(work.microbatches)
        for its in shares:
            assert sum(count * share for count, share in zip(ranks, its, strict=True)) == pytest.approx(sum(ranks))
            assert all(share == 0 or (count and share >= LEAST_SHARE - 1e-6) for count, share in zip(ranks, its, strict=True))
        assert all(any(its[program] for its in shares) for program, count in enumerate(ranks) if count)


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_encoder_memory_does_not_grow_with_the_microbatches(ratio):
    held = set()
    for microbatches in (32, 64):
        work = colocated(4, microbatches)
        durations = seconds(work, ratio)
        bound = run_ahead(work, 4, durations, "vision")
        held.add(bound)
        check(scheduled(work, 4, durations), {"vision": bound})
    assert len(held) == 1 and held.pop() < 32


@pytest.mark.parametrize("ratio", [0.1, 0.5, 2.0])
def test_an_encoder_without_a_backward_does_not_run_away(ratio):
    work = colocated(4, 64, backward=False)
    durations = seconds(work, ratio)
    bound = run_ahead(work, 4, durations, "vision")
    assert bound < 32
    for actions in scheduled(work, 4, durations).actions:
        done = -1
        for action in actions:
            if action.kind == Kind.FORWARD and action.module == LANGUAGE:
                done = action.microbatch
            elif action.kind == Kind.FORWARD:
                assert action.microbatch - done <= bound + 4


@pytest.mark.parametrize(
    ("pipeline", "microbatches", "ratio", "over"),
    [
        (2, 8, 0.25, 1.02),
        (2, 8, 1.0, 1.02),
        (4, 8, 0.1, 1.02),
        (4, 16, 0.5, 1.03),
        (4, 16, 1.0, 1.03),
        (4, 16, 2.0, 1.03),
        (4, 4, 2.0, 1.08),
        (8, 16, 0.25, 1.02),
        (8, 16, 0.5, 1.04),
    ],
)
def test_step_time_comes_near_the_lower_bound(pipeline, microbatches, ratio, over):
    work = colocated(pipeline, microbatches)
    durations = seconds(work, ratio)
    bound = lower_bound(work, pipeline, durations)
    assert bound * (1 - 1e-9) <= simulate(scheduled(work, pipeline, durations), durations).seconds <= over * bound


@given(st.sampled_from([2, 4]), st.integers(1, 9), st.floats(0.05, 3), st.booleans())
@settings(deadline=None, max_examples=40)
def test_no_other_generator_beats_the_lower_bound(pipeline, microbatches, ratio, backward):
    work = colocated(pipeline, microbatches, backward=backward)
    durations = seconds(work, ratio)
    bound = lower_bound(work, pipeline, durations)
    for queues in ([[order] for order in three_phase(work, pipeline, microbatches)], graph_1f1b(work, pipeline)):
        assert simulate(lower(work, queues, durations), durations).seconds >= bound * (1 - 1e-9)


def test_the_bound_of_an_equal_pipeline_is_its_closed_form():
    work = colocated(4, 16)
    for ratio in (0.05, 3.0):
        path, total = (16 + 4 - 1) * 3 + 3 * ratio, 16 * 3 * (1 + ratio)
        assert lower_bound(work, 4, seconds(work, ratio)) == pytest.approx(max(path, total))


def test_generation_is_fast_at_4096_ranks():
    work = colocated(16, 256, dp=256)
    durations = seconds(work, 0.05)
    started = time.process_time()
    queues, shares = nested(work, 16, durations)
    assert time.process_time() - started < 40  # of one core, which others may share; it is 5 to 10 alone
    check(lower(work, queues, durations, shares))
