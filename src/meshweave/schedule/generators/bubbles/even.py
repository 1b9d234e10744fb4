"""Encoder passes shared evenly: the language model goes first, encoders take what time it leaves."""

from collections.abc import Iterator

from meshweave.config import LANGUAGE
from meshweave.schedule.actions import Action, Kind
from meshweave.schedule.bound import LanguageGraph, Table, language_graph
from meshweave.schedule.durations import Durations
from meshweave.schedule.generators.bubbles.run_ahead import run_ahead_in, taken_in, takes_tokens
from meshweave.schedule.schedule import kinds_of
from meshweave.schedule.work import StepWork

Queues = list[list[list[Action]]]
"""Program to its queues, for `lower`."""


def even_queues(work: StepWork, pipeline: int, durations: Durations) -> Iterator[Queues]:
    """Even shares: the language model first, encoders where it waits, as far ahead as they must or as they may."""
    graph = language_graph(work, pipeline, durations)
    least = {name: taken_in(work, graph, name) for name in work.encoders}
    most = {name: run_ahead_in(work, graph, durations, name) - work.last(name) for name in work.encoders}
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
    used = {
        action.microbatch: start + seconds
        for action, start, seconds in zip(graph.orders[first], starts[first], graph.seconds[first], strict=True)
        if takes_tokens(action)
    }
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
