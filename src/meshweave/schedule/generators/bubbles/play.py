"""Who encodes what, and when? Deals encoder passes to the programs that fall idle, in the time of one played step."""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf

from meshweave.config import LANGUAGE
from meshweave.schedule.actions import Action, Kind
from meshweave.schedule.bound import LanguageGraph, Table, gives_gradients, pass_seconds
from meshweave.schedule.durations import Durations
from meshweave.schedule.generators.bubbles.even import Queues
from meshweave.schedule.generators.bubbles.run_ahead import run_ahead_in, takes_tokens
from meshweave.schedule.schedule import Shares
from meshweave.schedule.work import StepWork

LEAST_SHARE = 0.25
"""Programs take no smaller part of a pass than this, relative to an even one: media items do not come arbitrarily small."""

_EPSILON = 1e-9


@dataclass(frozen=True)
class Encoder:
    """One encoder, for dealing."""

    name: str
    per_pass: int
    passes: int
    ahead: int
    trained: bool
    forward: float
    """Seconds of a pass that is shared evenly."""
    backward: float
    ranks: tuple[int, ...]
    """Program to its ranks that hold the encoder."""
    tokens: tuple[float, ...]
    """Program to the seconds from the end of its forward until its tokens are where they are used."""
    gradients: tuple[float, ...]
    """Program to the seconds in which token gradients reach it."""


@dataclass(frozen=True)
class Aim:
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
class Outcome:
    """What came of a try."""

    end: float
    ends: tuple[float, ...]
    queues: Queues
    shares: Shares


def encoder_of(work: StepWork, graph: LanguageGraph, durations: Durations, name: str) -> Encoder:
    module, users = work.modules[name], work.holders(LANGUAGE, 0)
    ranks = tuple(len(its.ranks) if name in its.stages else 0 for its in work.programs)
    ways = []
    for apart, swap in ((Kind.SEND_TOKENS, Kind.SWAP_TOKENS), (Kind.SEND_TOKEN_GRADIENTS, Kind.SWAP_TOKEN_GRADIENTS)):
        seconds = [durations.table.get((kind, name, 0), 0.0) for kind in (apart, swap)]
        ways.append(tuple(max(seconds[user == program] for user in users) for program in range(len(work.programs))))
    forward, backward = (pass_seconds(work, durations, name, kind) for kind in (Kind.FORWARD, Kind.BACKWARD))
    ahead = run_ahead_in(work, graph, durations, name)
    return Encoder(
        name, module.per_pass, module.passes(work.microbatches), ahead, module.backward, forward, backward, ranks, *ways
    )


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


