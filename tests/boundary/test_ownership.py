"""Ownership: every media token in exactly one share, in the row order that was asked for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.lanes import zigzag_positions

from meshweave.boundary import (
    Ownership,
    Share,
    lane_ownership,
    slice_ownership,
    split_positions,
)
from meshweave.errors import LayoutError


def tokens_of(share: Share | None) -> list[int]:
    """The tokens of a share, row by row."""
    return [] if share is None else [token for a, b in share.intervals.tolist() for token in range(a, b)]


def test_lanes_hold_their_items_in_the_given_order_on_every_replica() -> None:
    ownership = lane_ownership([2, 3, 0, 1, 4], [[3, 0], [], [4, 1, 2]], [[0, 1], [2, 3], [4, 5]])
    assert ownership.total == 10
    for rank, tokens in enumerate([[5, 0, 1]] * 2 + [[]] * 2 + [[6, 7, 8, 9, 2, 3, 4]] * 2):
        assert tokens_of(ownership.share_of(rank)) == tokens
        assert ownership.rows(rank) == len(tokens)
    assert ownership.share_of(6) is None
    assert ownership.rows(6) == 0


def test_the_row_of_a_token_is_its_place_in_the_local_tensor() -> None:
    ownership = lane_ownership([2, 3, 0, 1, 4], [[3, 0], [], [4, 1, 2]], [[0, 1], [2, 3], [4, 5]])
    assert ownership.row_of(np.arange(10)).tolist() == [1, 2, 4, 5, 6, 0, 0, 1, 2, 3]


def test_adjacent_intervals_merge_and_empty_ones_vanish_without_reordering_rows() -> None:
    ownership = Ownership(9, (Share((0,), [(4, 6), (6, 6), (6, 7), (0, 4)]), Share((1,), [(7, 7), (7, 9)])))
    assert ownership.shares == (Share((0,), [(4, 7), (0, 4)]), Share((1,), [(7, 9)]))


def test_text_form_names_ranks_and_intervals() -> None:
    ownership = Ownership(9, (Share((0, 1), [(4, 9), (0, 2)]), Share((2,)), Share((3,), [(2, 4)])))
    assert str(ownership) == "r0,r1: [4,9) [0,2) | r2: - | r3: [2,4)"


@pytest.mark.parametrize(
    ("total", "shares", "message"),
    [
        (6, [Share((0,), [(0, 2)]), Share((1,), [(4, 6)])], r"tokens \[2,4\) of 6 are in no share"),
        (6, [Share((0,), [(0, 5)])], r"tokens \[5,6\) of 6 are in no share"),
        (6, [Share((0,), [(1, 6)])], r"tokens \[0,1\) of 6 are in no share"),
        (6, [], r"tokens \[0,6\) of 6 are in no share"),
        (6, [Share((0,), [(0, 4)]), Share((1,), [(3, 6)])], r"\[3,4\) are held twice, by \(r0: .*\(r1: "),
        (6, [Share((0,), [(0, 6)]), Share((1,), [(2, 3)])], r"\[2,3\) are held twice"),
        (6, [Share((0,), [(0, 8)])], "holds media token 7, but there are only 6"),
        (6, [Share((0,), [(-1, 6)])], "holds media token -1"),
        (6, [Share((0,), [(4, 2), (0, 6)])], r"interval \[4, 2\] of \(r0: .* stops before it starts"),
        (6, [Share((), [(0, 6)])], "6 media tokens has no ranks"),
        (6, [Share((0, 1), [(0, 6)]), Share((1, 2))], r"rank 1 is named twice, in \(r0,r1: .* and \(r1,r2"),
        (6, [Share((1, 1), [(0, 6)])], "rank 1 is named twice"),
        (6, [Share((-3,), [(0, 6)])], "rank -3 of an ownership is negative"),
    ],
)
def test_an_inconsistent_ownership_is_refused(total: int, shares: list[Share], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        Ownership(total, tuple(shares))


@pytest.mark.parametrize(
    ("lanes", "message"),
    [
        ([[0, 1], [3]], "names media item 3, but there are 3 items"),
        ([[0, 1], [1]], "held twice"),
        ([[0], [1]], "in no share"),
        ([[0, 1, 2]], "1 lanes of media items, but ranks for 2 lanes"),
    ],
)
def test_lanes_that_do_not_deal_out_every_item_once_are_refused(lanes: list[list[int]], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        lane_ownership([2, 2, 2], lanes, [[0], [1]])


def test_splitting_a_zigzag_part_cuts_its_concatenation() -> None:
    assert [part.tolist() for part in split_positions([(0, 4), (20, 24)], 2)] == [[[0, 4]], [[20, 24]]]
    assert [part.tolist() for part in split_positions([(0, 3), (20, 23)], 2)] == [[[0, 3]], [[20, 23]]]
    assert [part.tolist() for part in split_positions([(0, 2), (20, 24)], 2)] == [
        [[0, 2], [20, 21]],
        [[21, 24]],
    ]


def test_a_sequence_that_does_not_divide_is_refused() -> None:
    with pytest.raises(LayoutError, match="10 positions cannot be cut into 4 equal parts: pad it"):
        split_positions([(0, 10)], 4)


@given(
    chunk=st.integers(0, 3),
    context=st.integers(1, 4),
    tensor=st.integers(1, 3),
    zigzag=st.booleans(),
    data=st.data(),
)
def test_a_slice_holds_exactly_the_media_tokens_at_its_positions(
    chunk: int, context: int, tensor: int, zigzag: bool, data: st.DataObject
) -> None:
    """Two lanes of random media masks, cut by cp, then sequence parallel, against token-wise lists."""
    length = 2 * context * tensor * chunk
    token = 0
    lane_runs, lane_slices, expected = [], [], []
    for lane in range(2):
        media = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
        numbers = {}  # position -> token
        for position in range(length):
            if media[position]:
                numbers[position] = token
                token += 1
        lane_runs.append([(position, 1) for position in numbers])
        slices = []
        for part in range(context):
            if zigzag:
                size = length // (2 * context)
                chunks = [part, 2 * context - 1 - part]
                local = [chunk * size + i for chunk in chunks for i in range(size)]
                cut = zigzag_positions(length, context)[part]
            else:
                size = length // context
                local = list(range(part * size, part * size + size))
                cut = split_positions([(0, length)], context)[part]
            for shard, intervals in enumerate(split_positions(cut, tensor)):
                rank = (lane * context + part) * tensor + shard
                slices.append(Share((rank,), intervals))
                size = len(local) // tensor
                positions = local[shard * size : shard * size + size]
                expected.append([numbers[position] for position in positions if position in numbers])
        lane_slices.append(slices)
    ownership = slice_ownership(lane_runs, lane_slices)
    assert [tokens_of(ownership.share_of(rank)) for rank in range(len(expected))] == expected


def test_runs_longer_than_a_slice_are_cut_and_empty_ones_ignored() -> None:
    slices = [Share((0, 1), [(0, 4)]), Share((2, 3), [(4, 8)])]
    ownership = slice_ownership([[(1, 5), (6, 0), (7, 1)]], [slices])
    assert str(ownership) == "r0,r1: [0,3) | r2,r3: [3,6)"


def test_rows_of_a_slice_follow_the_order_of_its_intervals() -> None:
    ownership = slice_ownership([[(0, 2), (4, 2)]], [[Share((0,), [(4, 8), (0, 4)])]])
    assert str(ownership) == "r0: [2,4) [0,2)"


def test_a_media_token_that_no_slice_covers_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"tokens \[1,2\) of 2 are in no share"):
        slice_ownership([[(3, 2)]], [[Share((0,), [(0, 4)])]])
    with pytest.raises(LayoutError, match="media tokens for 1 lanes, but slices for 0 lanes"):
        slice_ownership([[(3, 2)]], [])
