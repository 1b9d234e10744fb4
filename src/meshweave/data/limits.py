"""What do the limits of a run file do to a sample? Pictures change their size, samples are cut or left out; each is counted."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from meshweave.config import DataConfig
from meshweave.data.dataset import MediaRef
from meshweave.errors import LeftOutError

Size = tuple[int, int]
"""(height, width) in pixels."""

CUT, REDUCED, ENLARGED, REDUCED_TOGETHER = (
    "texts cut to data.max_length",
    "pictures reduced to data.max_pixels",
    "pictures enlarged to data.min_pixels",
    "samples whose pictures are reduced to data.max_sample_pixels",
)
"""What limits do, by the words of reports."""


@dataclass(frozen=True)
class Resized:
    """A picture that is read in another size."""

    picture: MediaRef
    target: Size

    def size(self) -> Size:
        """(height, width) in pixels."""
        return self.target

    def load(self) -> Image.Image:
        """The decoded picture in that size, in RGB. Raises as the picture's own."""
        height, width = self.target
        return self.picture.load().resize((width, height), Image.Resampling.BICUBIC)


def bounded(sizes: Sequence[Size], limits: DataConfig) -> tuple[list[Size], list[str]]:
    """Sizes of a sample's pictures within the limits, and what these did.

    Raises:
        LeftOutError: there are more pictures than `max_images`.
    """
    if limits.max_images is not None and len(sizes) > limits.max_images:
        raise LeftOutError(f"it has {len(sizes)} pictures, more than data.max_images={limits.max_images}", "too many images")
    effects = []
    found = []
    for size in sizes:
        pixels = size[0] * size[1]
        if limits.max_pixels is not None and pixels > limits.max_pixels:
            size = _scaled(size, limits.max_pixels / pixels, limits.max_pixels)
            effects.append(REDUCED)
        elif limits.min_pixels is not None and pixels < limits.min_pixels:
            size = _scaled(size, limits.min_pixels / pixels)
            effects.append(ENLARGED)
        found.append(size)
    together = sum(height * width for height, width in found)
    if limits.max_sample_pixels is not None and together > limits.max_sample_pixels:
        found = [_scaled(size, limits.max_sample_pixels / together, size[0] * size[1]) for size in found]
        effects.append(REDUCED_TOGETHER)
    return found, effects


def resized(pictures: Sequence[MediaRef], sizes: Sequence[Size]) -> list[MediaRef]:
    """The pictures in these sizes."""
    return [picture if picture.size() == size else Resized(picture, size) for picture, size in zip(pictures, sizes, strict=True)]


def _scaled(size: Size, factor: float, most: int | None = None) -> Size:
    """Both sides by the same, in whole pixels; to at most so many pixels where that is said, else to no fewer than asked for."""
    side = factor**0.5
    if most is None:
        return tuple(max(1, -int(-each * side // 1)) for each in size)  # type: ignore[return-value]
    height, width = (max(1, int(each * side)) for each in size)
    return height, width
