"""Does the traffic report count what every rank really needs, token by token?"""

import random
import time
from itertools import accumulate

import pytest

from meshweave.batch.plan import MediaMeta, SampleMeta, plan_step
from meshweave.layout import Layout, Placement
from meshweave.report.traffic import boundary_traffic

# (vision layout, its ranks, language layout, its ranks, node size)
CASES = {
    "colocated": (Layout(dp=4), range(4), Layout(dp=2, tp=2), range(4), None),
    "homogeneous": (Layout(dp=2, tp=2), range(4), Layout(dp=2, tp=2), range(4), None),
    "fan-in": (Layout(tp=4), range(4), Layout(dp=4), range(4), None),
    "three lanes to two": (Layout(dp=3), range(3), Layout(dp=2), range(3, 5), None),
    "disjoint": (Layout(dp=2), (0, 1), Layout(dp=3, tp=2), range(2, 8), 4),
    "overlapping": (Layout(dp=5), range(5), Layout(dp=2, cp=2, tp=2), range(3, 11), 3),
    "replicas": (Layout(dp=2, replicas=3), range(6), Layout(dp=3, tp=2), range(6), 2),
    "last stage to first": (Layout(pp=2, dp=2), range(4), Layout(pp=2, dp=2, tp=2), range(8), None),
}


def _samples(count, seed=0):
    """Ragged samples: none, one, a few or many media items."""
    draw = random.Random(seed)
    samples = []
    for number in range(count):
        sizes = [draw.randint(1, 9) for _ in range((0, 1, 3, 7)[number % 4])]
        media = tuple(MediaMeta("vision", size, cost=float(size)) for size in sizes)
        samples.append(SampleMeta(number, sum(sizes) + draw.randint(2, 20), media))
    return samples


def _placed(case):
    vision, vision_ranks, language, language_ranks, node_size = CASES[case]
    placed = {
        "vision": Placement(vision, tuple(vision_ranks)),
        "language": Placement(language, tuple(language_ranks)),
    }
    return placed, node_size


def _plan(placed, count=16, microbatches=2, seed=0):
    return plan_step(
        _samples(count, seed),
        microbatches=microbatches,
        language_lanes=placed["language"].layout.dp,
        encoder_lanes={"vision": placed["vision"].layout.dp},
    )


def _tokens(part, lanes, placement, stage):
    """Rank of one pipeline stage to the set of media tokens that its lane has, for one microbatch."""
    ends = list(accumulate(part.item_tokens("vision")))
    token_set = [set(range(end - size, end)) for end, size in zip(ends, part.item_tokens("vision"), strict=True)]
    found = {}
    for rank in placement.ranks:
        if placement.coordinate(rank)["pp"] != stage:
            continue
        items = lanes[placement.lane(rank)]
        found[rank] = set().union(*(token_set[item] for item in items))
    return found


def _expected(plan, placed):
    """(forward, backward): per rank, tokens needed and not held, and tokens needed and held."""
    there, back = ({}, 0), ({}, 0)
    for part in plan.microbatches:
        last = placed["vision"].layout.pp - 1
        held = _tokens(part, part.encoder_lanes["vision"], placed["vision"], last)
        needed = _tokens(part, part.language_items("vision"), placed["language"], 0)
        for wanted, given, which in ((needed, held, 0), (held, needed, 1)):
            received, copied = (there, back)[which]
            for rank, tokens in wanted.items():
                received[rank] = received.get(rank, 0) + len(tokens - given.get(rank, set()))
                copied += len(tokens & given.get(rank, set()))
            if which:
                back = received, copied
            else:
                there = received, copied
    return there, back


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_rank_receives_what_it_needs_and_does_not_hold_and_not_a_token_more(case, seed):
    placed, node_size = _placed(case)
    plan = _plan(placed, seed=seed)
    (traffic,) = boundary_traffic(plan, placed, {"vision": 128}, node_size=node_size)
    for direction, (received, copied) in zip((traffic.forward, traffic.backward), _expected(plan, placed), strict=True):
        assert direction.received == {rank: tokens for rank, tokens in received.items() if tokens}
        assert direction.moved == direction.lower_bound == sum(received.values())
        assert direction.moved == sum(direction.sent.values())
        assert direction.copied == copied
        assert 0 <= direction.between_nodes <= direction.moved
    assert traffic.token_bytes == 128
    assert traffic.samples == 16
    assert traffic.items == sum(len(part.items["vision"]) for part in plan.microbatches) > 0


def test_without_a_node_size_nothing_counts_as_between_nodes():
    placed, _ = _placed("disjoint")
    (traffic,) = boundary_traffic(_plan(placed), placed, {"vision": 4})
    assert traffic.forward.between_nodes == 0 < traffic.forward.moved


def test_between_nodes_a_token_crosses_once_for_all_the_replicas_there():
    placed = {"vision": Placement(Layout(), (0,)), "language": Placement(Layout(tp=4), (4, 5, 6, 7))}
    (traffic,) = boundary_traffic(_plan(placed), placed, {"vision": 4}, node_size=4)
    assert traffic.forward.between_nodes == traffic.tokens
    assert traffic.forward.moved == 4 * traffic.tokens


def test_a_step_of_text_alone_moves_nothing():
    placed, _ = _placed("colocated")
    samples = [SampleMeta(number, 5) for number in range(4)]
    plan = plan_step(samples, microbatches=1, language_lanes=2, encoder_lanes={"vision": 4})
    (traffic,) = boundary_traffic(plan, placed, {"vision": 4})
    assert (traffic.items, traffic.tokens, traffic.forward.moved, traffic.backward.copied) == (0, 0, 0, 0)
    assert traffic.forward.sent == traffic.forward.received == {}


def test_every_encoder_has_its_own_boundary():
    placed = {
        "vision": Placement(Layout(dp=2), (0, 1)),
        "audio": Placement(Layout(), (2,)),
        "language": Placement(Layout(dp=2), (0, 1)),
    }
    samples = [
        SampleMeta(0, 9, (MediaMeta("audio", 5, 1.0), MediaMeta("vision", 2, 1.0))),
        SampleMeta(1, 3, (MediaMeta("vision", 2, 1.0),)),
    ]
    lanes = {"vision": 2, "audio": 1}
    plan = plan_step(samples, microbatches=1, language_lanes=2, encoder_lanes=lanes)
    vision, audio = boundary_traffic(plan, placed, {"vision": 4, "audio": 4})
    assert (vision.encoder, vision.tokens, audio.encoder, audio.tokens) == ("vision", 4, "audio", 5)
    assert (audio.forward.moved, audio.forward.sent) == (5, {2: 5})


def test_4096_ranks_are_counted_quickly():
    placed = {
        "vision": Placement(Layout(dp=4096), tuple(range(4096))),
        "language": Placement(Layout(dp=512, tp=8), tuple(range(4096))),
    }
    plan = _plan(placed, count=4096, microbatches=1)
    start = time.perf_counter()
    (traffic,) = boundary_traffic(plan, placed, {"vision": 4}, node_size=8)
    assert time.perf_counter() - start < 5.0
    assert traffic.forward.moved == traffic.forward.lower_bound > 0
