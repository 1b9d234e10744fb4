"""Which aim leads to the shortest step? A bounded search over plays, the same on every machine."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import inf

from meshweave.schedule.bound import LanguageGraph, language_graph, lower_bound
from meshweave.schedule.durations import Durations
from meshweave.schedule.generators.bubbles.even import Queues
from meshweave.schedule.generators.bubbles.play import Aim, Encoder, Outcome, Play, encoder_of
from meshweave.schedule.schedule import Shares
from meshweave.schedule.work import StepWork

_GOOD_ENOUGH = 1.005
"""Of the lower bound: where the search stops."""

_COMPUTATIONS = 400_000
"""How many the search may place in all its tries together: it bounds its time."""

_MOST_TRIES = 250
_CORRECTIONS = 5

_SLACKS = ((0.0, 0.5), (0.0, 1.0), (0.0, 0.3), (0.0, 0.7), (1.0, 1.0), (0.0, 0.85))
_STRETCHES = (1.0, 1.02, 1.05, 1.1)
_PATIENCES = (1.0, 0.0, 0.5)


def search(work: StepWork, pipeline: int, durations: Durations) -> tuple[Queues, Shares]:
    """The best of a bounded number of tries: one setting after the other is varied, then the allowances follow the ends."""
    graph = language_graph(work, pipeline, durations)
    encoders = [encoder_of(work, graph, durations, name) for name in work.encoders]
    bound = lower_bound(work, pipeline, durations)
    tries = _Search(work, graph, encoders, bound)
    tries.attempt(Aim(bound, _SLACKS[0], _PATIENCES[0], (0.0,) * len(work.programs)))
    for _ in range(2):
        for slack in _SLACKS:
            tries.attempt(replace(tries.aim, slack=slack))
        for stretch in _STRETCHES:
            tries.attempt(replace(tries.aim, end=bound * stretch))
        for patience in _PATIENCES:
            tries.attempt(replace(tries.aim, patience=patience))
        tries.correct(tries.aim)
    for stretch, slack, patience in product(_STRETCHES, _SLACKS, _PATIENCES):
        tries.correct(Aim(bound * stretch, slack, patience, (0.0,) * len(work.programs)))
    return tries.best.queues, tries.best.shares


class _Search:
    """State: the best outcome yet, what it aimed at, and the tries that are left."""

    def __init__(self, work: StepWork, graph: LanguageGraph, encoders: Sequence[Encoder], bound: float) -> None:
        self.work, self.graph, self.encoders, self.bound = work, graph, encoders, bound
        size = sum(map(len, graph.orders)) + sum(2 * its.passes * sum(map(bool, its.ranks)) for its in encoders)
        self.left = max(1, min(_MOST_TRIES, _COMPUTATIONS // size))
        self.best = Outcome(inf, (), [], {})
        self.aim = Aim(bound, _SLACKS[0], _PATIENCES[0], ())

    @property
    def over(self) -> bool:
        return self.left <= 0 or self.best.end <= self.bound * _GOOD_ENOUGH

    def correct(self, aim: Aim) -> None:
        """Lets the allowances follow the ends."""
        for _ in range(_CORRECTIONS):
            if self.over:
                return
            aim = _corrected(aim, self.attempt(aim))

    def attempt(self, aim: Aim) -> Outcome:
        """What comes of an aim."""
        if self.over:
            return self.best
        self.left -= 1
        outcome = Play(self.work, self.graph, self.encoders, aim).run()
        if outcome.end < self.best.end:
            self.best, self.aim = outcome, aim
        return outcome


def _corrected(aim: Aim, outcome: Outcome) -> Aim:
    mean = sum(outcome.ends) / len(outcome.ends)
    return replace(aim, allowance=tuple(its + (mean - end) / 2 for its, end in zip(aim.allowance, outcome.ends, strict=True)))
