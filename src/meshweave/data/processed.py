"""How do raw samples become model inputs? With the model's own Hugging Face processor and chat template."""

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from meshweave.batch.plan import MediaMeta, SampleMeta
from meshweave.config import DataConfig
from meshweave.data.dataset import IGNORE, MediaRef, RawSample, Source, with_runs
from meshweave.data.footprint import Footprint, footprint_of, process_image
from meshweave.data.limits import CUT, bounded, resized
from meshweave.data.targets import LITERALS, Answers, Conversation
from meshweave.errors import DataError, LeftOutError, cause

_DUMMY_SIZE = (32, 32)
_ENCODER_INPUTS = ("pixel_values", "image_grid_thw", "image_sizes", "image_position_ids")
"""What encoders take of what image processors return."""
_KEPT = 2048
"""Samples whose tokens are remembered: metadata and text of one are asked for one after the other."""


def patches(meta: MediaMeta) -> float:
    """The default encoding cost: patches where the item has a grid, tokens elsewhere."""
    return float(prod(meta.grid) if meta.grid is not None else meta.tokens)


@dataclass(frozen=True)
class _Prepared:
    """A sample without its pixels."""

    ids: Tensor
    labels: Tensor
    pictures: tuple[MediaRef, ...]
    media: tuple[MediaMeta, ...]
    effects: tuple[str, ...]


