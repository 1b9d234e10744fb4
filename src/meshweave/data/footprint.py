"""What does an image take in the text and in the encoder? From its size alone, by the processor's own arithmetic."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from PIL import Image
from torch import Tensor

# (height, width) of the blank images that a processor's arithmetic is checked with.
PROBES = ((64, 64), (48, 112))


@dataclass(frozen=True)
class Footprint:
    """What one image of a given size takes in the text and in the encoder."""

    text: str
    """What the processor writes in place of the image's placeholder."""
    tokens: int
    """Media tokens among it."""
    grid: tuple[int, ...] | None
    """(t, h, w) in patches, for processors that return `image_grid_thw`; (squares, 1, media tokens of one) where these cut an
    image into several."""
    size: tuple[int, int] | None
    """(height, width) in pixels, for processors that return `image_sizes`."""


def footprint_of(processor: Any, placeholder: str) -> Callable[[tuple[int, int]], Footprint]:
    """The processor's arithmetic on sizes where it holds; else it is shown a blank image."""
    computed, measured = partial(_computed, processor), partial(_measured, processor, placeholder)
    try:
        holds = all(computed(size) == measured(size) for size in PROBES)
    except (AttributeError, KeyError, TypeError, ValueError):
        holds = False
    return computed if holds else measured


def _computed(processor: Any, size: tuple[int, int]) -> Footprint:
    images = processor.image_processor
    tokens = processor._get_num_multimodal_tokens(image_sizes=[list(size)]).num_image_tokens[0]
    grid = None
    if resize := getattr(inspect.getmodule(type(images)), "smart_resize", None):  # the Qwen-VL families
        bounds = {"min_pixels": images.size["shortest_edge"], "max_pixels": images.size["longest_edge"]}
        height, width = resize(*size, factor=images.patch_size * images.merge_size, **bounds)
        grid = (1, height // images.patch_size, width // images.patch_size)
    return Footprint(processor.image_token * tokens, tokens, grid, None)


def _measured(processor: Any, placeholder: str, size: tuple[int, int]) -> Footprint:
    inputs = processed(processor, Image.new("RGB", (size[1], size[0])))
    text = processor.replace_image_token(inputs, 0)
    tokens = text.count(placeholder)
    pixels, grids, sizes = (inputs.get(key) for key in ("pixel_values", "image_grid_thw", "image_sizes"))
    grid: tuple[int, ...] | None = None
    if grids is not None:
        grid = tuple(grids[0].tolist())
    elif pixels is not None and (squares := prod(pixels.shape[:-3])) > 1:
        grid = (squares, 1, max(1, tokens // squares))
    height_width = None if sizes is None else (int(sizes[0][0]), int(sizes[0][1]))
    return Footprint(text, tokens, grid, height_width)


def processed(processor: Any, image: Image.Image) -> dict[str, Tensor]:
    """What the image processor makes of one image."""
    return dict(processor.image_processor([image], return_tensors="pt"))
