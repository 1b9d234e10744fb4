"""The simulator agrees with the closed forms, and planning for thousands of ranks is quick and small."""

import time
import tracemalloc

import pytest
from support.schedules import Case, place

from meshweave.schedule.check import check
from meshweave.schedule.durations import Durations, equal_durations
from meshweave.schedule.simulate import simulate


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 3), (2, 2), (4, 8), (4, 5), (8, 32), (3, 1)])
def test_the_bubble_of_1f1b(stages: int, microbatches: int) -> None:
    """(P-1)/(M+P-1) of the step, for any forward and backward (PipeDream-flush)."""
    case = Case({"language": place(0, pp=stages)}, microbatches=microbatches, macro_batch=microbatches)
    timeline = simulate(case.schedule(), equal_durations(case.work(), 0.7, 1.9))
    assert timeline.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1), abs=1e-9)
    assert timeline.seconds == pytest.approx((microbatches + stages - 1) * 2.6, abs=1e-9)


@pytest.mark.parametrize(("stages", "pieces", "microbatches"), [(2, 2, 2), (4, 2, 8), (4, 3, 8), (8, 2, 32), (4, 4, 4)])
def test_the_bubble_of_interleaved_1f1b(stages: int, pieces: int, microbatches: int) -> None:
    """(P-1)/(V·M+P-1) of the step (arXiv 2104.04473)."""
    case = Case({"language": place(0, pp=stages)}, microbatches=microbatches, macro_batch=microbatches, pieces=pieces)
    timeline = simulate(case.schedule(), equal_durations(case.work()))
    assert timeline.bubble == pytest.approx((stages - 1) / (pieces * microbatches + stages - 1), abs=1e-9)


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 2), (4, 8), (4, 5), (8, 32)])
def test_the_bubble_of_zero_bubble(stages: int, microbatches: int) -> None:
    """(P-1)(F+I-W) of idle time on every rank (ZB-H1, arXiv 2401.10241), here with F = I = W = 1; memory as 1F1B's."""
    case = Case({"language": place(0, pp=stages)}, microbatches=microbatches, macro_batch=microbatches, split=True)
    schedule = case.schedule()
    timeline = simulate(schedule, equal_durations(case.work()))
    assert timeline.seconds == pytest.approx(3 * microbatches + stages - 1, abs=1e-9)
    assert max(held["language"] for held in check(schedule)) == min(stages, microbatches)


def test_three_phase_is_encoder_plus_pipeline_plus_encoder() -> None:
    case = Case({"vision": place(0, dp=4), "language": place(0, pp=4)}, microbatches=8, macro_batch=8)
    work = case.work()
    timeline = simulate(case.schedule(), equal_durations(work))
    assert timeline.seconds == pytest.approx(1 + (8 + 3) * 3 + 2)


def test_an_encoder_pipeline_before_the_language_pipeline_is_one_long_pipeline() -> None:
    case = Case({"vision": place(0, pp=2), "language": place(2, pp=2)}, "graph_1f1b", microbatches=8)
    timeline = simulate(case.schedule(), equal_durations(case.work()))
    assert timeline.seconds == pytest.approx((8 + 4 - 1) * 3)
    assert list(check(case.schedule())) == [{"vision": 4}, {"vision": 3}, {"language": 2}, {"language": 1}]


def test_links_delay_and_queue() -> None:
    """One forward-only stage after another: each message takes as long as a forward, and the link takes one at a time."""
    case = Case({"language": place(0, pp=2)}, microbatches=3, macro_batch=3, backward=False)
    timeline = simulate(case.schedule(), equal_durations(case.work(), link=2.0))
    assert [span.start for span in timeline.messages[0]] == [1.0, 3.0, 5.0]
    assert [span.start for span in timeline.spans[1] if span.stop > span.start] == [3.0, 5.0, 7.0]


def test_an_actions_own_duration_comes_first() -> None:
    case = Case({"language": place(0)}, microbatches=2, macro_batch=2, backward=False)
    schedule = case.schedule()
    durations = equal_durations(schedule.work)
    slow = Durations(durations.table, {(0, schedule.actions[0][0]): 5.0})
    assert simulate(schedule, slow).seconds == pytest.approx(6.0)


@pytest.mark.parametrize("encoders", ["three_phase", "graph_1f1b", "nested"])
def test_4096_ranks_and_256_microbatches_take_seconds_and_megabytes(encoders: str) -> None:
    vision = place(0, dp=4096) if encoders != "graph_1f1b" else place(0, dp=512, tp=2)
    language = place(0 if encoders != "graph_1f1b" else 1024, pp=16, tp=8, dp=32 if encoders != "graph_1f1b" else 24)
    case = Case(
        {"vision": vision, "language": language}, encoders, microbatches=256, macro_batch=4 if encoders == "graph_1f1b" else 1
    )
    started = time.process_time()
    durations = equal_durations(case.work(), link=0.01)
    schedule = case.schedule(durations)
    check(schedule)
    assert simulate(schedule, durations).seconds > 256 * 3
    assert time.process_time() - started < 40  # of one core, which others may share; it is 5 to 10 alone


def test_planning_for_4096_ranks_stays_small() -> None:
    """An eighth of 256 microbatches, because the measurement is slow; memory grows with their number."""
    case = Case({"vision": place(0, dp=4096), "language": place(0, pp=16, tp=8, dp=32)}, microbatches=32)
    tracemalloc.start()
    schedule = case.schedule()
    check(schedule)
    simulate(schedule, equal_durations(schedule.work))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6
