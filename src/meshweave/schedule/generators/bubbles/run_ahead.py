"""How many passes of an encoder may be under way at once? As many as the pipeline needs and its bubbles can hold."""

from collections.abc import Sequence
from math import ceil

from meshweave.config import LANGUAGE
from meshweave.schedule.actions import Action, Kind
from meshweave.schedule.bound import LanguageGraph, gives_gradients, language_graph, pass_seconds
from meshweave.schedule.durations import Durations
from meshweave.schedule.work import StepWork


def run_ahead(work: StepWork, pipeline: int, durations: Durations, encoder: str) -> int:
    """Most passes of an encoder that have begun, and whose activations may still be held on some rank.

    As many as the language model's first stage takes in before it gives the first gradients back, and as many as the bubbles can
    hold: forwards in those before these gradients, or backwards in those after its last forward. Bubbles grow with the pipeline
    and not with the microbatches.
    """
    return run_ahead_in(work, language_graph(work, pipeline, durations), durations, encoder)


def run_ahead_in(work: StepWork, graph: LanguageGraph, durations: Durations, encoder: str) -> int:
    """As `run_ahead`, of a language model whose graph is at hand."""
    module = work.modules[encoder]
    programs = [program for program, its in enumerate(work.programs) if encoder in its.stages]
    ranks = [len(work.programs[program].ranks) for program in programs]
    fitting = 0.0
    for kind, idle in zip((Kind.FORWARD, Kind.BACKWARD), _idle(work, graph, programs), strict=True):
        seconds = pass_seconds(work, durations, encoder, kind) / module.stages
        mean = sum(count * its for count, its in zip(ranks, idle, strict=True)) / sum(ranks)
        fitting = max(fitting, mean / seconds if seconds else 0.0)
    passes = module.passes(work.microbatches)
    return taken_in(work, graph, encoder) + work.last(encoder) + ceil(min(fitting, passes))


def _idle(work: StepWork, graph: LanguageGraph, programs: Sequence[int]) -> tuple[list[float], list[float]]:
    """Seconds that programs idle before the first token gradients (or the last tokens' use), and after the last tokens' use."""
    starts = graph.earliest(0.0)
    end = max(row[-1] + its[-1] for row, its in zip(starts, graph.seconds, strict=True) if row)
    forwards = [place for action, places in graph.places.items() if takes_tokens(action) for place in places]
    backwards = [place for action, places in graph.places.items() if gives_gradients(action) for place in places]
    last = max(starts[program][place] for program, place in forwards)
    first = min((starts[program][place] + graph.seconds[program][place] for program, place in backwards), default=last)
    before, after = [], []
    for program in programs:
        spans = list(zip(starts[program], graph.seconds[program], strict=True))
        before.append(first - sum(max(0.0, min(first, start + length) - start) for start, length in spans))
        after.append(end - last - sum(max(0.0, start + length - max(last, start)) for start, length in spans))
    return before, after


def takes_tokens(action: Action) -> bool:
    """Whether it is the forward that media tokens are merged in."""
    return action.kind == Kind.FORWARD and action.stage == 0


def taken_in(work: StepWork, graph: LanguageGraph, encoder: str) -> int:
    """Passes that must have begun before the oldest of them can be over."""
    module, most, taken = work.modules[encoder], 1, 0
    order = graph.orders[work.holders(LANGUAGE, 0)[0]]
    for action in order if module.backward and work.modules[LANGUAGE].backward else ():
        if takes_tokens(action):
            taken = action.microbatch // module.per_pass + 1
        elif (
            gives_gradients(action)
            and action.microbatch == module.served(action.microbatch // module.per_pass, work.microbatches)[-1]
        ):
            most = max(most, taken - action.microbatch // module.per_pass)
    return most
