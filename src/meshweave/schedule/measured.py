"""How long did actions take? Durations out of a timeline, with which any other schedule can be simulated."""

from collections import defaultdict
from math import inf
from statistics import median

from meshweave.errors import ScheduleError
from meshweave.schedule.actions import COMPUTE
from meshweave.schedule.durations import Durations, Key
from meshweave.schedule.schedule import Schedule
from meshweave.schedule.simulate import Timeline


def durations_of(timeline: Timeline, schedule: Schedule) -> Durations:
    """Medians of what a timeline shows of each kind of action of each stage, in seconds.

    What the timeline does not show, such as messages that were not clocked, takes no time. Gathers and reductions take what they
    take the rank that comes last: the others also wait for it.

    Args:
        schedule: what ran; a row's seconds of a pass are divided by its share of it, and do not count if that is 0.

    Raises:
        ScheduleError: a row's ranks are none of the schedule's.
    """
    found: dict[Key, list[float]] = defaultdict(list)
    together: dict[Key, float] = {}
    for ranks, spans in zip(timeline.ranks, timeline.spans, strict=True):
        program = schedule.work.program_of(ranks[0])
        if program is None:
            raise ScheduleError(f"rank {ranks[0]} has a row in the timeline, but no place in the schedule")
        for action, start, stop in spans:
            if action.kind not in COMPUTE:
                together[action[:3]] = min(stop - start, together.get(action[:3], inf))
            elif share := schedule.share(action.module, action.microbatch, program):
                found[action[:3]].append((stop - start) / share)
    for sent in timeline.messages:
        for action, start, stop in sent:
            found[action[:3]].append(stop - start)
    return Durations({key: median(seconds) for key, seconds in found.items()} | together)
