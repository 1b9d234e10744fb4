"""A rank's part of a tensor, as boxes: the slices of a fused matrix are several, and an empty part is none."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from meshweave.checkpoint.pieces import Piece, runs_of


@given(st.lists(st.integers(0, 9), unique=True))
def test_runs_are_the_indices_in_their_order(index: list[int]) -> None:
    runs = runs_of(torch.tensor(index, dtype=torch.int64))
    assert [first + step for first, _, length in runs for step in range(length)] == index
    assert [start for _, start, _ in runs] == [sum(length for *_, length in runs[:number]) for number in range(len(runs))]
    # None could be longer.
    assert all(before[0] + before[2] != after[0] for before, after in pairwise(runs))


def test_slices_of_a_fused_matrix_are_boxes_of_their_own() -> None:
    whole = torch.arange(24).reshape(8, 3)
    rows = [2, 3, 6, 7]
    piece = Piece((8, 3), (runs_of(torch.tensor(rows)), ((0, 0, 3),)), whole[rows])
    assert sorted(piece.boxes) == [(2, 0), (6, 0)]
    assert torch.equal(piece.box((6, 0)), whole[6:8])


def test_scalars_are_one_box_and_empty_tensors_none() -> None:
    assert list(Piece.of(torch.tensor(3.0)).boxes) == [()]
    assert not Piece.of(torch.zeros(0, 3)).boxes
