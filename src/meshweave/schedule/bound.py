"""How short could a step be? What no placement of the encoders' work around the language model's order can beat."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from meshweave.config import LANGUAGE
from meshweave.schedule.actions import Action, Kind
from meshweave.schedule.durations import Durations
from meshweave.schedule.generators.language import language_order
from meshweave.schedule.schedule import kinds_of
from meshweave.schedule.work import StepWork

Table = Sequence[Sequence[float]]
"""Program → place in its order → seconds."""


@dataclass(frozen=True)
class LanguageGraph:
    """The language model's computations, in their order, and what each waits for. It knows nothing of encoders."""

    orders: tuple[tuple[Action, ...], ...]
    """Program to its order."""
    seconds: Table
    sources: tuple[tuple[tuple[int, int, float] | None, ...], ...]
    """Program → place → (program, place) of the computation in another list that it waits for, and the seconds from there."""
    sequence: tuple[tuple[int, int], ...]
    """All (program, place), each after those it waits for."""

    @cached_property
    def totals(self) -> tuple[float, ...]:
        """Program to its seconds of work."""
        return tuple(map(sum, self.seconds))

    @cached_property
    def places(self) -> dict[Action, tuple[tuple[int, int], ...]]:
        """Action to every (program, place) where it stands."""
        found: dict[Action, tuple[tuple[int, int], ...]] = {}
        for program, order in enumerate(self.orders):
            for place, action in enumerate(order):
                found[action] = (*found.get(action, ()), (program, place))
        return found

    @cached_property
    def ways(self) -> list[list[list[float]]]:
        """Program → place → seconds from there to each computation in another list that waits for it."""
        found: list[list[list[float]]] = [[[] for _ in order] for order in self.orders]
        for row in self.sources:
            for source in row:
                if source:
                    found[source[0]][source[1]].append(source[2])
        return found

    def earliest(self, tokens: float) -> list[list[float]]:
        """Earliest start of every computation if the media tokens of all microbatches are there after some seconds."""
        starts = [[0.0] * len(order) for order in self.orders]
        for program, place in self.sequence:
            action, source = self.orders[program][place], self.sources[program][place]
            start = tokens if action.kind == Kind.FORWARD and action.stage == 0 else 0.0
            if place:
                start = max(start, starts[program][place - 1] + self.seconds[program][place - 1])
            if source:
                start = max(start, starts[source[0]][source[1]] + self.seconds[source[0]][source[1]] + source[2])
            starts[program][place] = start
        return starts

    def latest(self, stops: Table) -> list[list[float]]:
        """Latest start of every computation that lets each stop by its own time in `stops`."""
        limits = [list(row) for row in stops]
        for program, place in reversed(self.sequence):
            start = limits[program][place] = limits[program][place] - self.seconds[program][place]
            if place:
                limits[program][place - 1] = min(limits[program][place - 1], start)
            if source := self.sources[program][place]:
                limits[source[0]][source[1]] = min(limits[source[0]][source[1]], start - source[2])
        return limits

    def stops(self, end: float, tail: float) -> list[list[float]]:
        """When each computation has to stop for the step to end at `end`, with `tail` seconds left after token gradients."""
        return [[end - tail if gives_gradients(action) else end for action in order] for order in self.orders]


def gives_gradients(action: Action) -> bool:
    """Whether a computation of the language model yields the gradients of media tokens."""
    return action.stage == 0 and action.kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT)


def language_graph(work: StepWork, pipeline: int, durations: Durations) -> LanguageGraph:
    """The graph of the order that `language_order` fixes. `pipeline` is the language model's `pp`."""
    everything = range(work.microbatches)
    orders = tuple(tuple(language_order(work, program, pipeline, everything)) for program in range(len(work.programs)))
    places = [{action: place for place, action in enumerate(order)} for order in orders]
    sources = []
    for program, order in enumerate(orders):
        row: list[tuple[int, int, float] | None] = []
        for action in order:
            found = _source(work, program, action)
            row.append(found and (found[0], places[found[0]][found[1]], durations.of(found[0], found[2])))
        sources.append(tuple(row))
    seconds = tuple(tuple(durations.of(program, action) for action in order) for program, order in enumerate(orders))
    return LanguageGraph(orders, seconds, tuple(sources), _sequence(orders, sources))


def _source(work: StepWork, program: int, action: Action) -> tuple[int, Action, Action] | None:
    """(Program, its computation that this one waits for, the send between them)."""
    before, after = work.neighbours[LANGUAGE, program]
    if action.kind == Kind.FORWARD and action.stage > 0:
        sender, stage, kind = before, action.stage - 1, Kind.SEND_FORWARD
        computation = Kind.FORWARD
    elif action.kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT) and action.stage < work.last(LANGUAGE):
        sender, stage, kind = after, action.stage + 1, Kind.SEND_BACKWARD
        computation = action.kind
    else:
        return None
    send = Action(kind, LANGUAGE, stage, action.microbatch, program)
    return sender, Action(computation, LANGUAGE, stage, action.microbatch), send


def _sequence(
    orders: Sequence[Sequence[Action]], sources: Sequence[Sequence[tuple[int, int, float] | None]]
) -> tuple[tuple[int, int], ...]:
    at, sequence = [0] * len(orders), []
    ready = list(range(len(orders)))
    waiting: dict[tuple[int, int], list[int]] = {}
    while ready:
        program = ready.pop()
        while at[program] < len(orders[program]):
            place = at[program]
            source = sources[program][place]
            if source and at[source[0]] <= source[1]:
                waiting.setdefault(source[:2], []).append(program)
                break
            sequence.append((program, place))
            at[program] += 1
            ready += waiting.pop((program, place), [])
    return tuple(sequence)


