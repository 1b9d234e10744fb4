"""The 1F1B order of a pipeline: as few forwards ahead as keep the last stage busy, then one forward, one backward."""

from meshweave.schedule.actions import Action, Kind


def one_f_one_b(module: str, stage: int, passes: int, ahead: int) -> list[Action]:
    """Order of one stage that runs `ahead` forwards before it alternates (PipeDream-flush, arXiv 2006.09503).

    `ahead` is at least the number of stages after this one: what keeps them all at work until the first backward comes back.
    """
    warm_up = min(ahead, passes)
    order = [Action(Kind.FORWARD, module, stage, number) for number in range(warm_up)]
    for number in range(passes):
        if warm_up + number < passes:
            order.append(Action(Kind.FORWARD, module, stage, warm_up + number))
        order.append(Action(Kind.BACKWARD, module, stage, number))
    return order
