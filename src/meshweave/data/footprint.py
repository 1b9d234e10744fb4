"""What does an image take in the text and in the encoder? From its size alone, by the processor's own arithmetic."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from PIL import Image
from torch import Tensor

from meshweave.data.outlines import outline_of
from meshweave.errors import DataError, cause

PROBES = ((1, 1), (3, 50), (313, 1), (64, 64), (48, 112), (900, 1200), (2100, 1500))
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
    size = (image.height, image.width)
    _require_shape(size)
    try:
        found, (text,) = processor._process_images([image], **_options(processor))
    except Exception as error:
        raise _refusal(processor, size, error) from error
    return dict(found), _footprint(found, text, placeholder)


def footprint_of(processor: Any, placeholder: str) -> FootprintOf:
    """Of (height, width): by its image processor's arithmetic if that holds for all `PROBES`, else it is shown a blank image.

    What is returned raises DataError where the processor refuses a size.
    """
    outline, options = outline_of(processor), _options(processor)

    def measured(size: tuple[int, int]) -> Footprint:
        return process_image(processor, Image.new("RGB", (size[1], size[0])), placeholder)[1]

    def computed(size: tuple[int, int]) -> Footprint:
        _require_shape(size)
        assert outline is not None
        try:
            found = outline(processor, options, *size)
            return _footprint(found, processor.replace_image_token(found, 0), placeholder)
        except Exception as error:
            raise _refusal(processor, size, error) from error

    holds = outline is not None and all(_or_refusal(computed, size) == _or_refusal(measured, size) for size in PROBES)
    return computed if holds else measured


def _options(processor: Any) -> dict[str, Any]:
    """Those of the processor's own call, which differ from those of its image processor alone."""
    options: dict[str, Any] = processor._merge_kwargs(tokenizer_init_kwargs=processor.tokenizer.init_kwargs, return_tensors="pt")[
        "images_kwargs"
    ]
    return options


def _footprint(found: Mapping[str, Any], text: str, placeholder: str) -> Footprint:
    """`found`: what an image processor returns of one image; of its pixels, the shape."""
    tokens = text.count(placeholder)
    pixels, grids, sizes = (found.get(key) for key in ("pixel_values", "image_grid_thw", "image_sizes"))
    grid: tuple[int, ...] | None = None
    if grids is not None:
        grid = tuple(grids[0].tolist())
    elif pixels is not None and (squares := prod(pixels.shape[:-3])) > 1:
        grid = (squares, 1, max(1, tokens // squares))
    return Footprint(text, tokens, grid, None if sizes is None else (int(sizes[0][0]), int(sizes[0][1])))


def _or_refusal(footprint: FootprintOf, size: tuple[int, int]) -> Footprint | None:
    try:
        return footprint(size)
    except DataError:
        return None


def _require_shape(size: tuple[int, int]) -> None:
    if max(size) > MOST_ELONGATED * min(size):
        why = f"more than {MOST_ELONGATED} times as long as wide; cut it, or take its sample out"
        raise DataError(f"a picture {size[1]} wide and {size[0]} high is {why}", "processor")


def _refusal(processor: Any, size: tuple[int, int], error: Exception) -> DataError:
    name = type(processor.image_processor).__name__
    return DataError(f"a picture {size[1]} wide and {size[0]} high is refused by {name} ({cause(error)})", "processor")
