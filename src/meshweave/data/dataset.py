"""What does the loader need from a dataset, and a dataset from a source?"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from meshweave.batch.plan import MediaMeta, SampleMeta
from meshweave.errors import DataError

IGNORE = -100  # the label of a position that is not a target, as in transformers


class MediaRef(Protocol):
    """One media item of a raw sample, not read yet. Methods raise `DataError` naming what cannot be read."""

    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, from the file's header alone: nothing is decoded."""
        ...

    def load(self) -> Image.Image:
        """The decoded picture, in RGB."""
        ...


@dataclass(frozen=True)
class RawSample:
    """One sample as people write it, before any model's processor has seen it."""

    messages: Sequence[Mapping[str, Any]]
    """Hugging Face chat form: `{"role": …, "content": [{"type": "text", "text": …}, {"type": "image"}]}`."""
    media: Sequence[MediaRef] = ()
    """One reference for each `{"type": "image"}` part, in order of appearance."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Descriptions of the tools that the assistant may call, as chat templates take them."""
    flags: Mapping[int, bool] = field(default_factory=dict)
    """Turn → whether the record says that it is a target (`loss`, `loss_mask`, `trainable`, …)."""


class Source(Protocol):
    """A finite, indexable collection of raw samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> RawSample:
        """Sample `index`; no media file is opened. Raises `DataError` if the entry is unusable."""
        ...


class Dataset(Protocol):
    """A finite collection of model-ready samples, whose text, media and metadata can be had separately."""

    def __len__(self) -> int: ...

    def meta(self, index: int) -> SampleMeta:
        """Token counts, costs and grids of a sample. Cheap: no pixels are decoded. Raises `DataError`."""
        ...

    def text(self, index: int) -> tuple[Tensor, Tensor]:
        """`input_ids`, `labels` [tokens] int64: placeholders expanded; labels not shifted, -100 is none."""
        ...

    def media(self, index: int, slot: int) -> dict[str, Tensor]:
        """The encoder inputs of one item, a video under the names of an image; `join_media` combines them. Raises `DataError`."""
        ...

    def dummy_media(self, module: str) -> dict[str, Tensor]:
        """A small valid input of encoder `module`, with the keys of `media`: for a lane without items."""
        ...

    def dummy_meta(self, module: str) -> MediaMeta:
        """What `dummy_media` is, as `meta` would say it."""
        ...


def with_runs(media: Sequence[MediaMeta], ids: Iterable[int], placeholders: Mapping[str, int]) -> tuple[MediaMeta, ...]:
    """A sample's media, with the runs of their placeholders.

    Args:
        media: in the order of their placeholders.
        ids: of the fused sequence.
        placeholders: kind of media to the id of its placeholder.

    Raises:
        DataError: the text has more or fewer placeholders of a kind than its media yield tokens.
    """
    places: dict[str, Iterator[int]] = {}
    listed = list(ids)
    for kind, token in placeholders.items():
        found = [place for place, each in enumerate(listed) if each == token]
        wanted = sum(item.tokens for item in media if item.kind == kind)
        if len(found) != wanted:
            raise DataError(f"the text holds {len(found)} placeholders of kind {kind!r} for {wanted} media tokens")
        places[kind] = iter(found)
    return tuple(replace(item, runs=_runs(list(islice(places[item.kind], item.tokens)))) for item in media)


def _runs(places: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Ascending places as (first, count) of those that follow one another."""
    # Neighbours in a run have the same distance to their rank.
    groups = [[place for _, place in run] for _, run in groupby(enumerate(places), lambda pair: pair[1] - pair[0])]
    return tuple((run[0], len(run)) for run in groups)
