"""A picture's size is that of its pixels, and its pixels show what it shows."""

import io
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from meshweave.data.media.image import ImageBytes, ImageFile, to_rgb
from meshweave.errors import DataError

WIDE = Image.fromarray(np.arange(60 * 40, dtype=np.uint8).reshape(40, 60))


def turned(orientation: int, form: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    WIDE.save(out, form, exif=exif)
    return out.getvalue()


def jpeg(orientation: int) -> bytes:
    return turned(orientation, "JPEG")


@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 256, 65535])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_size_from_the_header_is_that_of_the_pixels_also_where_exif_means_nothing(form: str, orientation: int) -> None:
    content = turned(orientation, form)
    picture = ImageBytes(content, "x.jpg")
    loaded = picture.load()
    assert picture.size() == (loaded.height, loaded.width) == ((60, 40) if 5 <= orientation <= 8 else (40, 60))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert np.array_equal(np.asarray(loaded), np.asarray(upright))


def test_a_picture_whose_pixels_are_not_of_the_size_in_its_header_is_refused() -> None:
    out = io.BytesIO()
    WIDE.save(out, "TIFF", tiffinfo={700: b'<x:xmpmeta tiff:Orientation="6"/>'})  # which Pillow sees only when it decodes
    with pytest.raises(DataError, match=r"x\.tiff: its header says \(40, 60\), its pixels are 60 x 40") as caught:
        ImageBytes(out.getvalue(), "x.tiff").load()
    assert caught.value.kind == "broken file"


def levels(image: Image.Image) -> list[int]:
    return np.asarray(to_rgb(image))[..., 0].flatten().tolist()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[5000, 20000, 40000]], dtype=np.uint16), [19, 78, 156]),
        (np.array([[0, 65535]], dtype=np.uint16), [0, 255]),
        (np.array([[0, 255]], dtype=">u2"), [0, 1]),
        (np.array([[-7, -7]], dtype=np.int32), [0, 0]),
        (np.array([[0, 128, 255]], dtype=np.int32), [0, 128, 255]),
        (np.array([[0, 257, 65535]], dtype=np.int32), [0, 1, 255]),
        (np.array([[-100, 100_000]], dtype=np.int32), [0, 255]),
        (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 200.0]], dtype=np.float32), [0, 100, 200]),
        (np.array([[-1.0, 0.0, 3.0]], dtype=np.float32), [0, 64, 255]),
    ],
)
def test_levels_of_more_than_eight_bits_keep_their_order(values: np.ndarray, expected: list[int]) -> None:
    assert levels(Image.fromarray(values)) == expected


def test_levels_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, math.nan]], dtype=np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(DataError, match=r"x\.tiff: it has levels that are not finite") as caught:
        ImageFile(tmp_path / "x.tiff").load()
    assert caught.value.kind == "broken file"


def drawn(mode: str) -> Image.Image:
    """A black stroke on transparent ground."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (2, 0, 4, 8))
    return image if mode == "RGBA" else image.convert("LA") if mode == "LA" else image.quantize()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pictures_lie_on_white(mode: str, tmp_path: Path) -> None:
    drawn(mode).save(tmp_path / "x.png")
    pixels = np.asarray(ImageFile(tmp_path / "x.png").load())
    assert (pixels[:, 2:4] == 0).all()
    assert (pixels[:, 4:] == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb_of_the_same_size(mode: str) -> None:
    image = Image.new("I;16", (5, 3)) if mode == "I;16" else WIDE.convert(mode).resize((5, 3))
    assert (to_rgb(image).mode, to_rgb(image).size) == ("RGB", (5, 3))


def test_of_several_frames_the_first_is_read() -> None:
    out = io.BytesIO()
    Image.new("L", (4, 4), 10).save(out, "GIF", save_all=True, append_images=[Image.new("L", (4, 4), 200)])
    assert np.asarray(ImageBytes(out.getvalue(), "x.gif").load()).max() <= 10


@pytest.mark.parametrize(
    ("content", "kind"), [(None, "missing file"), (b"", "broken file"), (jpeg(1)[:300], "broken file"), (b"text", "broken file")]
)
def test_what_cannot_be_read_is_named_with_its_kind(content: bytes | None, kind: str, tmp_path: Path) -> None:
    file = tmp_path / "x.jpg"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.jpg: ") as caught:
        ImageFile(file).load()
    assert caught.value.kind == kind


@pytest.mark.parametrize("most", [100, 2000])  # of which Pillow itself would refuse the first, and warn of the second
def test_a_picture_too_large_to_be_decoded_safely_is_refused(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for read in (ImageBytes.size, ImageBytes.load):
            with pytest.raises(DataError, match=rf"x\.jpg: has more pixels than Pillow takes for safe \({most:,}\)"):
                read(ImageBytes(jpeg(1), "x.jpg"))
