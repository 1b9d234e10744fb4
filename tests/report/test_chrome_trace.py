"""Is a trace what viewers read, and the timeline again when it is read back?"""

import json

import pytest

from meshweave.errors import DataError
from meshweave.layout import Layout, Placement
from meshweave.report.chrome_trace import read_chrome_trace, write_chrome_trace
from meshweave.schedule.durations import equal_durations
from meshweave.schedule.generators.graph_1f1b import graph_1f1b
from meshweave.schedule.lower import lower
from meshweave.schedule.measured import durations_of
from meshweave.schedule.simulate import Timeline, simulate
from meshweave.schedule.work import ModuleWork, plan_work

PLACED = {
    "vision": Placement(Layout(pp=2), (0, 1)),
    "audio": Placement(Layout(dp=2), (2, 3)),
    "language": Placement(Layout(pp=3), (3, 4, 5)),
}
MODULES = {
    "vision": ModuleWork("vision", 2, per_pass=2),
    "audio": ModuleWork("audio"),
    "language": ModuleWork("language", 3),
}


def _simulated(link=0.25):
    work = plan_work(PLACED, MODULES, 6)
    durations = equal_durations(work, link=link)
    schedule = lower(work, graph_1f1b(work, 3), durations)
    return schedule, simulate(schedule, durations)


def _events(path, kind):
    return [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == kind]


@pytest.fixture
def trace(tmp_path):
    _, timeline = _simulated()
    write_chrome_trace(timeline, tmp_path / "trace.json")
    return timeline, tmp_path / "trace.json"


def test_a_trace_read_back_is_the_timeline(trace):
    timeline, path = trace
    read = read_chrome_trace(path)
    assert read.ranks == timeline.ranks
    rows = zip((*read.spans, *read.messages), (*timeline.spans, *timeline.messages), strict=True)
    for spans, expected in rows:
        for span, other in zip(sorted(spans), sorted(expected), strict=True):
            assert span.action == other.action
            assert (span.start, span.stop) == pytest.approx((other.start, other.stop), rel=1e-12)


def test_a_trace_read_back_can_be_simulated_from(trace):
    schedule, timeline = _simulated()
    _, path = trace
    assert simulate(schedule, durations_of(read_chrome_trace(path), schedule)).seconds == pytest.approx(timeline.seconds)


def test_rows_are_threads_and_spans_slices_in_microseconds(trace):
    timeline, path = trace
    names = {event["tid"]: event["args"]["name"] for event in _events(path, "M") if event["name"] == "thread_name"}
    assert names == {row: f"rank {ranks[0]}" for row, ranks in enumerate(timeline.ranks)}
    slices = _events(path, "X")
    assert len(slices) == sum(map(len, timeline.spans))
    first = next(event for event in slices if event["name"] == "language.0F0")
    span = next(span for spans in timeline.spans for span in spans if str(span.action) == "language.0F0")
    assert (first["ts"], first["dur"]) == pytest.approx((span.start * 1e6, (span.stop - span.start) * 1e6))
    assert first["cat"] == "language,forward"


def test_arrows_go_from_the_slice_that_sends_to_the_one_that_waits(trace):
    timeline, path = trace
    slices = [event for event in _events(path, "X") if event["dur"]]

    def at(event):
        (found,) = [its for its in slices if its["tid"] == event["tid"] and its["ts"] <= event["ts"] < its["ts"] + its["dur"]]
        return found["name"]

    ends = {event["id"]: event for event in _events(path, "f")}
    starts = _events(path, "s")
    assert len(starts) == len(ends) == sum(map(len, timeline.messages))
    names = {event["name"]: (at(event), at(ends[event["id"]])) for event in starts if "audio" not in event["name"]}
    programs = {ranks[0]: row for row, ranks in enumerate(timeline.ranks)}
    assert names[f"language.0SEND_F4>{programs[4]}"] == ("language.0F4", "language.1F4")
    assert names[f"language.2SEND_B1>{programs[4]}"] == ("language.2B1", "language.1B1")
    assert names[f"vision.1SEND_X3>{programs[3]}"] == ("vision.1F1", "language.0F3")
    assert names[f"vision.1SEND_G3>{programs[1]}"] == ("language.0B3", "vision.1B1")


def test_equal_messages_of_several_rows_leave_from_each_of_them(tmp_path):
    placed = {"vision": Placement(Layout(dp=3), (0, 1, 2)), "language": Placement(Layout(pp=2), (2, 3))}
    work = plan_work(placed, {"vision": ModuleWork("vision"), "language": ModuleWork("language", 2)}, 2)
    durations = equal_durations(work)
    write_chrome_trace(simulate(lower(work, graph_1f1b(work, 2), durations), durations), tmp_path / "trace.json")
    rows = [event["tid"] for event in _events(tmp_path / "trace.json", "s") if "SEND_X0" in event["name"]]
    assert len(rows) == len(set(rows))


def test_a_timeline_of_nothing_comes_back(tmp_path):
    for timeline in (Timeline((), ()), Timeline(((0, 1), (5,)), ((), ()))):
        write_chrome_trace(timeline, tmp_path / "trace.json")
        assert read_chrome_trace(tmp_path / "trace.json") == timeline


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "cannot be read"),
        ("not json", "is no JSON"),
        ("[]", "is no trace of meshweave"),
        ("{}", "lacks 'traceEvents'"),
        ('{"traceEvents": [3]}', "is no trace of meshweave"),
        ('{"traceEvents": [{"ph": "X", "ts": 1, "dur": 2, "tid": 0, "args": {"action": "matmul"}}]}', "'matmul' is no action"),
        ('{"traceEvents": [{"ph": "X", "ts": 1, "dur": 2, "tid": 0}]}', "lacks 'action'"),
        ('{"traceEvents": [{"ph": "X", "ts": 1, "dur": 2, "tid": 7, "args": {"action": "language.0F0"}}]}', "rows"),
        ('{"traceEvents": [{"ph": "X", "ts": "a", "dur": 2, "tid": 0, "args": {"action": "language.0F0"}}]}', "laid out"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_by_name_and_reason(tmp_path, text, reason):
    path = tmp_path / "other.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=reason) as caught:
        read_chrome_trace(path)
    assert str(path) in str(caught.value)
