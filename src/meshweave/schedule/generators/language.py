"""The language model's own order, by the name that a run file gives it."""

from collections.abc import Sequence

from meshweave.config import LANGUAGE
from meshweave.schedule.actions import Action, Kind
from meshweave.schedule.generators.interleaved import interleaved
from meshweave.schedule.generators.one_f_one_b import one_f_one_b
from meshweave.schedule.generators.zero_bubble import zero_bubble
from meshweave.schedule.work import StepWork


def language_order(work: StepWork, program: int, pipeline: int, microbatches: range) -> list[Action]:
    """What a program does of the language model, for some consecutive microbatches; empty if it holds none of it.

    `pipeline` is the language model's `pp`. The order follows from the work: several stages a program are interleaved, a backward
    in halves is zero-bubble's.
    """
    stages: Sequence[int] = work.programs[program].stages.get(LANGUAGE, ())
    module = work.modules[LANGUAGE]
    if not stages:
        return []
    if len(stages) > 1:
        order = interleaved(LANGUAGE, stages[0], pipeline, len(stages), len(microbatches))
    elif module.split:
        order = zero_bubble(LANGUAGE, stages[0], module.stages, len(microbatches))
    else:
        order = one_f_one_b(LANGUAGE, stages[0], len(microbatches), ahead=module.stages - 1 - stages[0])
    kept = [action for action in order if module.backward or action.kind == Kind.FORWARD]
    return [action._replace(microbatch=action.microbatch + microbatches.start) for action in kept]