class Play:
    """Plays a step: deals passes as programs fall idle, and has every free program do what must start soonest.

    The aim's end gives each of the language model's computations a latest start, and so each encoder pass one, too: a forward has
    to be over when the first stage needs its tokens, a backward before the pass begins for which it makes room. A free program
    takes the computation with the earliest latest start of those that could run; it waits instead if an encoder's part would make
    the language model late. A pass is dealt when some program is free for it, so that it is over soonest; no program gets more
    than fits in before its next computation of the language model, and before the end, unless that leaves something over.
    """

    def __init__(self, work: StepWork, graph: LanguageGraph, encoders: Sequence[Encoder], aim: Aim) -> None:
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
        self.gradient_ways = {way for its in encoders for way in its.gradients}
        self.owed = [[0.0, 0.0] for _ in programs]
        """Program to the seconds of forwards, and of backwards, that were dealt to it and have not begun."""

    def run(self) -> Outcome:
        programs = range(len(self.at) - 1, -1, -1)
        while self.events or not self.hurry:
            self.hurry = not self.events
            if self.events:
                self.now = heapq.heappop(self.events)
                while self.events and self.events[0] <= self.now:
                    heapq.heappop(self.events)
            self._make_room()
            while sum(self.free[program] <= self.now and self._step(program) for program in programs):
                self.hurry = False
        shares = {its.name: tuple(one.shares for one in dealt) for its, dealt in zip(self.encoders, self.passes, strict=True)}
        return Outcome(max(self.free), tuple(self.free), [[order] for order in self.lists], shares)

    def _make_room(self) -> None:
        for encoder, dealt in enumerate(self.passes):
            while self.over[encoder] < len(dealt) and self._is_over(dealt[self.over[encoder]]):
                self.over[encoder] += 1

    def _is_over(self, one: _Pass) -> bool:
        if not self.encoders[one.encoder].trained:
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

    def _parts(self, program: int) -> list[tuple[float, float, _Pass, Kind]]:
        """(Latest start, seconds, pass, kind) of the encoder parts that could begin, the most urgent first."""
        found = []
        if self.forwards[program]:
            one = self.forwards[program][0]
            seconds = self.encoders[one.encoder].forward * one.shares[program]
            found.append((self.due[one.encoder][one.number] - seconds, seconds, one, Kind.FORWARD))
        for encoder, waiting in zip(self.encoders, self.backwards[program], strict=True):
            if not waiting:
                continue
            one = waiting[0]
            left, there = self.gradients[one.last]
            if left or there + encoder.gradients[program] > self.now:
                continue
            seconds = encoder.backward * one.shares[program]
            start = self.aim.end - self.owed[program][1]
            if one.number + encoder.ahead < encoder.passes:
                start = min(start, self.due[one.encoder][one.number + encoder.ahead] - encoder.forward - seconds)
            found.append((start, seconds, one, Kind.BACKWARD))
        found.sort(key=lambda part: part[0])
        return found

    def _begin_part(self, program: int, one: _Pass, kind: Kind, seconds: float) -> None:
        encoder = self.encoders[one.encoder]
        stop = self._occupy(program, Action(kind, encoder.name, 0, one.number), seconds)
        if kind == Kind.FORWARD:
            self.forwards[program].popleft()
            self.owed[program][0] -= seconds
            one.forwards -= 1
            one.encoded = max(one.encoded, stop + encoder.tokens[program])
            heapq.heappush(self.events, one.encoded)
        else:
            self.backwards[program][one.encoder].popleft()
            self.owed[program][1] -= seconds
            one.backwards -= 1
            one.over = max(one.over, stop)

    def _begin_language(self, program: int) -> None:
        for member in self.crews[program]:
            place = self.at[member]
            action = self.graph.orders[member][place]
            stop = self.stops[member][place] = self._occupy(member, action, self.graph.seconds[member][place])
            self.at[member] += 1
            for way in self.graph.ways[member][place]:
                heapq.heappush(self.events, stop + way)
            if takes_tokens(action) or gives_gradients(action):
                count = (self.used if action.kind == Kind.FORWARD else self.gradients)[action.microbatch]
                count[0] -= 1
                count[1] = max(count[1], stop)
                if action.kind != Kind.FORWARD:
                    for way in self.gradient_ways:
                        heapq.heappush(self.events, count[1] + way)

    def _occupy(self, program: int, action: Action, seconds: float) -> float:
        self.lists[program].append(action)
        stop = self.free[program] = self.now + seconds
        heapq.heappush(self.events, stop)
        return stop

    def _language_ready(self, program: int) -> bool:
        """Whether the program and all that work with it could begin their next computation of the language model."""
        for member in self.crews[program]:
            if self.free[member] > self.now:
                return False
            place = self.at[member]
            if source := self.graph.sources[member][place]:
                if self.stops[source[0]][source[1]] + source[2] > self.now:
                    return False
            elif takes_tokens(action := self.graph.orders[member][place]) and self._encoded(action.microbatch) > self.now:
                return False
        return True

    def _encoded(self, microbatch: int) -> float:
        """When the media tokens of a microbatch are there; never, as far as is known, while a part of them waits."""
        when = 0.0
        for encoder, dealt in zip(self.encoders, self.passes, strict=True):
            number = microbatch // encoder.per_pass
            if number >= len(dealt) or dealt[number].forwards:
                return inf
            when = max(when, dealt[number].encoded)
        return when

    def _language_start(self, program: int) -> float:
        """When the program's next computation of the language model could begin at the earliest, as things stand."""
        place = self.at[program]
        start = max(self.now, *(self.free[member] for member in self.crews[program]))
        if source := self.graph.sources[program][place]:
            giver, awaited, way = source
            stop = self.stops[giver][awaited]
            if stop == inf:
                stop = self._language_start(giver) + self.sums[giver][awaited + 1] - self.sums[giver][self.at[giver]]
            return max(start, stop + way)
        action = self.graph.orders[program][place]
        if not takes_tokens(action):
            return start
        encoded = self._encoded(action.microbatch)
        return max(start, encoded) if encoded < inf else start + max(its.forward for its in self.encoders)

    def _deal_next(self, program: int, latest: float) -> None:
        """Deals the pass that is needed first, if this program may take part and it has to begin before `latest`."""
        best, first = -1, latest
        for number, encoder in enumerate(self.encoders):
            dealt = len(self.passes[number])
            if encoder.ranks[program] and dealt < min(encoder.passes, self.over[number] + encoder.ahead):
                start = self.due[number][dealt] - encoder.forward
                if start < first or (best < 0 and latest == inf):
                    best, first = number, start
        if best < 0:
            return
        encoder, number = self.encoders[best], len(self.passes[best])
        shares = self._shares(encoder, self.passes[best])
        last = min((number + 1) * encoder.per_pass, self.work.microbatches) - 1
        takers = [taker for taker, share in enumerate(shares) if share]
        one = _Pass(best, number, shares, last, len(takers), len(takers) if encoder.trained else 0)
        self.passes[best].append(one)
        for taker in takers:
            self.forwards[taker].append(one)
            self.owed[taker][0] += shares[taker] * encoder.forward
            if encoder.trained:
                self.backwards[taker][best].append(one)
                self.owed[taker][1] += shares[taker] * encoder.backward

    def _shares(self, encoder: Encoder, dealt: Sequence[_Pass]) -> tuple[float, ...]:
        """Program to its share of the next pass of an encoder."""
        programs = [program for program, ranks in enumerate(encoder.ranks) if ranks]
        ranks = [encoder.ranks[program] for program in programs]
        idle = [program for program in programs if not any(one.shares[program] for one in dealt)]
        if encoder.forward <= 0 or (idle and len(dealt) == encoder.passes - 1):
            return tuple(float(count > 0) for count in encoder.ranks)
        starts = [max(self.now, self.free[program]) + self.owed[program][0] for program in programs]
        room = [self._room(program) / (encoder.forward + encoder.backward) for program in programs]
        gaps = [self._gap(program, start) / encoder.forward for program, start in zip(programs, starts, strict=True)]
        begins = [start / encoder.forward for start in starts]
        raised = _level([-its for its in room], ranks, [inf] * len(ranks), float(sum(ranks)))
        for most in (
            [min(pair) for pair in zip(room, gaps, strict=True)],
            room,
            [its + raised + _EPSILON for its in room],
        ):
            if found := _fill(begins, ranks, most):
                by_program = dict(zip(programs, found, strict=True))
                return tuple(by_program.get(program, 0.0) for program in range(len(encoder.ranks)))
        return tuple(float(count > 0) for count in encoder.ranks)

    def _room(self, program: int) -> float:
        """Seconds that a program has left until the aimed end, beside all that it has to do already."""
        begun = self.sums[program][self.at[program]]
        language = self.sums[program][-1] - begun
        left = self.aim.end + self.aim.allowance[program] - max(self.now, self.free[program])
        return left - language - sum(self.owed[program])

    def _gap(self, program: int, start: float) -> float:
        """Seconds between some time and the latest start of the language model's next computation."""
        place = self.at[program]
        return max(0.0, self.latest[program][place] - start) if place < len(self.latest[program]) else inf


