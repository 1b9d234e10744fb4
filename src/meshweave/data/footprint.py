"""What does an image take in the text and in the encoder? From its size alone, by the processor's own arithmetic."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from PIL import Image
from torch import Tensor

from meshweave.errors import DataError

PROBES = ((1, 1), (3, 50), (313, 1), (64, 64), (48, 112), (1, 5000), (900, 1200), (2100, 1500))
"""(height, width) of blank images that a processor's arithmetic is checked with: where bounds bite."""

MOST_ELONGATED = 200
"""Times as long as wide that a picture may be: the bound of the Qwen-VL families. Others enlarge the short side to a fixed number
of pixels, so that a picture of 1 × 5,000 would take gigabytes."""


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


FootprintOf = Callable[[tuple[int, int]], Footprint]


def process_image(processor: Any, image: Image.Image, placeholder: str) -> tuple[dict[str, Tensor], Footprint]:
    """What the processor makes of one image, as in a sample that has no other, and what it takes.

    Raises:
        DataError: the processor refuses the image, whatever it raises; or it is too elongated.
    """
    _require_shape((image.height, image.width))
    try:
        # As the processor's own call: with the options of its class, which differ from those of its image processor.
        options = processor._merge_kwargs(return_tensors="pt")["images_kwargs"]
        found, (text,) = processor._process_images([image], **options)
    except Exception as error:
        raise DataError(_refused(processor, (image.height, image.width), error), "processor") from error
    raw = dict(found)
    tokens = text.count(placeholder)
    pixels, grids, sizes = (raw.get(key) for key in ("pixel_values", "image_grid_thw", "image_sizes"))
    grid: tuple[int, ...] | None = None
    if grids is not None:
        grid = tuple(grids[0].tolist())
    elif pixels is not None and (squares := prod(pixels.shape[:-3])) > 1:
        grid = (squares, 1, max(1, tokens // squares))
    size = None if sizes is None else (int(sizes[0][0]), int(sizes[0][1]))
    return raw, Footprint(text, tokens, grid, size)


def footprint_of(processor: Any, placeholder: str) -> FootprintOf:
    """Of (height, width): by the processor's arithmetic if that holds for all `PROBES`, else it is shown a blank image.

    What is returned raises DataError where the processor refuses a size.
    """

    def measured(size: tuple[int, int]) -> Footprint:
        return process_image(processor, Image.new("RGB", (size[1], size[0])), placeholder)[1]

    shown = {size: _or_refusal(measured, size) for size in PROBES}
    computed = _arithmetic(processor, placeholder, next((found for found in shown.values() if found is not None), None))
    if computed is not None and all(_or_refusal(computed, size) == found for size, found in shown.items()):
        return computed
    return measured


def _arithmetic(processor: Any, placeholder: str, example: Footprint | None) -> FootprintOf | None:
    """By the numbers that the processor gives for a size; None where what it writes is no unbroken run of placeholders."""
    if example is None or not example.tokens or placeholder * example.tokens not in example.text:
        return None
    before, _, after = example.text.partition(placeholder * example.tokens)
    images = processor.image_processor
    resize = getattr(inspect.getmodule(type(images)), "smart_resize", None)  # the Qwen-VL families

    def computed(size: tuple[int, int]) -> Footprint:
        _require_shape(size)
        grid: tuple[int, ...] | None = None
        try:
            numbers = processor._get_num_multimodal_tokens(image_sizes=[list(size)])
            tokens, squares = int(numbers.num_image_tokens[0]), int(numbers.num_image_patches[0])
            if resize is not None:
                bounds = {"min_pixels": images.size["shortest_edge"], "max_pixels": images.size["longest_edge"]}
                height, width = resize(*size, factor=images.patch_size * images.merge_size, **bounds)
                grid = (1, height // images.patch_size, width // images.patch_size)
            elif squares > 1:
                grid = (squares, 1, max(1, tokens // squares))
        except Exception as error:
            raise DataError(_refused(processor, size, error), "processor") from error
        return Footprint(before + placeholder * tokens + after, tokens, grid, size if example.size is not None else None)

    return computed


def _or_refusal(footprint: FootprintOf, size: tuple[int, int]) -> Footprint | None:
    try:
        return footprint(size)
    except DataError:
        return None


def _require_shape(size: tuple[int, int]) -> None:
    if max(size) > MOST_ELONGATED * min(size):
        why = f"more than {MOST_ELONGATED} times as long as wide; cut it, or take its sample out"
        raise DataError(f"a picture {size[1]} wide and {size[0]} high is {why}", "processor")


def _refused(processor: Any, size: tuple[int, int], error: Exception) -> str:
    name = type(processor.image_processor).__name__
    return f"a picture {size[1]} wide and {size[0]} high is refused by {name} ({type(error).__name__}: {error})"
