"""Where does communication go? Plays the order of computations in time and writes down every send and receive as it falls due.

A send and its receive enter the two lists at one moment of the play. Each list therefore follows the play, and a run in which
every send blocks until it is received could follow it, too: no deadlock. `check` does not take this on trust.
"""

import heapq
from collections.abc import Mapping, Sequence

from meshweave.config import LANGUAGE
from meshweave.errors import ScheduleError
from meshweave.schedule.actions import Action, Kind
from meshweave.schedule.durations import Durations
from meshweave.schedule.schedule import Schedule, Shares, emits, needs, streams
from meshweave.schedule.work import StepWork

Queue = Sequence[Action]
"""Computations that a program does in this order."""


def lower(
    work: StepWork,
    queues: Sequence[Sequence[Queue]],
    durations: Durations,
    shares: Shares | None = None,
    ahead: Mapping[str, int] | None = None,
) -> Schedule:
    """A schedule in which every program works its queues, each in its own order.

    A program that is free takes the head of the first of its queues that could start: earlier queues come first. Heads that the
    members of a gang must do together start when all are free.

    Args:
        queues: program → its queues, of computations only.
        durations: decide between queues, and which communication falls due first; any are valid.
        ahead: encoder to the passes whose tokens the language model may not have taken in yet when it begins another. It bounds
            encoders without a backward, whose queues hold forwards alone.

    Raises:
        ScheduleError: no head can start: the queues contradict one another.
    """
    shares = shares or {}
    play = _Play(work, queues, durations, shares, ahead or {})
    play.run()
    lists = []
    for program, actions in enumerate(play.lists):
        gathered = [name for name in work.programs[program].stages if not streams(work, name)]
        first = {name: work.programs[program].stages[name][0] for name in gathered}
        before = [Action(Kind.GATHER, name, first[name], -1) for name in gathered]
        after = [Action(Kind.REDUCE, name, first[name], -1) for name in gathered]
        lists.append((*before, *actions, *after))
    return Schedule(work, tuple(lists), shares)


class _Play:
    """State: the clock, what every program has done, and what has reached it."""

    def __init__(
        self,
        work: StepWork,
        queues: Sequence[Sequence[Queue]],
        durations: Durations,
        shares: Shares,
        ahead: Mapping[str, int],
    ) -> None:
        self.work, self.durations, self.shares, self.ahead = work, durations, shares, ahead
        self.taken = 0  # microbatches whose tokens the language model has taken in
        self.queues = [[list(reversed(queue)) for queue in its] for its in queues]
        self.lists: list[list[Action]] = [[] for _ in queues]
        self.here: list[set[Action]] = [set() for _ in queues]
        self.free = [True] * len(queues)
        self.events: list[tuple[float, int, int, Action]] = []
        self.clock, self.count = 0.0, 0

    def run(self) -> None:
        for program in range(len(self.queues)):
            self._start(program)
        while self.events:
            self.clock, _, program, action = heapq.heappop(self.events)
            if action.receives:
                self.here[program].add(action)
                touched = {program}
            else:
                touched = self._finish(program, action)
            for other in sorted(touched):
                self._start(other)
        left = [(program, queue[-1]) for program, its in enumerate(self.queues) for queue in its if queue]
        if left:
            waiting = "; ".join(
                f"program {program} waits with {action} for "
                + ", ".join(
                    str(need) for need in needs(self.work, self.shares, program, action) if need not in self.here[program]
                )
                for program, action in left[:4]
            )
            raise ScheduleError(f"the order of computations contradicts itself: {waiting}")

    def _finish(self, program: int, action: Action) -> set[int]:
        self.free[program] = True
        self.here[program].add(action)
        for message in emits(self.work, self.shares, program, action):
            self.lists[program].append(message)
            if message.sends:
                received = message.received_by(program)
                self.lists[message.peer].append(received)
                self._at(self.clock + self.durations.of(program, message), message.peer, received)
            else:
                self.here[program].add(message)
        touched = set(self.work.gangs[action.module, program])
        if action[:3] == (Kind.FORWARD, LANGUAGE, 0):
            self.taken = max(self.taken, action.microbatch + 1)
            touched |= {holder for name in self.ahead for holder in self.work.holders(name, 0)}
        return touched

    def _start(self, program: int) -> None:
        if not self.free[program]:
            return
        for queue in self.queues[program]:
            if queue and self._all_ready(program, queue[-1]):
                action = queue[-1]
                for member in self._members(program, action):
                    next(its for its in self.queues[member] if its and its[-1] == action).pop()
                    self.lists[member].append(action)
                    self.free[member] = False
                    share = self.shares[action.module][action.microbatch][member] if action.module in self.shares else 1.0
                    self._at(self.clock + self.durations.of(member, action, share), member, action)
                return

    def _members(self, program: int, action: Action) -> tuple[int, ...]:
        gang = self.work.gangs[action.module, program]
        return gang if len(gang) > 1 else (program,)

    def _all_ready(self, program: int, action: Action) -> bool:
        if action.module in self.ahead and action.stage == 0:
            oldest = action.microbatch - self.ahead[action.module]
            if oldest >= 0 and self.taken <= self.work.modules[action.module].served(oldest, self.work.microbatches)[-1]:
                return False
        return all(
            self.free[member]
            and any(its and its[-1] == action for its in self.queues[member])
            and all(need in self.here[member] for need in needs(self.work, self.shares, member, action))
            for member in self._members(program, action)
        )

    def _at(self, when: float, program: int, action: Action) -> None:
        self.count += 1
        heapq.heappush(self.events, (when, self.count, program, action))
