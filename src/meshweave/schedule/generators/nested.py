"""Colocated encoders inside the language model's pipeline: their passes fill its bubbles (the idea of Optimus, arXiv 2408.03505),
and no more of them are under way than the bubbles can hold, however many microbatches there are."""

from meshweave.schedule.durations import Durations
from meshweave.schedule.generators.bubbles.even import Queues, even_queues
from meshweave.schedule.generators.bubbles.search import search
from meshweave.schedule.lower import lower
from meshweave.schedule.schedule import Shares
from meshweave.schedule.simulate import simulate
from meshweave.schedule.work import StepWork


def nested(work: StepWork, pipeline: int, durations: Durations) -> tuple[Queues, Shares]:
    """Program to its queues, and the shares of the encoders' passes: both for `lower`.

    The language model keeps its own order. Encoder passes are dealt one after the other to the programs that have time for them,
    and every program takes whatever has to start soonest if the step is to end when it is meant to (`bubbles.play`). A search
    over that end and over each program's allowance keeps what `simulate` finds shortest, plain even shares included. Encoders
    that are pipelines, or whose lanes span programs, have to be shared evenly; with one of them, all are.

    No encoder holds the activations of more passes than `run_ahead` says, whatever the number of microbatches. Without a
    backward, it is at most that and `pipeline` more ahead of the language model where it runs.

    Args:
        pipeline: the language model's `pp`.
        durations: seconds of the actions; the order is valid under any others, but as good only under similar ones.

    Every encoder rank is one of the language model's.
    """
    candidates: list[tuple[Queues, Shares]] = [(queues, {}) for queues in even_queues(work, pipeline, durations)]
    if work.encoders and all(_may_be_dealt(work, name) for name in work.encoders):
        candidates.append(search(work, pipeline, durations))
    if len(candidates) == 1:
        return candidates[0]
    return min(candidates, key=lambda its: simulate(lower(work, its[0], durations, its[1]), durations).seconds)


def _may_be_dealt(work: StepWork, encoder: str) -> bool:
    apart = all(work.gangs[encoder, program] == (program,) for program in work.holders(encoder, 0))
    return work.modules[encoder].stages == 1 and apart
