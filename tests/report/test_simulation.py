"""Does the table say what every row does, and stay short and narrow? Do measured durations clock what was measured?"""

import re
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from meshweave.errors import ScheduleError
from meshweave.layout import Layout, Placement
from meshweave.report.simulation import render_simulation
from meshweave.report.text import time_text
from meshweave.schedule.actions import Kind
from meshweave.schedule.check import check
from meshweave.schedule.durations import Durations, equal_durations
from meshweave.schedule.generators.graph_1f1b import graph_1f1b
from meshweave.schedule.lower import lower
from meshweave.schedule.measured import durations_of
from meshweave.schedule.simulate import Timeline, simulate
from meshweave.schedule.work import ModuleWork, plan_work


def _language(pp, ranks=None, **layout):
    return {"language": Placement(Layout(pp=pp, **layout), tuple(ranks or range(pp)))}, [ModuleWork("language", pp)]


def _with_vision(pp=3, lanes=2, **changes):
    placed, modules = _language(pp, range(lanes, lanes + pp))
    return {"vision": Placement(Layout(dp=lanes), tuple(range(lanes)))} | placed, [ModuleWork("vision", **changes), *modules]


def _schedule(placed, modules, microbatches=4, durations=None, shares=None):
    work = plan_work(placed, {module.name: module for module in modules}, microbatches)
    durations = durations or equal_durations(work)
    return lower(work, graph_1f1b(work, placed["language"].layout.pp), durations, shares)


def _lines(schedule, timeline, width=80):
    out = StringIO()
    Console(file=out, width=width).print(render_simulation(schedule, timeline, check(schedule)))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return [re.sub(r"\s+", " ", line).strip() for line in lines]


def test_every_row_says_what_it_does_and_how_long():
    schedule = _schedule(*_with_vision())
    timeline = simulate(schedule, equal_durations(schedule.work))
    lines = _lines(schedule, timeline)
    assert lines[0] == f"step {timeline.seconds:.1f} s · bubble {timeline.bubble:.1%} · 4 microbatches · 5 ranks"
    assert lines[2] == "ranks busy bubble vision held language held"
    assert lines[4] == "0-1 12.0 s 42.9% whole 4 –"
    assert lines[5:8] == [f"{rank} 12.0 s 42.9% – stage {stage} {3 - stage}" for rank, stage in ((2, 0), (3, 1), (4, 2))]


def test_rows_of_a_measured_timeline_may_be_ranks():
    schedule = _schedule(*_with_vision())
    timeline = simulate(schedule, equal_durations(schedule.work))
    by_rank = Timeline(((0,), (1,), *timeline.ranks[1:]), (timeline.spans[0], *timeline.spans))
    lines = _lines(schedule, by_rank)
    assert lines[4:6] == [f"{rank} 12.0 s 42.9% whole 4 –" for rank in (0, 1)]
    assert durations_of(by_rank, schedule) == durations_of(Timeline(timeline.ranks, timeline.spans), schedule)


def test_many_rows_give_way_to_what_they_span():
    schedule = _schedule(*_language(48), microbatches=2)
    lines = _lines(schedule, simulate(schedule, equal_durations(schedule.work)))
    assert [line.split(" s ")[0] for line in lines[4:8]] == ["0 6.00", "1 6.00", "⋮ 45 rows 6.00", "47 6.00"]
    assert lines[6].endswith("stages 2-46 2")
    assert lines[7].endswith("stage 47 1")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (3e-7, "0.30 µs"),
        (8.12e-4, "812 µs"),
        (0.0042, "4.20 ms"),
        (0.99951, "1.00 s"),
        (33, "33.0 s"),
        (1234, "1234 s"),
    ],
)
def test_a_time_reads_as_three_digits_and_a_unit(seconds, text):
    assert time_text(seconds) == text


def _uneven(work):
    """Seconds that differ for every kind and stage."""
    table = equal_durations(work, forward=1.25, backward=2.5, link=0.125).table
    keys = [*table, *((kind, "language", stage) for kind in (Kind.GATHER, Kind.REDUCE) for stage in range(3))]
    return Durations({key: table.get(key, 0.5) * (1 + number / 16) for number, key in enumerate(keys)})


def test_durations_of_a_simulated_timeline_are_those_it_was_clocked_with():
    schedule = _schedule(*_with_vision(per_pass=2), microbatches=6)
    durations = _uneven(schedule.work)
    timeline = simulate(schedule, durations)
    measured = durations_of(timeline, schedule)
    used = {span.action[:3] for spans in (*timeline.spans, *timeline.messages) for span in spans}
    assert measured.table == pytest.approx({key: durations.table.get(key, 0.0) for key in used})
    assert simulate(schedule, measured).seconds == pytest.approx(timeline.seconds)


def test_durations_are_of_an_even_share_and_medians():
    placed = {"vision": Placement(Layout(dp=2), (0, 2)), "language": Placement(Layout(pp=2), (2, 3))}
    modules = [ModuleWork("vision"), ModuleWork("language", 2)]
    shares = {"vision": ((0.5, 1.5, 0.0), (1.75, 0.25, 0.0), (1.0, 1.0, 0.0))}
    schedule = _schedule(placed, modules, 3, shares=shares)
    durations = equal_durations(schedule.work, forward=4.0, backward=6.0)
    timeline = simulate(schedule, durations)
    measured = durations_of(timeline, schedule)
    assert measured.table[Kind.FORWARD, "vision", 0] == 4.0
    assert measured.table[Kind.BACKWARD, "vision", 0] == 6.0
    idle = replace(schedule, shares={"vision": ((0.5, 0.0, 0.0), *shares["vision"][1:])})
    assert durations_of(timeline, idle).table[Kind.FORWARD, "vision", 0] == 4.0
    late = [span._replace(stop=span.stop + 100) if span.action.microbatch == 2 else span for span in timeline.spans[2]]
    outlier = durations_of(Timeline(timeline.ranks, (*timeline.spans[:2], tuple(late))), schedule)
    assert outlier.table[Kind.FORWARD, "language", 1] == 4.0


def test_durations_of_a_rank_that_the_schedule_does_not_know_are_refused():
    schedule = _schedule(*_language(2))
    with pytest.raises(ScheduleError, match="rank 9 has a row"):
        durations_of(Timeline(((9,),), ((),)), schedule)
