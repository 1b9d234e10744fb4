"""How is a picture read? Its size from the header alone, and its pixels upright and in RGB."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from meshweave.errors import DataError


@dataclass(frozen=True)
class ImageFile:
    """A picture in a file, turned upright if its EXIF data says so (as transformers' `load_image` does)."""

    path: Path

    def size(self) -> tuple[int, int]:
        """(height, width) in pixels. Reads the header only. Raises `DataError` naming the path."""
        with self._opened() as image:
            width, height = image.size
            return (width, height) if _orientation(image) >= 5 else (height, width)  # 5 to 8: turned by 90°

    def load(self) -> Image.Image:
        """The decoded picture, RGB. Raises `DataError` naming the path."""
        with self._opened() as image:
            return (ImageOps.exif_transpose(image) if _orientation(image) != 1 else image).convert("RGB")

    @contextmanager
    def _opened(self) -> Iterator[Image.Image]:
        try:
            with Image.open(self.path) as image:
                yield image
        except FileNotFoundError as error:
            raise DataError(f"{self.path}: no such image; check the image folder and the name in the data file") from error
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, …
            raise DataError(f"{self.path}: the image is broken or cut off ({error}); replace the file") from error


def _orientation(image: Image.Image) -> int:
    # The base class's getexif: PNG's own would decode the pixels in search of late EXIF data.
    return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
