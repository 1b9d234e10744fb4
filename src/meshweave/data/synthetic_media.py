"""What does one media item of a model look like? Its place in the text, its metadata, and random encoder inputs of its shape.

Written from configurations alone, one class for each way in which transformers' processors hand media to a model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from meshweave.batch.plan import MediaMeta
from meshweave.errors import ConfigError

Fill = Callable[[tuple[int, ...]], Tensor]
MOST_TILES = 3
MOST_FRAMES = 3


@dataclass(frozen=True)
class Item:
    """One media item."""

    ids: tuple[int, ...]
    """What stands for it in the text: its placeholders, and what is written around and between them."""
    meta: MediaMeta
    """Without its runs, which depend on the text before it."""
    shapes: Mapping[str, tuple[int, ...]]
    """Encoder inputs of random values."""
    given: Mapping[str, Tensor]
    """Encoder inputs that follow from the shape."""

    def inputs(self, fill: Fill) -> dict[str, Tensor]:
        return {key: fill(shape) for key, shape in self.shapes.items()} | dict(self.given)


class Media(Protocol):
    """One kind of media of one model."""

    @property
    def module(self) -> str: ...

    def draw(self, random: np.random.Generator) -> Item: ...


@dataclass(frozen=True)
class Frame:
    """What is written around the placeholders of an item."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def around(self, token: int, count: int) -> tuple[int, ...]:
        return (*self.before, *(token,) * count, *self.after)


@dataclass(frozen=True)
class Squares:
    """CLIP, SigLIP, InternViT: every image is resized to one square, or cut into up to `most_tiles` of them."""

    token: int
    frame: Frame
    square: tuple[int, int, int]
    """Channels, height and width of one in pixels."""
    patches: int
    tokens: int
    """Of one square."""
    most_tiles: int = 1
    module: str = "vision"

    def draw(self, random: np.random.Generator) -> Item:
        tiles = int(random.integers(1, self.most_tiles + 1)) if self.most_tiles > 1 else 1
        count = tiles * self.tokens
        grid = (tiles, 1, self.patches) if self.most_tiles > 1 else None
        meta = MediaMeta(self.module, count, cost=float(tiles * self.patches), grid=grid)
        return Item(self.frame.around(self.token, count), meta, {"pixel_values": (tiles, *self.square)}, {})


