"""Split backward: the gradient of the weights, for which nobody waits, fills what would be a bubble."""

from meshweave.schedule.actions import Action, Kind


def zero_bubble(module: str, stage: int, stages: int, microbatches: int) -> list[Action]:
    """Order of one stage under ZB-H1 (arXiv 2401.10241): the memory of 1F1B, a third of its bubble if the halves are equal.

    Each stage puts its weight gradients off by as many microbatches as there are stages before it.
    """
    warm_up = min(stages - stage - 1, microbatches)
    order = [Action(Kind.FORWARD, module, stage, number) for number in range(warm_up)]
    for number in range(microbatches):
        if warm_up + number < microbatches:
            order.append(Action(Kind.FORWARD, module, stage, warm_up + number))
        order.append(Action(Kind.INPUT_GRADIENT, module, stage, number))
        if number >= stage:
            order.append(Action(Kind.WEIGHT_GRADIENT, module, stage, number - stage))
    first_left = max(0, microbatches - stage)
    return order + [Action(Kind.WEIGHT_GRADIENT, module, stage, number) for number in range(first_left, microbatches)]
