"""What a query sees is the rule, written out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.lanes import MASKS, sequences

from meshweave.errors import LayoutError
from meshweave.sequence import Document, LaneSequence, Mask, sight


def sees(sequence: LaneSequence, mask: Mask, query: int, key: int) -> bool:
    for each in sequence.documents:
        if each.start <= query < each.stop and each.start <= key < each.stop:
            together = any(start <= query < stop and start <= key < stop for start, stop in each.two_way)
            return (key <= query or (mask.two_way and together)) and (mask.window is None or query - key < mask.window)
    return False


@given(sequences(), st.sampled_from(MASKS))
def test_each_query_sees_the_keys_of_the_rule(sequence: LaneSequence, mask: Mask) -> None:
    view, position = sight(sequence, mask), np.arange(sequence.length)
    expected = [[sees(sequence, mask, query, key) for key in position] for query in position]
    assert np.array_equal(view.seen(position, position), np.array(expected, dtype=bool).reshape(len(position), len(position)))
    assert (np.diff(view.first) >= 0).all()
    assert (np.diff(view.stop) >= 0).all()


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([Document(0, 5), Document(4, 8)], r"a document at \[4,8\) must lie in \[5,10\)"),
        ([Document(0, 11)], r"\[0,11\) must lie in \[0,10\)"),
        ([Document(3, 2)], r"\[3,2\)"),
        ([Document(2, 8, ((3, 9),))], r"a two-way span at \[3,9\) must lie in \[2,8\)"),
        ([Document(2, 8, ((4, 6), (2, 4)))], r"a two-way span at \[2,4\) must lie in \[6,8\)"),
    ],
)
def test_documents_and_spans_must_ascend_inside_their_row(documents: list[Document], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        LaneSequence(10, tuple(documents))


def test_a_window_holds_the_query_itself() -> None:
    with pytest.raises(LayoutError, match="window of 0 keys"):
        Mask(0)
