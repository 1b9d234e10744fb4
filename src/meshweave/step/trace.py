"""When did each rank do what? The measured timeline of one step, drawn and written like a simulated one."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from meshweave.report.chrome_trace import write_chrome_trace
from meshweave.report.timeline import draw_timeline
from meshweave.schedule.simulate import Span, Timeline
from meshweave.world import World

TRACED_STEP = 5
"""The step that `--trace` clocks, counted from 0: after allocations and first connections. The last one of a shorter run."""


MEASURED_PICTURE = "measured.png"
MEASURED_TRACE = "measured.json"
"""Names in the run folder."""


@dataclass
class Clock:
    """State: this rank's spans, and when the step began on its clock."""

    began: float
    spans: list[Span] = field(default_factory=list)


def start_clock(world: World) -> Clock:
    """A clock that starts on all ranks at once; a collective over all ranks, which need not share a clock."""
    if world.size > 1:
        dist.barrier()  # not over the data group, which the loader's thread talks on
    return Clock(time.perf_counter())


def measured_timeline(world: World, clock: Clock) -> Timeline:
    """Every rank's spans, on every rank; a collective over all ranks. Ranks that do nothing have no row."""
    mine = [(action, start - clock.began, stop - clock.began) for action, start, stop in clock.spans]
    everyone: list[Any] = [mine]
    if world.size > 1:
        everyone = [None] * world.size
        dist.all_gather_object(everyone, mine)
    rows = {rank: tuple(Span(*span) for span in spans) for rank, spans in enumerate(everyone) if spans}
    return Timeline(tuple((rank,) for rank in rows), tuple(rows.values()))


def write_measured(timeline: Timeline, folder: Path) -> None:
    """Writes the timeline as a picture, and as a trace for Perfetto and for `meshweave simulate --measured`."""
    draw_timeline(timeline, folder / MEASURED_PICTURE, "measured")
    write_chrome_trace(timeline, folder / MEASURED_TRACE)
