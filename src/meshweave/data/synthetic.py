"""What does a model of a given configuration take? Random ragged samples, for tests and `verify`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from meshweave.batch import MediaMeta, SampleMeta
from meshweave.data.dataset import IGNORE
from meshweave.errors import ConfigError

Fill = Callable[[tuple[int, ...]], Tensor]


class _Images(Protocol):
    """What one kind of vision tower takes."""

    def draw(self, random: np.random.Generator) -> tuple[int, int]:
        """(height, width) of an image, in patches."""
        ...

    def meta(self, module: str, height: int, width: int) -> MediaMeta: ...

    def inputs(self, height: int, width: int, fill: Fill) -> dict[str, Tensor]: ...


class SyntheticDataset:
    """A `Dataset` of random tokens and pixels that fit the Hugging Face model configuration `hf_config`.

    Samples go round in fours: one image, none, a few, `most_images`. Texts of `text_tokens` = (fewest, most)
    tokens with ordinary ids stand before and after every image; the last text is the target. A fixed-size
    vision tower (CLIP, SigLIP) gets `pixel_values` [1, channels, size, size]; a Qwen-VL one `pixel_values`
    [h·w, channels · frames · patch²] and `image_grid_thw` [1, 3], with 1 to `most_side` merged patches a
    side. Everything follows from `seed` and index.

    Raises `ConfigError` if the configuration has no vision tower of either kind.
    """

    def __init__(
        self,
        hf_config: Any,
        samples: int,
        seed: int = 0,
        *,
        module: str = "vision",
        text_tokens: tuple[int, int] = (2, 12),
        most_images: int = 7,
        most_side: int = 3,
    ) -> None:
        self.samples, self.seed, self.module = samples, seed, module
        self.text_tokens, self.most_images = text_tokens, most_images
        self._images = _images(hf_config, most_side)
        self._ordinary_ids = _ordinary_ids(hf_config)
        self._image_id: int = hf_config.image_token_id
        frame = (getattr(hf_config, f"vision_{side}_token_id", None) for side in ("start", "end"))
        self._frame = [[] if token is None else [token] for token in frame]  # Qwen-VL's, around each image

    def __len__(self) -> int:
        return self.samples

    def meta(self, index: int) -> SampleMeta:
        """Token counts and grids; the cost of an item is its number of patches."""
        texts, sizes = self._shape(index)
        media, position = [], texts[0]
        before, after = map(len, self._frame)
        for size, text in zip(sizes, texts[1:], strict=True):
            item = self._images.meta(self.module, *size)
            media.append(replace(item, runs=((position + before, item.tokens),)))
            position += before + item.tokens + after + text
        return SampleMeta(index, position, tuple(media))

    def text(self, index: int) -> tuple[Tensor, Tensor]:
        """`input_ids` and `labels` [tokens] int64; the last text is the target."""
        texts, sizes = self._shape(index)
        random = self._random(index, 1)
        first, *others = (random.choice(self._ordinary_ids, count).tolist() for count in texts)
        start, end = self._frame
        ids = first
        for size, text in zip(sizes, others, strict=True):
            ids += [*start, *[self._image_id] * self._images.meta(self.module, *size).tokens, *end, *text]
        input_ids = torch.tensor(ids, dtype=torch.int64)
        labels = torch.full_like(input_ids, IGNORE)
        labels[-texts[-1] :] = input_ids[-texts[-1] :]
        return input_ids, labels

    def media(self, index: int, slot: int) -> dict[str, Tensor]:
        """Normally distributed pixels of one image, float32."""
        random = self._random(index, 2 + slot)
        return self._images.inputs(
            *self._shape(index)[1][slot],
            lambda shape: torch.from_numpy(random.standard_normal(shape, dtype=np.float32)),
        )

    def dummy_media(self, module: str) -> dict[str, Tensor]:
        """One black image of the first sample's size."""
        return self._images.inputs(*self._shape(0)[1][0], torch.zeros)

    def dummy_meta(self, module: str) -> MediaMeta:
        """Tokens and grid of `dummy_media`."""
        return self._images.meta(module, *self._shape(0)[1][0])

    def _random(self, index: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, index, stream])

    def _shape(self, index: int) -> tuple[list[int], list[tuple[int, int]]]:
        """The lengths of the texts, and the sizes in patches of the images between them."""
        random = self._random(index, 0)
        fewest, most = self.text_tokens
        images = (1, 0, int(random.integers(1, self.most_images + 1)), self.most_images)[index % 4]
        return (
            [int(random.integers(fewest, most + 1)) for _ in range(images + 1)],
            [self._images.draw(random) for _ in range(images)],
        )


@dataclass(frozen=True)
class _FixedSize:
    """CLIP, SigLIP: every image is resized to one square."""

    channels: int
    pixels: int
    patch: int
    extra_tokens: int
    """Media tokens beyond one a patch: + 1 for a class token that is kept, - 1 for a dropped first one."""

    def draw(self, random: np.random.Generator) -> tuple[int, int]:
        return self.pixels // self.patch, self.pixels // self.patch

    def meta(self, module: str, height: int, width: int) -> MediaMeta:
        return MediaMeta(module, height * width + self.extra_tokens, cost=float(height * width))

    def inputs(self, height: int, width: int, fill: Fill) -> dict[str, Tensor]:
        return {"pixel_values": fill((1, self.channels, self.pixels, self.pixels))}


@dataclass(frozen=True)
class _FreeSize:
    """Qwen-VL: any grid of patches, whose sides are multiples of `merge`."""

    patch_values: int
    """Numbers in one patch: channels · frames · patch²."""
    merge: int
    most_side: int

    def draw(self, random: np.random.Generator) -> tuple[int, int]:
        height, width = random.integers(1, self.most_side + 1, size=2) * self.merge
        return int(height), int(width)

    def meta(self, module: str, height: int, width: int) -> MediaMeta:
        patches = height * width
        return MediaMeta(module, patches // self.merge**2, cost=float(patches), grid=(1, height, width))

    def inputs(self, height: int, width: int, fill: Fill) -> dict[str, Tensor]:
        return {
            "pixel_values": fill((height * width, self.patch_values)),
            "image_grid_thw": torch.tensor([[1, height, width]]),
        }


def _images(hf_config: Any, most_side: int) -> _Images:
    vision: Any = getattr(hf_config, "vision_config", None)
    if (merge := getattr(vision, "spatial_merge_size", None)) is not None:
        return _FreeSize(vision.in_channels * vision.temporal_patch_size * vision.patch_size**2, merge, most_side)
    if vision is not None and isinstance(getattr(vision, "image_size", None), int):
        class_token = vision.model_type.startswith("clip")
        dropped = getattr(hf_config, "vision_feature_select_strategy", "full") == "default"
        return _FixedSize(vision.num_channels, vision.image_size, vision.patch_size, class_token - dropped)
    raise ConfigError(
        f"model {hf_config.model_type!r}: no `vision_config` with `image_size` or `spatial_merge_size`, "
        "so no synthetic images can be made for it; give `data:` instead"
    )


def _ordinary_ids(hf_config: Any) -> np.ndarray:
    """Every id of the vocabulary but those with a role (media placeholders, padding, start and end)."""
    text = hf_config.get_text_config()
    special = {
        value
        for config in (hf_config, text)
        for name, value in config.to_dict().items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    return np.setdiff1d(np.arange(text.vocab_size), list(special))
