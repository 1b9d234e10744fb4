"""Colocated encoders inside the language model's pipeline: their passes fill its bubbles, in memory that the number of microbatches
does not touch. The idea of Optimus (arXiv 2408.03505) and of nested pipelines; the order comes from durations, by search."""

import heapq
from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf

from meshweave.config import LANGUAGE
from meshweave.schedule.actions import Action, Kind
from meshweave.schedule.bound import LanguageGraph, Table, gives_gradients, language_graph, lower_bound, pass_seconds
from meshweave.schedule.durations import Durations
from meshweave.schedule.generators.language import language_order
from meshweave.schedule.lower import lower
from meshweave.schedule.schedule import Shares, kinds_of
from meshweave.schedule.simulate import simulate
from meshweave.schedule.work import StepWork

Queues = list[list[list[Action]]]

LEAST_SHARE = 0.25
"""Programs take no smaller part of a pass than this, relative to an even one: media items do not come arbitrarily small."""

_GOOD_ENOUGH = 1.005
"""Of the lower bound: where the search stops."""

_TRIES = 1_500_000
"""Computations that the search may place in all its tries together: about ten seconds."""


def nested(work: StepWork, pipeline: int, durations: Durations) -> tuple[Queues, Shares]:
    """Program to its queues, and the shares of the encoders' passes: both for `lower`.

    The language model keeps its own order. Encoder passes are dealt, one after the other, to the programs that have time for them,
    and every program then takes whatever has to start soonest if the step is to end when it is meant to: see `_Play`. A search over
    that end and over each program's allowance keeps what `simulate` finds shortest, plain even shares included. Encoders that are
    pipelines, or whose lanes span programs, must be shared evenly; with one of them, all are.

    No encoder holds the activations of more passes than `run_ahead` says, whatever the number of microbatches.

    Args:
        pipeline: the language model's `pp`.
        durations: seconds of the actions; the order is valid under any others, but as good only under similar ones.

    Raises:
        ScheduleError: ranks of an encoder are none of the language model's, in a way that lets nothing start.
    """
    candidates: list[tuple[Queues, Shares]] = [(queues, {}) for queues in _even(work, pipeline, durations)]
    if work.encoders and all(_may_be_dealt(work, name) for name in work.encoders):
        candidates.append(_search(work, pipeline, durations))
    if len(candidates) == 1:
        return candidates[0]
    return min(candidates, key=lambda its: simulate(lower(work, its[0], durations, its[1]), durations).seconds)


def run_ahead(work: StepWork, pipeline: int, durations: Durations, encoder: str) -> int:
    """Most passes of an encoder that have begun, and whose activations may still be held on some rank.

    As many as the language model's first stage takes in before it gives the first gradients back, and as many as the bubbles can
    hold: forwards in those before these gradients, or backwards in those after its last forward. Bubbles grow with the pipeline
    and not with the microbatches.
    """
    graph = language_graph(work, pipeline, durations)
    return _run_ahead(work, graph, durations, encoder)


def _run_ahead(work: StepWork, graph: LanguageGraph, durations: Durations, encoder: str) -> int:
    module = work.modules[encoder]
    programs = [program for program, its in enumerate(work.programs) if encoder in its.stages]
    ranks = [len(work.programs[program].ranks) for program in programs]
    fitting = 0.0
    for kind, idle in zip((Kind.FORWARD, Kind.BACKWARD), _idle(work, graph, programs), strict=True):
        seconds = pass_seconds(work, durations, encoder, kind) / module.stages
        mean = sum(count * its for count, its in zip(ranks, idle, strict=True)) / sum(ranks)
        fitting = max(fitting, mean / seconds if seconds else 0.0)
    passes = module.passes(work.microbatches)
    return min(passes, _taken_in(work, graph, encoder) + module.stages - 1 + ceil(min(fitting, passes)))


def _idle(work: StepWork, graph: LanguageGraph, programs: Sequence[int]) -> tuple[list[float], list[float]]:
    """Seconds that programs idle before the first token gradients (or the last tokens' use), and after the last tokens' use."""
    starts = graph.earliest(0.0)
    end = max(row[-1] + its[-1] for row, its in zip(starts, graph.seconds, strict=True) if row)
    forwards = [place for action, places in graph.places.items() if _takes_tokens(action) for place in places]
    backwards = [place for action, places in graph.places.items() if gives_gradients(action) for place in places]
    last = max(starts[program][place] for program, place in forwards)
    first = min((starts[program][place] + graph.seconds[program][place] for program, place in backwards), default=last)
    before, after = [], []
    for program in programs:
        spans = list(zip(starts[program], graph.seconds[program], strict=True))
        before.append(first - sum(max(0.0, min(first, start + length) - start) for start, length in spans))
        after.append(end - last - sum(max(0.0, start + length - max(last, start)) for start, length in spans))
    return before, after