def pass_seconds(work: StepWork, durations: Durations, encoder: str, kind: Kind) -> float:
    """Seconds of one pass through all stages of an encoder, shared evenly; 0 for what it does not do."""
    if kind not in kinds_of(work, encoder):
        return 0.0
    return sum(durations.table.get((kind, encoder, stage), 0.0) for stage in range(work.modules[encoder].stages))


def lower_bound(work: StepWork, pipeline: int, durations: Durations) -> float:
    """Seconds below which no schedule with this order of the language model can come, whoever takes which share of the encoders.

    The greatest of: the critical path (the first pass's forward, the language model's pipeline, the last pass's backward); and,
    for the ranks that hold encoders, the mean of their work: all of it, or what lies after the first gradients of some
    microbatch's media tokens (the encoder backwards from there on, and what the language model cannot have done by then), or its
    mirror image, what lies before the last use of some microbatch's tokens. Encoders take the seconds of `durations.table`,
    boundaries none.

    Args:
        pipeline: the language model's `pp`.
    """
    graph = language_graph(work, pipeline, durations)
    head, tail = (
        max((pass_seconds(work, durations, name, kind) for name in work.encoders), default=0.0)
        for kind in (Kind.FORWARD, Kind.BACKWARD)
    )
    starts = graph.earliest(head)
    critical = max(
        start + seconds + (tail if gives_gradients(action) else 0.0)
        for row, its, order in zip(starts, graph.seconds, graph.orders, strict=True)
        for start, seconds, action in zip(row, its, order, strict=True)
    )
    latest = graph.latest(graph.stops(0.0, tail))
    bound = max(critical, *graph.totals)
    holders = [{program for program, its in enumerate(work.programs) if name in its.stages} for name in work.encoders]
    for group in [*holders, set().union(*holders)]:
        its = [name for name, held in zip(work.encoders, holders, strict=True) if held <= group]
        if group:
            bound = max(bound, _group_bound(work, durations, graph, (starts, latest), sorted(group), its))
    return bound


def _group_bound(
    work: StepWork,
    durations: Durations,
    graph: LanguageGraph,
    extremes: tuple[Table, Table],
    group: list[int],
    encoders: list[str],
) -> float:
    """The mean work of some programs' ranks, in all and in what is left of the step on either side of a microbatch's boundary."""
    ranks = [len(work.programs[program].ranks) for program in group]
    everything = sum(count * graph.totals[program] for count, program in zip(ranks, group, strict=True))
    forwards, backwards = (
        [_encoder_work(work, durations, encoders, kind, microbatch) for microbatch in range(work.microbatches)]
        for kind in (Kind.FORWARD, Kind.BACKWARD)
    )
    bound = (everything + sum(forwards) + sum(backwards)) / sum(ranks)
    earliest, latest = extremes
    for kind, starts, amounts in ((Kind.FORWARD, latest, forwards), (Kind.BACKWARD, earliest, list(reversed(backwards)))):
        sums = list(accumulate(amounts))
        if kind == Kind.BACKWARD:
            sums.reverse()
        if not sums[-1 if kind == Kind.FORWARD else 0]:
            continue
        clocks = [_Worked(starts[program], graph.seconds[program], kind == Kind.FORWARD) for program in group]
        for action, places in graph.places.items():
            turns = action.kind == Kind.FORWARD and action.stage == 0 if kind == Kind.FORWARD else gives_gradients(action)
            if not turns:
                continue
            away = min(-starts[p][i] if kind == Kind.FORWARD else starts[p][i] + graph.seconds[p][i] for p, i in places)
            done = sum(count * clock.until(away) for count, clock in zip(ranks, clocks, strict=True))
            bound = max(bound, away + (everything - done + sums[action.microbatch]) / sum(ranks))
    return bound


def _encoder_work(work: StepWork, durations: Durations, encoders: list[str], kind: Kind, microbatch: int) -> float:
    """Rank seconds of the passes whose first (forward) or last (backward) microbatch this is."""
    found = 0.0
    for name in encoders:
        module = work.modules[name]
        served = module.served(microbatch // module.per_pass, work.microbatches)
        if kind in kinds_of(work, name) and microbatch == served[0 if kind == Kind.FORWARD else -1]:
            for stage in range(module.stages):
                ranks = sum(len(work.programs[program].ranks) for program in work.holders(name, stage))
                found += ranks * durations.table.get((kind, name, stage), 0.0)
    return found


class _Worked:
    """How much of its work a program has behind it, by time; counted from the end of the step where that is `mirrored`."""

    def __init__(self, starts: Sequence[float], seconds: Sequence[float], mirrored: bool) -> None:
        spans = list(zip(starts, seconds, strict=True))
        if mirrored:
            spans = [(-start - length, length) for start, length in reversed(spans)]
        self.starts = [start for start, _ in spans]
        self.lengths = [length for _, length in spans]
        self.before = [0.0, *accumulate(self.lengths)]

    def until(self, time: float) -> float:
        """Seconds of work done by then."""
        last = bisect_right(self.starts, time) - 1
        return self.before[last] + min(self.lengths[last], time - self.starts[last]) if last >= 0 else 0.0
