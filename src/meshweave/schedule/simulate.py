"""How long would a schedule take? Clocks its list: computations one after the other, messages beside them."""

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from meshweave.errors import ScheduleError
from meshweave.schedule.actions import COMPUTE, Action, Kind
from meshweave.schedule.durations import Durations
from meshweave.schedule.schedule import Schedule, needs


class Span(NamedTuple):
    """When something happened, in seconds from the start of the step."""

    action: Action
    start: float
    stop: float


@dataclass(frozen=True)
class Timeline:
    """When every action of a step ran: simulated, or measured."""

    ranks: tuple[tuple[int, ...], ...]
    """Row to the ranks that it stands for."""
    spans: tuple[tuple[Span, ...], ...]
    """Row to its computations, gathers and reductions, in order."""
    messages: tuple[tuple[Span, ...], ...] = ()
    """Row to what it sends, from leaving to arrival; empty where messages were not clocked."""

    @cached_property
    def seconds(self) -> float:
        """Of the whole step."""
        return max((spans[-1].stop for spans in self.spans if spans), default=0.0)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Row to the seconds it works."""
        return tuple(sum(span.stop - span.start for span in spans) for spans in self.spans)

    @property
    def bubbles(self) -> tuple[float, ...]:
        """Row to the share of the step in which it idles."""
        return tuple(1 - busy / self.seconds if self.seconds else 0.0 for busy in self.busy)

    @property
    def bubble(self) -> float:
        """Share of all ranks' time that is idle."""
        total = sum(map(len, self.ranks))
        return sum(bubble * len(ranks) for bubble, ranks in zip(self.bubbles, self.ranks, strict=True)) / max(1, total)


def simulate(schedule: Schedule, durations: Durations) -> Timeline:
    """Clocks a schedule that `check` has passed.

    A computation starts when its program is free, its gang is, and all it needs is there. A message leaves when its program comes
    to it, takes its turn on the link (one for each direction between two programs), and costs its program no time.
    """
    clock = _Clock(schedule, durations)
    clock.run()
    ranks = tuple(program.ranks for program in schedule.work.programs)
    return Timeline(ranks, tuple(map(tuple, clock.spans)), tuple(map(tuple, clock.messages)))


class _Clock:
    """State: where every program is in its list, when it is free, and when what it received was there."""

    def __init__(self, schedule: Schedule, durations: Durations) -> None:
        self.schedule, self.durations = schedule, durations
        count = len(schedule.actions)
        self.at, self.free = [0] * count, [0.0] * count
        self.there: list[dict[Action, float]] = [{} for _ in range(count)]
        self.links: dict[tuple[int, int], float] = defaultdict(float)
        self.spans: list[list[Span]] = [[] for _ in range(count)]
        self.messages: list[list[Span]] = [[] for _ in range(count)]

    def run(self) -> None:
        ready = list(range(len(self.at)))
        while ready:
            program = ready.pop()
            while (action := self._next(program)) is not None:
                touched = self._take(program, action)
                if touched is None:
                    break
                ready += touched
        if any(self._next(program) is not None for program in range(len(self.at))):
            raise ScheduleError("this schedule cannot run; `check` says why")

    def _next(self, program: int) -> Action | None:
        actions = self.schedule.actions[program]
        return actions[self.at[program]] if self.at[program] < len(actions) else None

    def _take(self, program: int, action: Action) -> list[int] | None:
        """Does the next action of a program; other programs that may go on, or None if it must wait."""
        if action.kind in COMPUTE:
            return self._together(self.schedule.work.gangs[action.module, program], action)
        if action.kind in (Kind.GATHER, Kind.REDUCE):
            return self._together(self.schedule.work.holders(action.module, action.stage), action)
        self.at[program] += 1
        if action.receives:
            return []
        if not action.sends:  # a swap stays inside its program
            self.there[program][action] = self.free[program] + self.durations.of(program, action)
            return []
        link = program, action.peer
        leaves = max(self.free[program], self.links[link])
        arrives = self.links[link] = leaves + self.durations.of(program, action)
        self.there[action.peer][action.received_by(program)] = arrives
        self.messages[program].append(Span(action, leaves, arrives))
        return [action.peer]

    def _together(self, members: tuple[int, ...], action: Action) -> list[int] | None:
        if any(self._next(member) != action for member in members):
            return None
        start = max(self.free[member] for member in members)
        if action.kind in COMPUTE:
            for member in members:
                for need in needs(self.schedule.work, self.schedule.shares, member, action):
                    if need.kind in COMPUTE:
                        continue  # it came before in the same list
                    if need not in self.there[member]:
                        return None
                    start = max(start, self.there[member][need])
        shared = action.kind in COMPUTE and action.module in self.schedule.shares
        for member in members:
            share = self.schedule.share(action.module, action.microbatch, member) if shared else 1.0
            self.free[member] = start + self.durations.of(member, action, share)
            self.spans[member].append(Span(action, start, self.free[member]))
            self.at[member] += 1
        return list(members)
