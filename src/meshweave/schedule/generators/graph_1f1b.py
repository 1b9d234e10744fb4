"""Encoders as further stages of one pipeline, in parallel branches that join where the language model begins."""

from meshweave.config import LANGUAGE
from meshweave.schedule.actions import Action, Kind
from meshweave.schedule.generators.language import language_order
from meshweave.schedule.work import StepWork


def graph_1f1b(work: StepWork, pipeline: int) -> list[list[list[Action]]]:
    """Program to its queues, one for each module it holds, those nearest the loss first; `lower` merges them in time.

    Every encoder stage runs as far ahead as the path from it to the loss and back is long: what the language model's first stage
    takes in before it gives the pass's gradient back, and one pass more for each encoder stage on the way there.

    Args:
        pipeline: the language model's `pp`.
    """
    everything = range(work.microbatches)
    queues = [[language_order(work, program, pipeline, everything)] for program in range(len(work.programs))]
    first = queues[work.holders(LANGUAGE, 0)[0]][0]
    for name in work.encoders:
        taken = _taken_in(work, name, first)
        for program, its in enumerate(work.programs):
            for stage in its.stages.get(name, ()):
                queues[program].append(_encoder_order(work, name, stage, taken))
    return [[queue for queue in its if queue] for its in queues]


def run_ahead(work: StepWork, pipeline: int) -> dict[str, int]:
    """Encoder without a backward to the passes it may be ahead of the language model's first stage, for `lower`.

    As many as there are stages: no more than a trained encoder would be, whatever the number of microbatches.
    """
    return {name: module.stages + pipeline for name, module in work.modules.items() if name != LANGUAGE and not module.backward}


def _taken_in(work: StepWork, encoder: str, first_stage: list[Action]) -> list[int]:
    """Pass to the passes that the language model's first stage needs before it gives back the whole gradient of this one."""
    module, furthest = work.modules[encoder], 0
    taken: list[int] = []
    for action in first_stage:
        if action.stage:
            continue
        if action.kind == Kind.FORWARD:
            furthest = max(furthest, action.microbatch // module.per_pass + 1)
        elif action.kind != Kind.WEIGHT_GRADIENT and action.microbatch == module.served(len(taken), work.microbatches)[-1]:
            taken.append(furthest)
    return taken


def _encoder_order(work: StepWork, encoder: str, stage: int, taken: list[int]) -> list[Action]:
    module = work.modules[encoder]
    passes = module.passes(work.microbatches)
    forwards = [Action(Kind.FORWARD, encoder, stage, number) for number in range(passes)]
    if not module.backward:
        return forwards
    order: list[Action] = []
    done = 0
    for number in range(passes):
        upto = min(passes, taken[number] + module.stages - stage)
        order += forwards[done:upto]
        done = max(done, upto)
        order.append(Action(Kind.BACKWARD, encoder, stage, number))
    return order