def _takes_tokens(action: Action) -> bool:
    return action.kind == Kind.FORWARD and action.stage == 0


def _taken_in(work: StepWork, graph: LanguageGraph, encoder: str) -> int:
    """Passes that must have begun before the oldest of them can be over."""
    module, most, taken = work.modules[encoder], 1, 0
    order = graph.orders[work.holders(LANGUAGE, 0)[0]]
    for action in order if module.backward and work.modules[LANGUAGE].backward else ():
        if _takes_tokens(action):
            taken = action.microbatch // module.per_pass + 1
        elif (
            gives_gradients(action)
            and action.microbatch == module.served(action.microbatch // module.per_pass, work.microbatches)[-1]
        ):
            most = max(most, taken - action.microbatch // module.per_pass)
    return most


def _may_be_dealt(work: StepWork, encoder: str) -> bool:
    apart = all(work.gangs[encoder, program] == (program,) for program in work.holders(encoder, 0))
    return work.modules[encoder].stages == 1 and apart


def _even(work: StepWork, pipeline: int, durations: Durations) -> Iterator[Queues]:
    """Even shares: the language model first, encoders where it waits, as far ahead as they must or as they may."""
    graph = language_graph(work, pipeline, durations)
    least = {name: _taken_in(work, graph, name) for name in work.encoders}
    most = {name: _run_ahead(work, graph, durations, name) for name in work.encoders}
    starts = graph.earliest(0.0)
    for ahead in (least, most) if least != most else (most,):
        queues: Queues = []
        for program, its in enumerate(work.programs):
            due = _tokens_only(work, graph, program, starts, ahead)
            language = list(
                zip(starts[program], range(len(due), len(due) + len(starts[program])), graph.orders[program], strict=True)
            )
            orders = [[action for *_, action in sorted([*due, *language])]]
            for name in work.encoders:
                if work.modules[name].backward:
                    orders += [_even_order(work, name, stage, ahead[name]) for stage in its.stages.get(name, ())]
            queues.append([order for order in orders if order])
        yield queues


def _tokens_only(
    work: StepWork, graph: LanguageGraph, program: int, starts: Table, ahead: dict[str, int]
) -> list[tuple[float, int, Action]]:
    """(When, order among equals, forward) of encoders without a backward: nothing but this time keeps them from running away."""
    found = []
    first = work.holders(LANGUAGE, 0)[0]
    used = {action.microbatch: starts[first][place] for place, action in enumerate(graph.orders[first]) if _takes_tokens(action)}
    for name in work.encoders:
        module = work.modules[name]
        for number in range(module.passes(work.microbatches) if not module.backward else 0):
            when = used[(number - ahead[name]) * module.per_pass] if number >= ahead[name] else -1.0
            found += [
                (when, stage, Action(Kind.FORWARD, name, stage, number)) for stage in work.programs[program].stages.get(name, ())
            ]
    found.sort(key=lambda its: (its[0], its[2].microbatch, its[1]))
    return [(when, place, action) for place, (when, _, action) in enumerate(found)]


def _even_order(work: StepWork, encoder: str, stage: int, ahead: int) -> list[Action]:
    module = work.modules[encoder]
    passes = module.passes(work.microbatches)
    order, begun = [], 0
    for number in range(passes):
        upto = min(passes, max(begun, number + ahead + module.stages - 1 - stage))
        order += [Action(Kind.FORWARD, encoder, stage, later) for later in range(begun, upto)]
        order += [Action(kind, encoder, stage, number) for kind in kinds_of(work, encoder)[1:]]
        begun = upto
    return order


@dataclass(frozen=True)
class _Encoder:
    """One encoder, for dealing."""

    name: str
    per_pass: int
    passes: int
    ahead: int
    forward: float
    backward: float
    ranks: tuple[int, ...]
    """Program to its ranks that hold the encoder."""
    tokens: tuple[float, ...]
    """Program to the seconds from the end of its forward until its tokens are where they are used."""
    gradients: tuple[float, ...]
    """Program to the seconds in which token gradients reach it."""


@dataclass(frozen=True)
class _Aim:
    """What a try is to bring about."""

    end: float
    """Of the step, in seconds."""
    slack: tuple[float, float]
    """Of the time by which `end` exceeds the language model's critical path, what its first and its last computations may use."""
    patience: float
    """How much of an encoder's part must fit in before the language model goes on, for it not to wait instead."""
    allowance: tuple[float, ...]
    """Program to the seconds by which its own end is corrected: what it takes less, or more, of the passes."""


@dataclass(frozen=True)
class _Outcome:
    """What came of a try."""

    end: float
    ends: tuple[float, ...]
    queues: Queues
    shares: Shares


_SLACKS = ((0.0, 0.5), (0.0, 1.0), (0.0, 0.3), (0.0, 0.7), (1.0, 1.0), (0.0, 0.85))
_STRETCHES = (1.0, 1.02, 1.05, 1.1)
_PATIENCES = (1.0, 0.0, 0.5)


def _search(work: StepWork, pipeline: int, durations: Durations) -> tuple[Queues, Shares]:
    """The best of a bounded number of tries: one setting after the other is varied, then the allowances follow the ends."""
    graph = language_graph(work, pipeline, durations)
    encoders = [_encoder(work, graph, durations, name) for name in work.encoders]
    bound = lower_bound(work, pipeline, durations)
    search = _Search(work, graph, encoders, bound)
    search.attempt(_Aim(bound, _SLACKS[0], _PATIENCES[0], (0.0,) * len(work.programs)))
    while not search.over:
        before = search.left
        for slack in _SLACKS:
            search.attempt(replace(search.aim, slack=slack))
        for stretch in _STRETCHES:
            search.attempt(replace(search.aim, end=bound * stretch))
        for patience in _PATIENCES:
            search.attempt(replace(search.aim, patience=patience))
        aim, outcome = search.aim, search.best
        for _ in range(_CORRECTIONS):
            aim = _corrected(aim, outcome)
            outcome = search.attempt(aim)
        if search.left == before:
            break
    return search.best.queues, search.best.shares


class _Search:
    """State: the best outcome yet, what it aimed at, and the tries that are left."""

    def __init__(self, work: StepWork, graph: LanguageGraph, encoders: Sequence[_Encoder], bound: float) -> None:
        self.work, self.graph, self.encoders, self.bound = work, graph, encoders, bound
        size = sum(map(len, graph.orders)) + sum(2 * its.passes * sum(map(bool, its.ranks)) for its in encoders)
        self.left = max(1, min(_MOST_TRIES, _COMPUTATIONS // size))
        self.known: dict[_Aim, _Outcome] = {}
        self.best = _Outcome(inf, (), [], {})
        self.aim = _Aim(bound, _SLACKS[0], _PATIENCES[0], ())

    @property
    def over(self) -> bool:
        return self.left <= 0 or self.best.end <= self.bound * _GOOD_ENOUGH

    def attempt(self, aim: _Aim) -> _Outcome:
        if self.over:
            return self.best
        if aim not in self.known:
            self.left -= 1
            self.known[aim] = _Play(self.work, self.graph, self.encoders, aim).run()
        outcome = self.known[aim]
        if outcome.end < self.best.end:
            self.best, self.aim = outcome, aim
        return outcome


def _corrected(aim: _Aim, outcome: _Outcome) -> _Aim:
    mean = sum(outcome.ends) / len(outcome.ends)
    return replace(aim, allowance=tuple(its + (mean - end) / 2 for its, end in zip(aim.allowance, outcome.ends, strict=True)))


def _encoder(work: StepWork, graph: LanguageGraph, durations: Durations, name: str) -> _Encoder:
    module, users = work.modules[name], work.holders(LANGUAGE, 0)
    ranks = tuple(len(its.ranks) if name in its.stages else 0 for its in work.programs)
    ways = []
    for apart, swap in ((Kind.SEND_TOKENS, Kind.SWAP_TOKENS), (Kind.SEND_TOKEN_GRADIENTS, Kind.SWAP_TOKEN_GRADIENTS)):
        seconds = [durations.table.get((kind, name, 0), 0.0) for kind in (apart, swap)]
        ways.append(tuple(max(seconds[user == program] for user in users) for program in range(len(work.programs))))
    forward, backward = (pass_seconds(work, durations, name, kind) for kind in (Kind.FORWARD, Kind.BACKWARD))
    ahead = _run_ahead(work, graph, durations, name)
    return _Encoder(name, module.per_pass, module.passes(work.microbatches), ahead, forward, backward, ranks, *ways)


@dataclass
class _Pass:
    """State: one pass of an encoder that has been dealt."""

    encoder: int
    number: int
    shares: tuple[float, ...]
    last: int
    """The last microbatch that it serves."""
    forwards: int
    """Parts still to be begun."""
    backwards: int
    encoded: float = 0.0
    """When its tokens are where they are used, once no forward is left to begin."""
    over: float = 0.0
    """When its activations are gone, once no backward is left to begin."""


class _Play:
    """Plays a step: deals passes as programs fall idle, and has every free program do what must start soonest.

    The aim's end gives each of the language model's computations a latest start, and so each encoder pass one, too: a forward has
    to be over when the first stage needs its tokens, a backward before the pass begins for which it makes room. A program that is
    free takes the computation with the earliest latest start of those that could run; it waits instead if an encoder's part would
    make the language model late. A pass is dealt when somebody is free for it, so that it is over soonest, but to nobody more than
    fits in before his next computation of the language model and before the end.
    """

    def __init__(self, work: StepWork, graph: LanguageGraph, encoders: Sequence[_Encoder], aim: _Aim) -> None:
        self.work, self.graph, self.encoders, self.aim = work, graph, encoders, aim
        programs = range(len(work.programs))
        self.users = work.holders(LANGUAGE, 0)
        self.latest = _latest(graph, encoders, aim)
        self.due = _due(graph, encoders, self.latest, work.microbatches)
        self.crews = [work.gangs.get((LANGUAGE, program), (program,)) for program in programs]
        self.sums = [[0.0, *accumulate(row)] for row in graph.seconds]
        self.now, self.events, self.hurry = 0.0, [0.0], False
        self.at, self.free = [0 for _ in programs], [0.0 for _ in programs]
        self.stops = [[inf] * len(order) for order in graph.orders]
        self.used, self.gradients = ([[len(self.users), 0.0] for _ in range(work.microbatches)] for _ in range(2))
        self.lists: list[list[Action]] = [[] for _ in programs]
        self.passes: list[list[_Pass]] = [[] for _ in encoders]
        self.over = [0 for _ in encoders]
        self.forwards: list[deque[_Pass]] = [deque() for _ in programs]
        self.backwards: list[tuple[deque[_Pass], ...]] = [tuple(deque() for _ in encoders) for _ in programs]
        self.owed = [[0.0, 0.0] for _ in programs]
        """Program to the seconds of forwards, and of backwards, that were dealt to it and have not begun."""

    def run(self) -> _Outcome:
        programs = range(len(self.at) - 1, -1, -1)
        while self.events or not self.hurry:
            self.hurry = not self.events
            if self.events:
                self.now = heapq.heappop(self.events)
                while self.events and self.events[0] <= self.now:
                    heapq.heappop(self.events)
            self._make_room()
            while any([self.free[program] <= self.now and self._step(program) for program in programs]):
                self.hurry = False
        shares = {its.name: tuple(one.shares for one in dealt) for its, dealt in zip(self.encoders, self.passes, strict=True)}
        return _Outcome(max(self.free), tuple(self.free), [[order] for order in self.lists], shares)

    def _make_room(self) -> None:
        for encoder, dealt in enumerate(self.passes):
            while self.over[encoder] < len(dealt) and self._is_over(dealt[self.over[encoder]]):
                self.over[encoder] += 1

    def _is_over(self, one: _Pass) -> bool:
        if self.encoders[one.encoder].backward_kind is None:
            left, when = self.used[one.last]
            return not left and when <= self.now
        return not one.backwards and one.over <= self.now

    def _step(self, program: int) -> bool:
        """Lets a free program begin something; False if there is nothing, or nothing that should not wait."""
        place = self.at[program]
        latest = self.latest[program][place] if place < len(self.latest[program]) else inf
        ready = latest < inf and self._language_ready(program)
        if not self.forwards[program]:
            self._deal_next(program, latest if ready else inf)
        for start, seconds, one, kind in self._parts(program):
            if latest <= start:
                if ready:
                    break
                late = self.now + seconds > latest + _EPSILON
                if late and not self.hurry and self._language_start(program) < self.now + seconds * self.aim.patience - _EPSILON:
                    continue
            self._begin_part(program, one, kind, seconds)
            return True
        if ready:
            self._begin_language(program)
        return ready
