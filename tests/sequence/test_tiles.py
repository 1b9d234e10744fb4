"""The tiles: together exactly what the queries see, from the keys that were lent, in few and large pieces."""

from collections import Counter
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.lanes import MASKS, packed, sequences

from meshweave.sequence import Document, Kind, LaneSequence, Mask, Part, Sight, cut_sequence, ring_part, sight
from meshweave.sequence import tiles as tiles_module
from meshweave.sequence.tiles import rows_of


def parts_of(view: Sight, held: list[np.ndarray]) -> list[Part]:
    return [ring_part(view, held, participant) for participant in range(len(held))]


def painted(view: Sight, held: list[np.ndarray], parts: list[Part]) -> np.ndarray:
    """[length, length]: how many tiles let a query see a key."""
    length = len(view.first)
    seen = np.zeros((length, length), dtype=int)
    for mine, part in zip(held, parts, strict=True):
        for its, visit in zip(held, part.visits, strict=True):
            keys = rows_of(its)[rows_of(visit.keys)]
            for tile in visit.tiles:
                query, key = rows_of(mine)[slice(*tile.query)], keys[slice(*tile.keys)]
                inside = {
                    Kind.FULL: np.ones((len(query), len(key)), dtype=bool),
                    Kind.CAUSAL: np.tril(np.ones((len(query), len(key)), dtype=bool)),
                    Kind.PARTIAL: view.seen(query, key),
                }[tile.kind]
                assert tile.kind is not Kind.CAUSAL or len(query) == len(key)
                seen[np.ix_(query, key)] += inside
    return seen


@given(st.data(), st.integers(1, 4), st.sampled_from(MASKS), st.sampled_from([1, 4, 16, 256]), st.booleans())
def test_tiles_are_exactly_what_queries_see_however_positions_are_held(
    data: st.DataObject, ring: int, mask: Mask, block: int, ragged: bool
) -> None:
    sequence = data.draw(sequences(ring))
    view = sight(sequence, mask)
    if ragged:  # any holding at all, also nothing
        owner = np.array(data.draw(st.lists(st.integers(0, ring - 1), min_size=sequence.length, max_size=sequence.length)))
        held = [np.stack([its, its + 1], axis=1) for its in (np.flatnonzero(owner == part) for part in range(ring))]
    else:
        held = list(cut_sequence(sequence, ring, [mask]))
    with patch.object(tiles_module, "BLOCK", block):
        parts = parts_of(view, held)
    position = np.arange(sequence.length)
    assert np.array_equal(painted(view, held, parts), view.seen(position, position).astype(int))


@given(st.data(), st.integers(2, 4), st.sampled_from(MASKS))
def test_what_one_lends_is_what_the_other_fetches_and_no_more_than_its_tiles_need(
    data: st.DataObject, ring: int, mask: Mask
) -> None:
    sequence = data.draw(sequences(ring))
    held = list(cut_sequence(sequence, ring, [mask]))
    with patch.object(tiles_module, "BLOCK", 8):
        parts = parts_of(sight(sequence, mask), held)
    for reader, part in enumerate(parts):
        for owner, visit in enumerate(part.visits):
            if reader == owner:
                assert len(part.lent[owner]) == 0
                continue
            assert np.array_equal(parts[owner].lent[reader], visit.keys)
            touched = {row for tile in visit.tiles for row in range(*tile.keys)}
            assert touched == set(range(visit.rows))


def test_a_zigzag_needs_one_large_tile_a_step_and_three_at_home() -> None:
    sequence = packed(8192, [8192])
    held = list(cut_sequence(sequence, 4, [Mask()]))
    for participant, part in enumerate(parts_of(sight(sequence, Mask()), held)):
        for owner, visit in enumerate(part.visits):
            kinds = [tile.kind for tile in visit.tiles]
            if owner == participant:
                # The last one's two chunks are neighbours.
                assert kinds == ([Kind.CAUSAL] if participant == 3 else [Kind.CAUSAL, Kind.FULL, Kind.CAUSAL])
            elif owner > participant:
                assert [(tile.query, tile.keys, tile.kind) for tile in visit.tiles] == [((1024, 2048), (0, 2048), Kind.FULL)]
            else:
                assert [(tile.query, tile.keys, tile.kind) for tile in visit.tiles] == [((0, 2048), (0, 1024), Kind.FULL)]


@pytest.mark.parametrize(
    ("lengths", "span", "mask", "tiles", "waste"),
    [
        ([65536], 0, Mask(), 3, 1.01),
        ([65536], 256, Mask(), 3, 1.01),
        ([128] * 512, 0, Mask(), 64, 4.1),
        ([2000] * 33, 0, Mask(), 12, 1.1),
        ([65536], 0, Mask(1024), 300, 1.2),
        ([65536], 256, Mask(None, True), 150, 1.1),
        ([65536], 256, Mask(1024, True), 350, 1.2),
    ],
)
def test_tiles_are_few_and_compute_little_that_is_not_seen(
    lengths: list[int], span: int, mask: Mask, tiles: int, waste: float
) -> None:
    sequence = packed(65536, lengths, span=span, gap=100)
    view = sight(sequence, mask)
    held = list(cut_sequence(sequence, 4, [mask]))
    part = ring_part(view, held, 1)
    assert max(len(visit.tiles) for visit in part.visits) <= tiles
    halves = Counter({Kind.FULL: 2, Kind.PARTIAL: 2, Kind.CAUSAL: 1})
    computed = sum(
        halves[tile.kind] * (tile.query[1] - tile.query[0]) * (tile.keys[1] - tile.keys[0]) / 2
        for visit in part.visits
        for tile in visit.tiles
    )
    rows = rows_of(held[1])
    assert computed <= waste * (view.stop - view.first)[rows].sum()


def test_documents_that_end_on_their_rank_fetch_nothing() -> None:
    sequence: LaneSequence = packed(4096, [128] * 32)
    part = ring_part(sight(sequence, Mask()), list(cut_sequence(sequence, 4, [Mask()])), 2)
    assert [visit.rows for visit in part.visits] == [0, 0, 1024, 0]


def test_a_window_fetches_no_more_than_itself() -> None:
    sequence = packed(65536, [65536])
    part = ring_part(sight(sequence, Mask(100)), list(cut_sequence(sequence, 4, [Mask(100)])), 2)
    assert [visit.rows for visit in part.visits] == [0, 99, 16384, 0]


def test_the_end_of_a_long_document_shares_no_masked_tile_with_short_ones() -> None:
    sequence = packed(20400, [20050, *[50] * 7])
    held = [np.array([[0, 20000]]), np.array([[20000, 20400]])]
    there, here = ring_part(sight(sequence, Mask()), held, 1).visits
    assert [(tile.query, tile.keys, tile.kind) for tile in there.tiles] == [((0, 50), (0, 20000), Kind.FULL)]
    assert sum(tile.query[1] - tile.query[0] for tile in here.tiles) == 400


def test_a_span_that_goes_on_elsewhere_shares_no_tile_with_text_around_it() -> None:
    sequence = LaneSequence(1000, (Document(0, 1000, ((100, 900),)),))
    held = [np.array([[0, 200]]), np.array([[200, 1000]])]
    _, there = ring_part(sight(sequence, Mask(None, True)), held, 0).visits
    assert [(tile.query, tile.keys, tile.kind) for tile in there.tiles] == [((100, 200), (0, 700), Kind.FULL)]