@dataclass(frozen=True)
class AnyResolution:
    """LLaVA-NeXT, LLaVA-OneVision: an overview and tiles of the best of some resolutions, less what only pads the image."""

    token: int
    square: tuple[int, int, int]
    patches: int
    tokens: Callable[[tuple[int, int]], tuple[int, int]]
    """Tiles, overview included, and media tokens of an image of so many pixels (height, width)."""
    most_side: int
    module: str = "vision"

    def draw(self, random: np.random.Generator) -> Item:
        height, width = (int(side) for side in random.integers(self.square[1] // 2, self.most_side + 1, size=2))
        tiles, count = self.tokens((height, width))
        meta = MediaMeta(
            self.module, count, cost=float(tiles * self.patches), grid=(tiles, 1, self.patches), size=(height, width)
        )
        sizes = {"image_sizes": torch.tensor([[height, width]])}
        return Item((self.token,) * count, meta, {"pixel_values": (tiles, *self.square)}, sizes)


@dataclass(frozen=True)
class Rows:
    """Pixtral: images of their own size, padded to the largest; a break follows each row of media tokens."""

    token: int
    brk: int
    end: int
    channels: int
    unit: int
    """Pixels a side of one media token."""
    merge: int
    """Patches a side of one media token."""
    most_side: int
    module: str = "vision"

    def draw(self, random: np.random.Generator) -> Item:
        # transformers' model stumbles over a single token.
        rows, columns = int(random.integers(1, self.most_side + 1)), int(random.integers(2, self.most_side + 1))
        row = (*(self.token,) * columns, self.brk)
        ids = (*(row * rows)[:-1], self.end)
        grid = (1, rows * self.merge, columns * self.merge)
        size = rows * self.unit, columns * self.unit
        meta = MediaMeta(self.module, rows * columns, cost=float(grid[1] * grid[2]), grid=grid, size=size)
        return Item(ids, meta, {"pixel_values": (1, self.channels, *size)}, {"image_sizes": torch.tensor([size])})


@dataclass(frozen=True)
class Patches:
    """Qwen-VL: any grid of patches whose sides are multiples of `merge`; a video is several such grids."""

    token: int
    frame: Frame
    values: int
    """Numbers in one patch: channels · frames · patch²."""
    merge: int
    most_side: int
    video: bool = False
    apart: bool = False
    """Whether every frame of a video stands on its own in the text, after its time."""
    time: int = 0
    """The token that stands for a time."""
    module: str = "vision"

    def draw(self, random: np.random.Generator) -> Item:
        height, width = (int(side) for side in random.integers(1, self.most_side + 1, size=2) * self.merge)
        frames = int(random.integers(1, MOST_FRAMES + 1)) if self.video else 1
        count, patches = height * width // self.merge**2, frames * height * width
        if self.apart:
            ids = (self.time, *self.frame.around(self.token, count)) * frames
        else:
            ids = self.frame.around(self.token, frames * count)
        grid = (frames, height, width)
        kind = "video" if self.video else "image"
        meta = MediaMeta(self.module, frames * count, cost=float(patches), grid=grid, kind=kind)  # type: ignore[arg-type]
        return Item(ids, meta, {"pixel_values": (patches, self.values)}, {"image_grid_thw": torch.tensor([grid])})


@dataclass(frozen=True)
class PlacedPatches:
    """Gemma 4: patches in any grid, each with its place, padded to a fixed number; `kernel`² of them make a media token."""

    token: int
    frame: Frame
    values: int
    """Numbers in one patch."""
    kernel: int
    most_side: int
    module: str = "vision"

    def draw(self, random: np.random.Generator) -> Item:
        rows, columns = (int(side) for side in random.integers(1, self.most_side + 1, size=2))
        height, width, longest = rows * self.kernel, columns * self.kernel, (self.most_side * self.kernel) ** 2
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.full((1, longest, 2), -1)
        places[0, : height * width] = torch.stack([x.flatten(), y.flatten()], dim=-1)
        meta = MediaMeta(self.module, rows * columns, cost=float(height * width), grid=(1, height, width))
        shapes = {"pixel_values": (1, longest, self.values)}
        return Item(self.frame.around(self.token, rows * columns), meta, shapes, {"image_position_ids": places})


@dataclass(frozen=True)
class Sounds:
    """Whisper-like towers: spectrograms, of which a mask says how long they are."""

    token: int
    frame: Frame
    mels: int
    shortest: int
    longest: int
    """Frames of a spectrogram."""
    padded: bool
    """Whether every spectrogram is as long as the longest."""
    tokens: Callable[[int], int]
    """Media tokens of so many frames."""
    module: str = "audio"

    def draw(self, random: np.random.Generator) -> Item:
        length = int(random.integers(self.shortest, self.longest + 1))
        frames = self.longest if self.padded else length
        mask = (torch.arange(frames) < length).long().unsqueeze(0)
        count = self.tokens(length)
        meta = MediaMeta(self.module, count, cost=float(length), grid=(length,), kind="audio")
        return Item(
            self.frame.around(self.token, count),
            meta,
            {"input_features": (1, self.mels, frames)},
            {"feature_attention_mask": mask},
        )


def media_of(config: PreTrainedConfig, most_side: int, spare: np.ndarray) -> tuple[Media, ...]:
    """The kinds of media that a model takes.

    Args:
        most_side: the longest side of an image, in media tokens, where images have a size of their own.
        spare: ordinary token ids, for what is written between placeholders.

    Raises:
        ConfigError: there is none that samples can be made for.
    """
    found = (*_vision(config, most_side, spare), *_audio(config))
    if not found:
        raise ConfigError(
            f"model {config.model_type!r}: no `vision_config` with `image_size` or `spatial_merge_size`, and no `audio_config` "
            "of a known kind, so no synthetic media can be made for it; give `data:` instead"
        )
    return found


def _vision(config: Any, most_side: int, spare: np.ndarray) -> tuple[Media, ...]:
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return ()
    token, frame = config.image_token_id, _frame(config, "vision_start_token_id", "vision_end_token_id")
    if vision.model_type == "pixtral":
        unit = vision.patch_size * config.spatial_merge_size
        return (
            Rows(
                token,
                int(spare[0]),
                int(spare[1]),
                vision.num_channels,
                unit,
                config.spatial_merge_size,
                min(most_side, vision.image_size // unit),
            ),
        )
    if (merge := getattr(vision, "spatial_merge_size", None)) is not None:
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        images = Patches(token, frame, values, merge, most_side)
        if config.model_type not in VIDEOS:
            return (images,)
        apart = VIDEOS[config.model_type]
        return images, Patches(config.video_token_id, frame, values, merge, most_side, True, apart, int(spare[0]))
    if vision.model_type == "gemma4_vision":
        values, frame = 3 * vision.patch_size**2, _frame(config, "boi_token_id", "eoi_token_id")
        return (PlacedPatches(token, frame, values, vision.pooling_kernel_size, most_side),)
    size, patch = (_side(getattr(vision, key, None)) for key in ("image_size", "patch_size"))
    if size is None or patch is None:
        return ()
    square, patches = (vision.num_channels, size, size), (size // patch) ** 2
    if getattr(config, "image_grid_pinpoints", None):
        largest = max(max(sides) for sides in config.image_grid_pinpoints)
        return (AnyResolution(token, square, patches, lambda size: _any_resolution(config, size), largest),)
    if hasattr(config, "mm_tokens_per_image"):  # Gemma 3
        return (Squares(token, _frame(config, "boi_token_id", "eoi_token_id"), square, patches, config.mm_tokens_per_image),)
    if (ratio := getattr(config, "downsample_ratio", None)) is not None:  # InternVL
        return (Squares(token, Frame(), square, patches, round(patches * ratio**2), MOST_TILES),)
    class_token = vision.model_type.startswith("clip")
    dropped = getattr(config, "vision_feature_select_strategy", "full") == "default"
    return (Squares(token, frame, square, patches, patches + class_token - dropped),)


VIDEOS = {"qwen2_vl": False, "qwen2_5_vl": False, "qwen3_vl": True, "qwen3_vl_moe": True, "qwen3_5": True, "qwen3_5_moe": True}
"""`model_type`s whose videos the encoder takes as it takes images, and whether frames stand apart in the text."""


def _audio(config: Any) -> tuple[Media, ...]:
    audio = getattr(config, "audio_config", None)
    if audio is None or not hasattr(audio, "num_mel_bins") or not hasattr(audio, "max_source_positions"):
        return ()
    frame = _frame(config, "audio_start_token_id", "audio_end_token_id")
    padded = audio.model_type == "qwen2_audio_encoder"
    longest = 2 * audio.max_source_positions
    shortest, tokens = longest // 4, _halved_twice
    if audio.model_type == "qwen3_omni_moe_audio_encoder":
        # What the model makes of a sound shorter than a chunk depends on the longest sound beside it.
        shortest, tokens = min(2 * audio.n_window, longest), _halved_thrice
    return (Sounds(config.audio_token_id, frame, audio.num_mel_bins, shortest, longest, padded, tokens),)


def _halved_twice(frames: int) -> int:
    """Media tokens of a Whisper-like tower: a convolution of stride 2, then pooling by 2."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def _halved_thrice(frames: int) -> int:
    """Media tokens of Qwen3-Omni's audio tower: three convolutions of stride 2 over chunks of 100 frames."""
    chunks, left = divmod(frames, 100)
    return 13 * chunks + -(-left // 8)


def _any_resolution(config: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Tiles and media tokens, by what the model itself does to features (here of width 1)."""
    from transformers.models.llava_next import modeling_llava_next as next_  # here: slow to import, and few need them
    from transformers.models.llava_onevision import modeling_llava_onevision as onevision

    vision = config.vision_config
    tiles = int(next_.image_size_to_num_patches(size, config.image_grid_pinpoints, vision.image_size))
    features = [torch.zeros(tiles, (vision.image_size // vision.patch_size) ** 2, 1)]
    given = SimpleNamespace(config=config), features, torch.tensor([size])
    pack: Any
    if config.model_type == "llava_onevision":
        pack, extra = onevision.LlavaOnevisionModel.pack_image_features, {"vision_aspect_ratio": config.vision_aspect_ratio}
    else:
        pack, extra = next_.LlavaNextModel.pack_image_features, {"vision_feature_select_strategy": "full"}
    _, lengths = pack(*given, image_newline=torch.zeros(1), **extra)
    return tiles, int(lengths[0])


def _frame(config: Any, before: str, after: str) -> Frame:
    found = [getattr(config, key, getattr(config, key.replace("_id", "_index"), None)) for key in (before, after)]
    return Frame(*(() if token is None else (token,) for token in found))


def _side(size: Any) -> int | None:
    """The side of a square, which some configs give twice."""
    if isinstance(size, (list, tuple)):
        return int(size[0])
    return size if isinstance(size, int) else None
