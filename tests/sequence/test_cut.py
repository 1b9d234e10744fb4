"""The cut: equal counts of positions, even attention cost, few intervals."""

import time
from collections.abc import Sequence
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.lanes import MASKS, packed, sequences, zigzag_positions

from meshweave.errors import LayoutError
from meshweave.sequence import LaneSequence, Mask, cut_sequence, multiple_of, sight
from meshweave.sequence import cut as cut_module
from meshweave.sequence.tiles import rows_of

LONG = 1 << 17
GEMMA = (*[Mask(1024, True)] * 5, Mask(None, True))


def heavy_tailed(length: int, seed: int) -> list[int]:
    return [int(300 * drawn) + 20 for drawn in np.random.default_rng(seed).pareto(1.1, length // 64)]


def imbalance(sequence: LaneSequence, cut: Sequence[np.ndarray], masks: Sequence[Mask]) -> float:
    """Keys seen by the dearest rank's queries over the mean."""
    seen = sum(view.stop - view.first for view in (sight(sequence, mask) for mask in masks))
    load = [seen[rows_of(held)].sum() for held in cut]
    return float(max(load) * len(cut) / sum(load))


@given(st.data(), st.integers(1, 5), st.integers(1, 3), st.lists(st.sampled_from(MASKS), min_size=1, max_size=3))
def test_every_position_is_held_once_and_every_rank_holds_as_many(
    data: st.DataObject, cp: int, tp: int, masks: list[Mask]
) -> None:
    sequence = data.draw(sequences(multiple_of(cp, tp)))
    with patch.object(cut_module, "SMALLEST", 1):
        cut = cut_sequence(sequence, cp, masks)
    positions = [rows_of(held) for held in cut]
    assert len(cut) == cp
    assert all(held.dtype == np.int64 and (np.diff(its) > 0).all() for held, its in zip(cut, positions, strict=True))
    assert {len(its) for its in positions} == {sequence.length // cp}
    assert sequence.length // cp % tp == 0
    assert np.array_equal(np.sort(np.concatenate(positions)), np.arange(sequence.length))


@pytest.mark.parametrize(("length", "cp"), [(8, 4), (24, 3), (LONG, 2), (LONG, 8), (LONG, 64)])
def test_one_causal_document_is_dealt_in_a_zigzag(length: int, cp: int) -> None:
    cut = cut_sequence(packed(length, [length]), cp, [Mask()])
    for held, expected in zip(cut, zigzag_positions(length, cp), strict=True):
        assert np.array_equal(rows_of(held), rows_of(expected))


def test_many_short_documents_stay_where_they_are() -> None:
    assert [held.tolist() for held in cut_sequence(packed(LONG, [128] * 1024), 4, [Mask()])] == [
        [[rank * LONG // 4, (rank + 1) * LONG // 4]] for rank in range(4)
    ]


@pytest.mark.parametrize("masks", [(Mask(),), (Mask(1024),), GEMMA], ids=["causal", "window", "gemma"])
@pytest.mark.parametrize(
    ("lengths", "bound"),
    [
        ([LONG], 1.01),
        ([128] * 1024, 1.01),
        (heavy_tailed(LONG, 0), 1.02),
        (heavy_tailed(LONG, 1), 1.02),
        (sorted(heavy_tailed(LONG, 2)), 1.02),
        ([LONG // 2, *[200] * 400], 1.01),
        ([50_000, 3_000, 70_000, 500, 600], 1.02),
        ([LONG - 50_001], 1.02),
    ],
    ids=["one", "short", "heavy tail 0", "heavy tail 1", "ascending", "long and short", "two long", "padding"],
)
def test_attention_cost_is_even_at_128k_positions(lengths: list[int], bound: float, masks: tuple[Mask, ...]) -> None:
    sequence = packed(LONG, lengths, span=256, gap=100)
    for cp in (2, 6, 16):
        padded = LaneSequence(-(-LONG // cp) * cp, sequence.documents)
        assert imbalance(padded, cut_sequence(padded, cp, masks), masks) <= bound


@given(st.integers(0, 1 << 30), st.integers(2, 8), st.sampled_from([(Mask(),), (Mask(256, True),), GEMMA]))
def test_attention_cost_is_nearly_even_for_any_heavy_tail(seed: int, cp: int, masks: tuple[Mask, ...]) -> None:
    length = 4096 * cp
    sequence = packed(length, np.random.default_rng(seed).permutation(heavy_tailed(length, seed)).tolist(), span=64, gap=9)
    assert imbalance(sequence, cut_sequence(sequence, cp, masks), masks) <= 1.10


@pytest.mark.parametrize("lengths", [[LONG], [131] * 1001])
def test_cutting_128k_positions_takes_no_loop_over_them(lengths: list[int]) -> None:
    sequence = packed(LONG, lengths, span=64, gap=60)
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        cut_sequence(sequence, 8, GEMMA)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.03  # measured: 0.004


def test_a_length_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(LayoutError, match="7 positions cannot be cut for cp=2"):
        cut_sequence(packed(7, [7]), 2, [Mask()])