def _latest(graph: LanguageGraph, encoders: Sequence[Encoder], aim: Aim) -> list[list[float]]:
    """Latest start of every computation of the language model, with the slack handed out bit by bit."""
    head, tail = max(its.forward for its in encoders), max(its.backward for its in encoders)
    stops = graph.stops(aim.end, tail)
    latest = graph.latest(stops)
    starts = graph.earliest(head)
    slack = max(
        0.0, min(late - early for row, other in zip(latest, starts, strict=True) for late, early in zip(row, other, strict=True))
    )
    first, last = aim.slack
    limits = []
    for row, seconds in zip(latest, graph.seconds, strict=True):
        used = [slack * (first + (last - first) * (place + 1) / len(row)) for place in range(len(row))]
        limits.append([start + its - slack + part for start, its, part in zip(row, seconds, used, strict=True)])
    return graph.latest(limits)


def _due(graph: LanguageGraph, encoders: Sequence[Encoder], latest: Table, microbatches: int) -> list[list[float]]:
    """Encoder → pass → latest end of its forward."""
    needed = [inf] * microbatches
    for action, places in graph.places.items():
        if takes_tokens(action):
            needed[action.microbatch] = min(latest[program][place] for program, place in places)
    return [[needed[number * its.per_pass] - max(its.tokens) for number in range(its.passes)] for its in encoders]


def _fill(begins: Sequence[float], ranks: Sequence[int], most: Sequence[float]) -> list[float] | None:
    """Shares of at most `most` with which the pass is over soonest where programs are free from `begins` on; None if they do not
    suffice. All in units of an evenly shared pass."""
    limits = [its if its >= LEAST_SHARE else 0.0 for its in most]
    total = sum(ranks)
    while sum(count * limit for count, limit in zip(ranks, limits, strict=True)) >= total:
        level = _level(begins, ranks, limits, float(total))
        shares = [min(max(0.0, level - begin), limit) for begin, limit in zip(begins, limits, strict=True)]
        small = [(share, number) for number, share in enumerate(shares) if 0 < share < LEAST_SHARE]
        if not small:
            scale = total / sum(count * share for count, share in zip(ranks, shares, strict=True))
            return [share * scale for share in shares]
        limits[min(small)[1]] = 0.0
    return None


def _level(begins: Sequence[float], ranks: Sequence[int], limits: Sequence[float], total: float) -> float:
    """How high water stands that is poured into vessels: each has a floor, a width and a depth, and `total` is what goes in."""
    turns = sorted(
        [(begin, count) for begin, count, limit in zip(begins, ranks, limits, strict=True) if limit > 0]
        + [(begin + limit, -count) for begin, count, limit in zip(begins, ranks, limits, strict=True) if 0 < limit < inf]
    )
    level, width, poured = turns[0][0], 0, 0.0
    for turn, change in turns:
        if poured + width * (turn - level) >= total:
            break
        poured += width * (turn - level)
        level = turn
        width += change
    return level + (total - poured) / width if width > 0 else level
