"""Virtual stages: each rank holds several pieces of the language model, which shortens the bubble to its share of a piece."""

from meshweave.schedule.actions import Action, Kind


def interleaved(module: str, position: int, pipeline: int, pieces: int, microbatches: int) -> list[Action]:
    """Order of one pipeline position under interleaved 1F1B (arXiv 2104.04473, section 2.2).

    Microbatches go round in groups of `pipeline`; a last group that is not full is worked as if it were, less what is missing.

    Args:
        position: index `pp` of the ranks; they hold the virtual stages position, position + pipeline, …
        pipeline: the language model's `pp`.
        pieces: virtual stages of each rank.
    """
    rounds = -(-microbatches // pipeline)
    total = rounds * pipeline * pieces
    warm_up = min(total, 2 * (pipeline - position - 1) + (pieces - 1) * pipeline)

    def nth(kind: Kind, number: int) -> Action:
        group, within = divmod(number, pipeline * pieces)
        piece, place = divmod(within, pipeline)
        if kind == Kind.BACKWARD:
            piece = pieces - 1 - piece
        return Action(kind, module, piece * pipeline + position, group * pipeline + place)

    order = [nth(Kind.FORWARD, number) for number in range(warm_up)]
    for number in range(total):
        if warm_up + number < total:
            order.append(nth(Kind.FORWARD, warm_up + number))
        order.append(nth(Kind.BACKWARD, number))
    return [action for action in order if action.microbatch < microbatches]
