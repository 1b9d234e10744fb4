"""When did every rank do what, to zoom into: a trace for chrome://tracing and ui.perfetto.dev."""

import json
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from meshweave.config import LANGUAGE
from meshweave.errors import DataError, ScheduleError
from meshweave.report.text import ranks_text
from meshweave.schedule.actions import COMPUTE, Action, Kind, parse_action
from meshweave.schedule.simulate import Span, Timeline

Event = dict[str, Any]
MICRO = 1e6
PROCESS = 0


class _Work(NamedTuple):
    """Computations among which is the one that sends a message, or waits for it."""

    forward: bool
    module: str
    stage: int
    microbatch: int | None
    """None: a message is of a microbatch of the language model, the computation a pass of an encoder."""


def write_chrome_trace(timeline: Timeline, path: Path) -> None:
    """Writes a timeline as a trace in JSON: one thread a row, a slice for every span, an arrow for every message.

    Times are in microseconds; `args` hold what `read_chrome_trace` needs: each thread its ranks, each slice and arrow its action.
    Arrows go from the slice that made the message to the one that waited for it; where a timeline does not show these, the viewer
    leaves the arrow out.
    """
    events = [*_metadata(timeline), *_slices(timeline), *_arrows(timeline)]
    path.write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":")), encoding="utf-8")


def read_chrome_trace(path: Path) -> Timeline:
    """The timeline of a trace that `write_chrome_trace` wrote; times agree to rounding.

    Raises:
        DataError: the file cannot be read, or is no such trace.
    """
    try:
        return _timeline(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: is no JSON: {error}") from error
    except ScheduleError as error:
        raise DataError(f"{path}: is no trace of meshweave: {error}") from error
    except KeyError as error:
        raise DataError(f"{path}: is no trace of meshweave: an event lacks {error}") from error
    except (TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: is no trace of meshweave: its events are not laid out as meshweave writes them") from error


def _metadata(timeline: Timeline) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": PROCESS, "args": {"name": "meshweave step"}}
    for row, ranks in enumerate(timeline.ranks):
        name = f"rank{'s' if len(ranks) > 1 else ''} {ranks_text(ranks)}"
        yield {"ph": "M", "name": "thread_name", "pid": PROCESS, "tid": row, "args": {"name": name, "ranks": ranks}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": PROCESS, "tid": row, "args": {"sort_index": row}}


def _slices(timeline: Timeline) -> Iterator[Event]:
    for row, spans in enumerate(timeline.spans):
        for action, start, stop in spans:
            text = str(action)
            yield {
                "ph": "X",
                "name": text,
                "cat": f"{action.module},{action.kind.name.lower()}",
                "pid": PROCESS,
                "tid": row,
                "ts": start * MICRO,
                "dur": (stop - start) * MICRO,
                "args": {"action": text},
            }


def _arrows(timeline: Timeline) -> Iterator[Event]:
    works = _works(timeline)
    sent = sorted(
        ((span, row) for row, spans in enumerate(timeline.messages) for span in spans), key=lambda found: found[0].start
    )
    for number, ((action, leaves, arrives), row) in enumerate(sent):
        made_by, awaited_by = _ends(action)
        made = _last_until(works[made_by][row], leaves)
        awaited = _first_from(works[awaited_by][action.peer], arrives)
        # A viewer binds the end of an arrow to the slice that is open at its time: an arrow leaves just before the slice closes.
        at = leaves if made is None else made.stop - 1e-3 * (made.stop - made.start)
        text = str(action)
        shared = {"name": text, "cat": "message", "id": number, "pid": PROCESS}
        args = {"action": text, "leaves": leaves * MICRO, "arrives": arrives * MICRO}
        yield {"ph": "s", **shared, "tid": row, "ts": at * MICRO, "args": args}
        at = arrives if awaited is None else awaited.start
        yield {"ph": "f", "bp": "e", **shared, "tid": action.peer, "ts": at * MICRO}


def _works(timeline: Timeline) -> dict[_Work, dict[int, list[Span]]]:
    """Computation to row to its spans in order; those of all microbatches together stand under None, too."""
    works: dict[_Work, dict[int, list[Span]]] = defaultdict(lambda: defaultdict(list))
    for row, spans in enumerate(timeline.spans):
        for span in spans:
            kind, module, stage, microbatch, _ = span.action
            if kind in COMPUTE and kind != Kind.WEIGHT_GRADIENT:
                for number in (microbatch, None):
                    works[_Work(kind == Kind.FORWARD, module, stage, number)][row].append(span)
    return works


def _ends(action: Action) -> tuple[_Work, _Work]:
    """The computation that makes what a message carries, and the one that needs it."""
    _, module, stage, microbatch, _ = action
    if action.kind == Kind.SEND_FORWARD:
        return _Work(True, module, stage, microbatch), _Work(True, module, stage + 1, microbatch)
    if action.kind == Kind.SEND_BACKWARD:
        return _Work(False, module, stage, microbatch), _Work(False, module, stage - 1, microbatch)
    if action.kind == Kind.SEND_TOKENS:
        return _Work(True, module, stage, None), _Work(True, LANGUAGE, 0, microbatch)
    return _Work(False, LANGUAGE, 0, microbatch), _Work(False, module, stage, None)


def _last_until(spans: Sequence[Span], time: float) -> Span | None:
    at = bisect_right(spans, time, key=lambda span: span.stop)
    return spans[at - 1] if at else None


def _first_from(spans: Sequence[Span], time: float) -> Span | None:
    at = bisect_left(spans, time, key=lambda span: span.start)
    return spans[at] if at < len(spans) else None


def _timeline(events: Sequence[Event]) -> Timeline:
    ranks: dict[int, tuple[int, ...]] = {}
    spans: dict[int, list[Span]] = defaultdict(list)
    messages: dict[int, list[Span]] = defaultdict(list)
    for event in events:
        kind, args = event["ph"], event.get("args", {})
        if kind == "M" and event["name"] == "thread_name":
            ranks[event["tid"]] = tuple(args["ranks"])
        elif kind == "X":
            start = event["ts"] / MICRO
            spans[event["tid"]].append(Span(parse_action(args["action"]), start, start + event["dur"] / MICRO))
        elif kind == "s":
            messages[event["tid"]].append(Span(parse_action(args["action"]), args["leaves"] / MICRO, args["arrives"] / MICRO))
    if ranks.keys() != set(range(len(ranks))) or not spans.keys() <= ranks.keys():
        raise ScheduleError("its rows are not numbered and named throughout")
    rows = range(len(ranks))
    sent = tuple(tuple(messages[row]) for row in rows) if messages else ()
    return Timeline(tuple(ranks[row] for row in rows), tuple(tuple(spans[row]) for row in rows), sent)