class ProcessedDataset:
    """A `Dataset`: a source seen through a transformers processor and its chat template.

    The token ids are those of `processor.apply_chat_template(messages, tokenize=True)`, but no pixel is read for them: an image's
    size says how many tokens it takes. `data/targets.py` defines which of them are targets. State: caches by size and by sample.

    Args:
        answers: how answers are found; by the processor's tokenizer alone if left out.
        limits: the run file's limits of samples and pictures.
        vocabulary: rows of the model's embedding; larger ids are refused by sample.
        module: encodes the images.
        cost: an item's relative encoding cost, from its tokens and grid.
    """

    def __init__(
        self,
        source: Source,
        processor: Any,
        answers: Answers | None = None,
        limits: DataConfig | None = None,
        vocabulary: int | None = None,
        module: str = "vision",
        cost: Callable[[MediaMeta], float] = patches,
    ) -> None:
        self.source, self.processor, self.module, self.cost, self.vocabulary = source, processor, module, cost, vocabulary
        self.answers = answers or Answers.of(processor)
        self.limits = limits or DataConfig(source="synthetic")
        # What the model replaces by media tokens; Gemma 3's processor calls its start mark `image_token`.
        self.placeholder: str = getattr(processor.tokenizer, "image_token", None) or processor.image_token
        self._placeholder_id: int = processor.tokenizer.convert_tokens_to_ids(self.placeholder)
        added = processor.tokenizer.get_added_vocab()
        self._tokens_of_marks = {private for private, mark in LITERALS.items() if mark in added}
        of_size: Callable[[tuple[int, int]], Footprint] = footprint_of(processor, self.placeholder)
        # LLaVA-OneVision tiles a picture only where it is the only one.
        self._alone = "batch_num_images" in process_image(processor, Image.new("RGB", _DUMMY_SIZE), self.placeholder)[0]
        self._footprint = lru_cache(maxsize=65536)(of_size)
        self._prepared = lru_cache(maxsize=_KEPT)(self._prepare)

    def __len__(self) -> int:
        return len(self.source)

    def meta(self, index: int) -> SampleMeta:
        """Token counts, costs, grids and runs from the text and the image headers. Raises `DataError`."""
        prepared = self._prepared(index)
        return SampleMeta(index, len(prepared.ids), prepared.media)

    def text(self, index: int) -> tuple[Tensor, Tensor]:
        """`input_ids`, `labels` [tokens] int64; targets are what `data/targets.py` says. Raises `DataError`."""
        prepared = self._prepared(index)
        return prepared.ids, prepared.labels

    def pictures(self, index: int) -> tuple[MediaRef, ...]:
        """The pictures of a sample in the sizes that the processor gets. Raises `DataError`."""
        return self._prepared(index).pictures

    def effects(self, index: int) -> tuple[str, ...]:
        """What limits and template did to a sample, for counts. Raises `DataError`."""
        return self._prepared(index).effects

    def media(self, index: int, slot: int) -> dict[str, Tensor]:
        """The image processor's output for one image. Raises `DataError` if the image cannot be decoded."""
        return self._process(self._prepared(index).pictures[slot].load())

    def dummy_media(self, module: str) -> dict[str, Tensor]:
        """A small blank image."""
        return self._process(Image.new("RGB", _DUMMY_SIZE))

    def dummy_meta(self, module: str) -> MediaMeta:
        """Tokens and grid of `dummy_media`."""
        return self._meta(module, self._footprint(_DUMMY_SIZE))

    @staticmethod
    def _meta(module: str, found: Footprint) -> MediaMeta:
        return MediaMeta(module, found.tokens, cost=0.0, grid=found.grid, size=found.size)

    def _prepare(self, index: int) -> _Prepared:
        sample = self.source[index]
        try:
            return self._tokens(sample)
        except DataError as error:
            where = getattr(self.source, "where", None)  # of a record in a file
            raise type(error)(f"{where(index)}: {error}" if where else str(error), error.kind) from error

    def _tokens(self, sample: RawSample) -> _Prepared:
        if self._alone and len(sample.media) > 1:
            name = type(self.processor).__name__
            raise DataError(
                f"{name} takes several pictures of a sample otherwise than each alone, which is not built", "processor"
            )
        conversation = self.answers.conversation(sample)
        sizes, effects = bounded([item.size() for item in sample.media], self.limits)
        footprints = [self._footprint(size) for size in sizes]
        expanded, moved = self._expanded(conversation, footprints)
        ids, begins, ends = self._encoded(expanded)
        target = np.zeros(len(begins), dtype=bool)
        for first, last in moved:
            # Any overlap counts, as in transformers' assistant masks; an added BOS overlaps with nothing.
            target |= (begins < last) & (ends > first)
        input_ids = torch.tensor(ids, dtype=torch.int64)
        labels = torch.where(torch.from_numpy(target), input_ids, IGNORE)
        if self.limits.max_length is not None and len(ids) > self.limits.max_length:
            input_ids, labels = self._cut(input_ids, labels, self.limits.max_length)
            effects.append(CUT)
        if not (labels[1:] != IGNORE).any():
            raise LeftOutError("no token of it is a target, so there is nothing to learn", "no target")
        self._require_known(input_ids)
        media = [self._meta(self.module, found) for found in footprints]
        placed = with_runs(media, input_ids.tolist(), {"image": self._placeholder_id})
        return _Prepared(
            input_ids,
            labels,
            tuple(resized(sample.media, sizes)),
            tuple(replace(item, cost=self.cost(item)) for item in placed),
            (*conversation.effects, *effects),
        )

    def _expanded(self, conversation: Conversation, footprints: Sequence[Footprint]) -> tuple[str, list[tuple[int, int]]]:
        """The text with every image's own text in the place of its token, and where the targets lie in it.

        Marks that are spoken of are written out, but for those that the tokenizer would take for a token: they stay private.
        """
        token, text = self.processor.image_token, conversation.text
        if (count := text.count(token)) != len(footprints):
            raise DataError(
                f"the rendered text holds {token!r} {count} times for {len(footprints)} images; the chat template must write "
                "each image once, and nothing else this token",
                "chat template",
            )
        images = iter(footprints)
        pieces, places, growth, at = [], [], [0], 0
        for found in re.finditer("|".join(map(re.escape, [token, *LITERALS.keys() - self._tokens_of_marks])), text):
            written = next(images).text if found.group() == token else LITERALS[found.group()]
            pieces += [text[at : found.start()], written]
            places.append(found.start())
            growth.append(growth[-1] + len(written) - len(found.group()))
            at = found.end()
        moved = [
            (first + growth[bisect_left(places, first)], last + growth[bisect_left(places, last)])
            for first, last in conversation.targets
        ]
        return "".join([*pieces, text[at:]]), moved

    def _encoded(self, text: str) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Token ids, and the characters of the text where each begins and ends."""
        tokenizer = self.processor.tokenizer
        # No second BOS token where the template writes one: the rule of `apply_chat_template`.
        special = tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for piece in re.split("([" + "".join(LITERALS) + "])", text):
            if piece in LITERALS:
                # Ordinary text, although the tokenizer has a token of this name.
                found = self._encode(LITERALS[piece], special=False, literal=True)["input_ids"]
                offsets += [(at, at + 1)] * len(found)
            else:
                encoding = self._encode(piece, special and at == 0, literal=False)
                found = encoding["input_ids"]
                offsets += [(at + first, at + last) for first, last in encoding["offset_mapping"]]
            ids += found
            at += len(piece)
        begins, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        return ids, begins, ends

    def _encode(self, text: str, special: bool, literal: bool) -> Any:
        try:
            return self.processor.tokenizer(
                text, add_special_tokens=special, return_offsets_mapping=True, split_special_tokens=literal
            )
        except Exception as error:  # whatever a tokenizer raises of a text
            raise DataError(f"the tokenizer refuses its text ({cause(error)})", "processor") from error

    def _cut(self, ids: Tensor, labels: Tensor, most: int) -> tuple[Tensor, Tensor]:
        if self.limits.too_long == "drop":
            raise LeftOutError(f"it has {len(ids)} tokens, more than data.max_length={most}", "too long")
        media = torch.nonzero(ids == self._placeholder_id).flatten()
        # What frames a picture in the text is a token or two behind it; the text is cut behind these, too.
        if len(media) and int(media[-1]) + 2 >= most:
            why = f"it has {len(ids)} tokens, more than data.max_length={most}, and a picture lies behind them"
            raise LeftOutError(f"{why}: text alone is cut", "too long")
        return ids[:most], labels[:most]

    def _require_known(self, ids: Tensor) -> None:
        if self.vocabulary is None:
            return
        unknown = ids[(ids >= self.vocabulary) & (ids != self._placeholder_id)]
        if len(unknown):
            token = self.processor.tokenizer.convert_ids_to_tokens(int(unknown[0]))
            raise DataError(
                f"its text holds the token {token!r} of id {int(unknown[0])}, but the model's embedding has {self.vocabulary} "
                "rows; the tokenizer is not this model's",
                "special token",
            )

    def _process(self, image: Image.Image) -> dict[str, Tensor]:
        raw, found = process_image(self.processor, image, self.placeholder)
        planned = self._footprint((image.height, image.width))
        if found != planned:
            raise DataError(
                f"the processor makes {found.tokens} media tokens of grid {found.grid} of a picture {image.width} wide and "
                f"{image.height} high, where its own arithmetic says {planned.tokens} and {planned.grid}",
                "processor",
            )
        inputs = {key: raw[key] for key in _ENCODER_INPUTS if key in raw}
        if inputs["pixel_values"].ndim == 5:  # [images, squares, …]: images of several numbers of squares are joined by square
            inputs["pixel_values"] = inputs["pixel_values"].flatten(0, 1)
        return inputs
