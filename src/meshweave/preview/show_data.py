"""How does a model see the first samples of its data?"""

from collections.abc import Iterator
from itertools import groupby, islice

from meshweave.data.dataset import IGNORE
from meshweave.data.processed import ProcessedDataset
from meshweave.errors import DataError
from meshweave.report.sample import Piece


def first_readable(dataset: ProcessedDataset, wanted: int, count: int) -> Iterator[tuple[int, list[Piece]]]:
    """(index, pieces) of the first `wanted` of `count` samples that can be read."""

    def readable() -> Iterator[tuple[int, list[Piece]]]:
        for index in range(count):
            try:
                yield index, pieces_of(dataset, index)
            except DataError:
                continue  # the report of the check names it

    return islice(readable(), wanted)


def pieces_of(dataset: ProcessedDataset, index: int) -> list[Piece]:
    """A sample's tokens, as text, in runs of one sort. Raises DataError."""
    tokenizer = dataset.processor.tokenizer
    placeholder = tokenizer.convert_tokens_to_ids(dataset.placeholder)
    ids, labels = (tensor.tolist() for tensor in dataset.text(index))
    pieces = []
    for (target, media), run in groupby(zip(ids, labels, strict=True), lambda pair: (pair[1] != IGNORE, pair[0] == placeholder)):
        tokens = [token for token, _ in run]
        if media:
            pieces.append(Piece(dataset.placeholder, media_tokens=len(tokens)))
        else:
            pieces.append(Piece(tokenizer.decode(tokens, clean_up_tokenization_spaces=False), target))
    return pieces
