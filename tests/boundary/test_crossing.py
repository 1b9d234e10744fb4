"""Which media tokens reach which rank where sequences are cut? From metadata alone, up to thousands of ranks."""

import time

import numpy as np
import pytest

from meshweave.batch.plan import MediaMeta, MicrobatchPlan, SampleMeta, plan_step
from meshweave.boundary.crossing import plan_crossing
from meshweave.errors import DataError
from meshweave.layout import Layout, Placement
from meshweave.report.traffic import lower_bound
from meshweave.sequence import Mask
from meshweave.sequence.grid import LaneGrid, SequenceRule, lay_out


def sample(number: int, random: np.random.Generator, longest: int) -> SampleMeta:
    """Texts and media items in turn; every third item lies in two runs, as a video's frames do between timestamps."""
    media, at = [], int(random.integers(1, longest))
    for slot in range(int(random.integers(0, 5))):
        tokens = int(random.integers(2, longest))
        half = tokens // 2
        runs = ((at, half), (at + half + 3, tokens - half)) if slot % 3 == 2 else ((at, tokens),)
        media.append(MediaMeta("vision", tokens, cost=float(tokens), runs=runs))
        at += tokens + 3 * (slot % 3 == 2) + int(random.integers(1, longest))
    return SampleMeta(number, at, tuple(media))


def planned(language: Layout, encoders: int, samples: int, longest: int, window: int | None = None):
    random = np.random.default_rng(7)
    rule = SequenceRule(True, language.cp, language.tp, (Mask(window),))
    placements = {
        "vision": Placement(Layout(dp=encoders), tuple(range(encoders))),
        "language": Placement(language, tuple(range(language.size))),
    }
    metas = [sample(number, random, longest) for number in range(samples)]
    step = plan_step(metas, microbatches=1, language_lanes=language.dp, encoder_lanes={"vision": encoders})
    (plan,) = step.microbatches
    grids = [lay_out(lane, rule) for lane in plan.lanes]
    return plan, grids, placements, plan_crossing(plan, "vision", placements, grids)


def wanted(plan: MicrobatchPlan, grids: list[LaneGrid], language: Placement, rank: int) -> list[int]:
    """Numbers of the media tokens that a rank embeds, token by token: columns of its slice, in order."""
    coordinate = language.coordinate(rank)
    assert coordinate is not None
    lane, number = coordinate["dp"], 0
    at: dict[int, int] = {}
    for index, (samples, grid) in enumerate(zip(plan.lanes, grids, strict=True)):
        for its, (_, start, _) in zip(samples, grid.places, strict=True):
            for item in its.media:
                for position, tokens in item.runs:
                    if index == lane:
                        at |= {start + position + token: number + token for token in range(tokens)}
                    number += tokens
    grid = grids[lane]
    held = np.concatenate([np.arange(*interval) for interval in grid.parts[coordinate["cp"]]])
    own = np.array_split(held, grid.slices)[coordinate["tp"]]
    return [at[column] for column in own.tolist() if column in at]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("language", [Layout(dp=2, cp=2, tp=2), Layout(cp=3), Layout(dp=3, tp=4), Layout(cp=4, tp=2)])
def test_every_rank_gets_the_tokens_of_its_slice_in_the_order_of_its_columns(language: Layout, window: int | None) -> None:
    plan, grids, placements, crossing = planned(language, encoders=3, samples=11, longest=9, window=window)
    for rank in placements["language"].ranks:
        share = crossing.destination.share_of(rank)
        assert share is not None
        found = [token for start, stop in share.intervals.tolist() for token in range(start, stop)]
        assert found == wanted(plan, grids, placements["language"], rank)
    assert crossing.tokens_moved == lower_bound(crossing.source, crossing.destination)


def test_a_token_goes_to_one_rank_alone_up_to_4096_ranks() -> None:
    started = time.perf_counter()
    language = Layout(dp=64, cp=8, tp=8)
    plan, _, _, crossing = planned(language, encoders=4096, samples=512, longest=400)
    total = sum(plan.item_tokens("vision"))
    assert total > 100_000
    assert crossing.tokens_moved + crossing.copies.tokens == total
    assert crossing.tokens_moved == lower_bound(crossing.source, crossing.destination)
    assert crossing.transpose().tokens_moved == crossing.tokens_moved
    assert time.perf_counter() - started < 30, "seconds, not minutes, for a microbatch of 4,096 ranks"


def test_metadata_that_does_not_say_where_tokens_lie_is_refused_by_sample() -> None:
    meta = SampleMeta(3, 10, (MediaMeta("vision", 4, cost=1.0, runs=((1, 2),)),))
    plan = plan_step([meta], microbatches=1, language_lanes=1, encoder_lanes={"vision": 1}).microbatches[0]
    placements = {"vision": Placement(Layout(), (0,)), "language": Placement(Layout(tp=2), (0, 1))}
    with pytest.raises(DataError, match="sample 3, media item 0: its 4 tokens lie at"):
        plan_crossing(plan, "vision", placements, [lay_out(plan.lanes[0], SequenceRule(True, tp=2))])
