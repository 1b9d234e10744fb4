"""How do raw samples become model inputs? With the model's own Hugging Face processor and chat template."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from meshweave.batch.plan import MediaMeta, SampleMeta
from meshweave.data.dataset import IGNORE, RawSample, Source, with_runs
from meshweave.data.footprint import Footprint, footprint_of, process_image
from meshweave.errors import DataError

_DUMMY_SIZE = (32, 32)
_ENCODER_INPUTS = ("pixel_values", "image_grid_thw", "image_sizes", "image_position_ids")
"""What encoders take of what image processors return."""


def patches(meta: MediaMeta) -> float:
    """The default encoding cost: patches where the item has a grid, tokens elsewhere."""
    return float(prod(meta.grid) if meta.grid is not None else meta.tokens)


class ProcessedDataset:
    """A `Dataset`: a source seen through a transformers processor and its chat template.

    `module` encodes the images; `cost` gives an item's relative encoding cost from its tokens and grid.
    The token ids are those of `processor.apply_chat_template(messages, tokenize=True)`, but no pixel is read
    for them: an image's size says how many tokens it takes. State: a cache by size, and nothing else.

    Raises `ConfigError` for a processor without chat template, image token or fast tokenizer.
    """

    def __init__(
        self,
        source: Source,
        processor: Any,
        module: str = "vision",
        cost: Callable[[MediaMeta], float] = patches,
    ) -> None:
        self.source, self.processor, self.module, self.cost = source, processor, module, cost
        # What the model replaces by media tokens; Gemma 3's processor calls its start mark `image_token`.
        self.placeholder: str = getattr(processor.tokenizer, "image_token", None) or processor.image_token
        of_size: Callable[[tuple[int, int]], Footprint] = footprint_of(processor, self.placeholder)
        self._footprint = lru_cache(maxsize=65536)(of_size)

    def __len__(self) -> int:
        return len(self.source)

    def meta(self, index: int) -> SampleMeta:
        """Token counts, costs, grids and runs from the text and the image headers. Raises `DataError`."""
        sample = self.source[index]
        footprints = self._footprints(sample)
        text = self._expand(self._render(sample.messages), footprints)
        ids = self._tokenize(text)["input_ids"]
        media = [self._meta(self.module, found) for found in footprints]
        placeholder = self.processor.tokenizer.convert_tokens_to_ids(self.placeholder)
        placed = with_runs(media, ids, {"image": placeholder})
        return SampleMeta(index, len(ids), tuple(replace(item, cost=self.cost(item)) for item in placed))

    def text(self, index: int) -> tuple[Tensor, Tensor]:
        """`input_ids`, `labels` [tokens] int64; targets are what the assistant says. Raises `DataError`."""
        sample = self.source[index]
        footprints = self._footprints(sample)
        rendered = self._render(sample.messages)
        spans = [self._moved(span, rendered, footprints) for span in self._answers(sample, rendered)]
        encoding = self._tokenize(self._expand(rendered, footprints))
        input_ids = torch.tensor(encoding["input_ids"], dtype=torch.int64)
        begins, ends = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        target = np.zeros(len(begins), dtype=bool)
        for first, last in spans:
            # Any overlap counts, as in transformers' assistant masks; an added BOS overlaps with nothing.
            target |= (begins < last) & (ends > first)
        return input_ids, torch.where(torch.from_numpy(target), input_ids, IGNORE)

    def media(self, index: int, slot: int) -> dict[str, Tensor]:
        """The image processor's output for one image. Raises `DataError` if the image cannot be decoded."""
        return self._process(self.source[index].media[slot].load())

    def dummy_media(self, module: str) -> dict[str, Tensor]:
        """A small blank image."""
        return self._process(Image.new("RGB", _DUMMY_SIZE))

    def dummy_meta(self, module: str) -> MediaMeta:
        """Tokens and grid of `dummy_media`."""
        return self._meta(module, self._footprint(_DUMMY_SIZE))

    @staticmethod
    def _meta(module: str, found: Footprint) -> MediaMeta:
        return MediaMeta(module, found.tokens, cost=0.0, grid=found.grid, size=found.size)

    def _render(self, messages: Any, add_generation_prompt: bool = False) -> str:
        if not messages:  # what comes before the first turn; not every template accepts an empty list
            return ""
        try:
            return str(
                self.processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
            )
        except TemplateError as error:  # e.g. roles that do not alternate
            raise DataError(f"the chat template refuses the turns {[m['role'] for m in messages]}: {error}") from error

    def _answers(self, sample: RawSample, rendered: str) -> list[tuple[int, int]]:
        """The character spans of `rendered` that the model has to say: generation prompt to end of turn."""
        spans = []
        for turn, message in enumerate(sample.messages):
            if message["role"] == "assistant":
                before = self._render(sample.messages[:turn], add_generation_prompt=True)
                last = turn + 1 == len(sample.messages)
                after = rendered if last else self._render(sample.messages[: turn + 1])
                if not (rendered.startswith(after) and after.startswith(before)):
                    raise DataError(
                        f"turn {turn}: the chat template writes this turn differently when "
                        "others follow, so the answer cannot be located; split the conversation"
                    )
                spans.append((len(before), len(after)))
        return spans

    def _expand(self, rendered: str, footprints: list[Footprint]) -> str:
        pieces = rendered.split(self.processor.image_token)
        if len(pieces) != len(footprints) + 1:
            raise DataError(
                f"the rendered text holds {self.processor.image_token!r} {len(pieces) - 1} times for "
                f"{len(footprints)} images; the template must write each image, and no text this token"
            )
        return "".join(chain.from_iterable(zip(pieces, [*(found.text for found in footprints), ""], strict=True)))

    def _moved(self, span: tuple[int, int], rendered: str, footprints: list[Footprint]) -> tuple[int, int]:
        """Where a character span of the rendered text lies after `_expand`."""
        token = re.escape(self.processor.image_token)
        ends = [match.end() for match in re.finditer(token, rendered)]
        growth = [len(found.text) - len(self.processor.image_token) for found in footprints]
        first, last = (at + sum(g for end, g in zip(ends, growth, strict=False) if end <= at) for at in span)
        return first, last

    def _tokenize(self, text: str) -> Any:
        tokenizer = self.processor.tokenizer
        # No second BOS token where the template writes one: the rule of `apply_chat_template`.
        written = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        return tokenizer(text, add_special_tokens=not written, return_offsets_mapping=True)

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

    def _footprints(self, sample: RawSample) -> list[Footprint]:
        return [self._footprint(item.size()) for item in sample.media]
