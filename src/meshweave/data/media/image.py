"""How is a picture read? Its size from the header alone, and its pixels upright and in RGB, without losing what it shows."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from meshweave.errors import DataError


class Picture(ABC):
    """A picture that Pillow opens, turned upright if its EXIF data says so (as transformers' `load_image` does)."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What messages call it."""

    @abstractmethod
    def _open(self) -> Any:
        """What Pillow opens."""

    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of what `load` returns. Reads the header only. Raises `DataError` naming the picture."""
        with self._opened() as image:
            return _upright_size(image)

    def load(self) -> Image.Image:
        """The decoded picture, RGB; of several frames the first. Raises `DataError` naming the picture."""
        with self._opened() as image:
            planned = _upright_size(image)
            found = to_rgb(ImageOps.exif_transpose(image) if _orientation(image) > 1 else image)
            if (found.height, found.width) != planned:  # some formats hold several sizes
                raise DataError(f"its header says {planned}, its pixels are {found.height} x {found.width}", "broken file")
            return found

    @contextmanager
    def _opened(self) -> Iterator[Image.Image]:
        try:
            with Image.open(self._open()) as image:
                if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                    raise Image.DecompressionBombError
                yield image
        except FileNotFoundError as error:
            why = f"{self.name}: no such image; check the image folder and the name in the data file"
            raise DataError(why, "missing file") from error
        except DataError as error:
            raise DataError(f"{self.name}: {error}", error.kind) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            why = f"{self.name}: has more pixels than Pillow takes for safe ({Image.MAX_IMAGE_PIXELS:,}); reduce it"
            raise DataError(why, "broken file") from error
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error, …
            why = f"{self.name}: the image is broken or cut off ({error}); replace the file"
            raise DataError(why, "broken file") from error


@dataclass(frozen=True)
class ImageFile(Picture):
    """A picture in a file."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def _open(self) -> Any:
        return self.path


@dataclass(frozen=True)
class ImageBytes(Picture):
    """A picture that stands in a record itself."""

    data: bytes
    called: str

    @property
    def name(self) -> str:
        return self.called

    def _open(self) -> Any:
        return BytesIO(self.data)


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in 8-bit RGB, with what it shows.

    Transparent pictures are laid on white. Grey levels of 16 bits are divided by 257. 32-bit integers and floats are taken as
    8-bit levels, 16-bit ones or (floats) shares of 1 if they lie in that range and are scaled from their least to their largest
    value otherwise.

    Raises:
        DataError: levels that are not finite, or pixels of which no RGB can be made.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bit(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise DataError(f"its pixels are of mode {image.mode}, of which no RGB can be made", "unsupported medium") from error


def _eight_bit(levels: np.ndarray) -> np.ndarray:
    values = levels.astype(np.float64)
    if not np.isfinite(values).all():
        raise DataError(
            "it has levels that are not finite, so there is nothing to scale them by; replace the file", "broken file"
        )
    least, most = float(values.min()), float(values.max())
    if levels.dtype.kind == "u":  # of 16 bits, in either order of bytes
        scaled = values / 257
    elif levels.dtype.kind == "f" and least >= 0 and most <= 1:
        scaled = values * 255
    elif least >= 0 and most <= 255:
        scaled = values
    elif least >= 0 and most <= 65535 and levels.dtype.kind != "f":
        scaled = values / 257
    else:
        scaled = (values - least) * (255 / ((most - least) or 1))
    return np.round(scaled).astype(np.uint8)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (width, height) if _orientation(image) >= 5 else (height, width)  # 5 to 8: turned by 90°


def _orientation(image: Image.Image) -> int:
    """2 to 8: how a picture is to be turned; other values mean nothing and leave it as it is."""
    if image.format == "TIFF":  # Pillow turns these itself, the size in the header included
        return 1
    # The base class's getexif: PNG's own would decode the pixels in search of late EXIF data.
    found = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return found if isinstance(found, int) and 1 <= found <= 8 else 1
