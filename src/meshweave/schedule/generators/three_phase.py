"""Encoder forward for a macro-batch, the language model's pipeline over detached embeddings, encoder backward; macro-batch by
macro-batch."""

from meshweave.schedule.actions import Action, Kind
from meshweave.schedule.generators.language import language_order
from meshweave.schedule.work import StepWork


def three_phase(work: StepWork, pipeline: int, macro_batch: int) -> list[list[Action]]:
    """Program to its order of computations.

    With one stage of the language model and one macro-batch this is the plain step. An encoder that is a pipeline itself takes
    the macro-batch microbatch by microbatch.

    Args:
        pipeline: the language model's `pp`.
        macro_batch: language-model microbatches of each round; encoders' passes must not straddle rounds.
    """
    orders: list[list[Action]] = [[] for _ in work.programs]
    for first in range(0, work.microbatches, macro_batch):
        microbatches = range(first, min(first + macro_batch, work.microbatches))
        for program, order in enumerate(orders):
            order += _encoders(work, program, microbatches, Kind.FORWARD)
            order += language_order(work, program, pipeline, microbatches)
            order += _encoders(work, program, microbatches, Kind.BACKWARD)
    return orders


def _encoders(work: StepWork, program: int, microbatches: range, kind: Kind) -> list[Action]:
    found = []
    for name in work.encoders:
        module = work.modules[name]
        if kind == Kind.BACKWARD and not module.backward:
            continue
        passes = range(microbatches.start // module.per_pass, -(-microbatches.stop // module.per_pass))
        found += [Action(kind, name, stage, number) for number in passes for stage in work.programs[program].stages.get(name, ())]
    return found
