"""Which pictures does a record name, and where in its text do they go?"""

import base64
import binascii
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from meshweave.data.dataset import MediaRef
from meshweave.data.media.image import ImageBytes, ImageFile
from meshweave.data.records.fields import Fields, shown
from meshweave.errors import DataError

MARK = "<image>"
_NUMBERED = re.compile(r"<image[_-]?(\d+)>")
_ALONE = re.compile(r"(?:^|\n)\s*<(image|video|audio)>|<(image|video|audio)>\s*(?:$|\n)")
"""A mark at the end of a line: it stands for a medium. Within one, it is spoken of."""

Part = dict[str, Any]


def take_pictures(fields: Fields, media: Path) -> list[MediaRef]:
    """The pictures that a record's own keys name. Raises DataError."""
    named = fields.take("image", "images")
    listed = [] if named is None else named if isinstance(named, list) else [named]
    return [picture(each, media) for each in listed if each is not None]


def picture(named: Any, media: Path) -> MediaRef:
    """What a path, a `file:` or base64 `data:` URL, bytes, or an object with `path`, `bytes` or `url` stands for.

    Raises:
        DataError: it is none of these.
    """
    if isinstance(named, dict):
        fields = Fields(named)
        data, path, url = fields.take("bytes"), fields.take("path", "file_name"), fields.take("url")
        fields.refuse_others("image: ")
        if data is not None:
            return picture(data, media) if isinstance(data, bytes) else ImageBytes(_decoded(data), str(path or "image"))
        named = path if path is not None else url
    if isinstance(named, (bytes, bytearray, memoryview)):
        return ImageBytes(bytes(named), "a picture in the record")
    if not isinstance(named, str) or not named.strip():
        raise DataError(f"a picture is named by a path, a URL or an object with 'path' or 'bytes', found {shown(named)}", "form")
    if named.startswith("data:"):
        head, _, body = named.partition(",")
        if not head.endswith(";base64"):
            raise DataError(f"a data URL must hold base64, found {shown(head)}", "form")
        return ImageBytes(_decoded(body), head)
    if named.startswith(("http://", "https://")):
        raise DataError(
            f"nothing is downloaded while training; save {shown(named)} as a file and name that", "unsupported medium"
        )
    if named.startswith("file:"):
        named = unquote(urlparse(named).path)
    return ImageFile(media / named)


def place(turns: Sequence[tuple[str, list[Part]]], pictures: Sequence[MediaRef]) -> list[list[Part]]:
    """The parts of every turn, with the pictures of the record where marks stand for them.

    Marks in what the assistant says are text; so are marks in a sentence of a record that names no picture.

    Args:
        turns: role and parts of each; parts of type "text" may hold marks, "image" is one.
        pictures: those that the record's own keys name.

    Raises:
        DataError: there are more or fewer marks than pictures, or a mark stands for what is not read.
    """
    asked = [text for role, parts in turns if role != "assistant" for text in _texts(parts)]
    if not pictures:
        for text in asked:
            if found := _ALONE.search(text):
                what = found.group(1) or found.group(2)
                if what == "image":
                    raise DataError(f"{MARK} stands for a picture, but the record names none", "form")
                raise DataError(f"<{what}> stands for what is not read; pictures and text are", "unsupported medium")
    parted = [
        [piece for part in parts for piece in (_split(part) if pictures and role != "assistant" else [part])]
        for role, parts in turns
    ]
    numbers = [part["number"] for parts in parted for part in parts if part.get("number")]
    if numbers and numbers != list(range(1, len(pictures) + 1)):
        raise DataError(f"marks are numbered {numbers}, but must count the {len(pictures)} pictures in their order", "form")
    marks = sum(part["type"] == "image" for parts in parted for part in parts)
    if marks != len(pictures):
        raise DataError(f"{marks} {MARK} marks in the text but {len(pictures)} images; write one {MARK} for each image", "form")
    return [[{key: value for key, value in part.items() if key != "number"} for part in parts] for parts in parted]


def _texts(parts: Sequence[Part]) -> list[str]:
    return [part["text"] for part in parts if part["type"] == "text"]


def _split(part: Part) -> list[Part]:
    """Text with marks → parts, less the line breaks around marks: the chat template writes its own."""
    if part["type"] != "text":
        return [part]
    text = part["text"]
    marks = re.findall(rf"{MARK}|{_NUMBERED.pattern}", text)
    pieces = re.split(rf"{MARK}|<image[_-]?\d+>", text)
    if len(pieces) == 1:
        return [part]
    parts: list[Part] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image"} | ({"number": int(marks[number - 1])} if marks[number - 1] else {}))
        if stripped := piece.strip("\n"):
            parts.append({"type": "text", "text": stripped})
    return parts


def _decoded(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise DataError(f"a picture's base64 text cannot be decoded ({error})", "broken file") from None
