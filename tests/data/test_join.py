"""Media items of different sizes become one input, and runs say where their placeholders lie."""

import pytest
import torch

from meshweave.batch.plan import MediaMeta
from meshweave.data.dataset import with_runs
from meshweave.data.join import join_media
from meshweave.errors import DataError


def test_items_of_one_size_are_concatenated_as_they_are() -> None:
    items = [{"pixel_values": torch.ones(n, 3), "image_grid_thw": torch.tensor([[1, n, 1]])} for n in (2, 4)]
    joined = join_media(items)
    assert joined["pixel_values"].shape == (6, 3)
    assert joined["image_grid_thw"].tolist() == [[1, 2, 1], [1, 4, 1]]


def test_smaller_items_are_padded_with_zeros_at_the_end() -> None:
    items = [{"x": torch.ones(1, 2, 3)}, {"x": torch.ones(1, 1, 4)}]
    joined = join_media(items)["x"]
    assert joined.shape == (2, 2, 4)
    assert joined[0].tolist() == [[1, 1, 1, 0], [1, 1, 1, 0]]
    assert joined[1].tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]


def test_nothing_joined_is_nothing() -> None:
    assert join_media([]) == {}


def item(tokens: int, kind: str = "image") -> MediaMeta:
    return MediaMeta("vision", tokens, cost=1.0, kind=kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "media", "runs"),
    [
        ([0, 5, 5, 0], [item(2)], [((1, 2),)]),
        ([5, 5, 5, 5], [item(1), item(3)], [((0, 1),), ((1, 3),)]),
        ([5, 5, 0, 5, 5, 0, 5], [item(4), item(1)], [((0, 2), (3, 2)), ((6, 1),)]),
        ([6, 0, 6, 5, 6], [item(2, "video"), item(1), item(1, "video")], [((0, 1), (2, 1)), ((3, 1),), ((4, 1),)]),
        ([0, 1], [], []),
    ],
    ids=["one", "neighbours", "broken by rows", "two kinds", "text only"],
)
def test_runs_are_the_unbroken_pieces_of_each_item(ids: list[int], media: list[MediaMeta], runs: list[tuple]) -> None:
    assert [found.runs for found in with_runs(media, ids, {"image": 5, "video": 6})] == runs


def test_placeholders_that_do_not_match_the_media_are_refused() -> None:
    with pytest.raises(DataError, match="2 placeholders of kind 'image' for 3 media tokens"):
        with_runs([item(3)], [5, 5], {"image": 5})
