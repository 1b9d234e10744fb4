"""How is a LLaVA-style JSON or JSONL file with an image folder read?"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from meshweave.data.dataset import RawSample
from meshweave.data.media.image import ImageFile
from meshweave.errors import DataError

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class LlavaJson:
    """A `Source` over a JSON list, or JSONL with one entry a line, and the folder its image names are in.

    An entry is `{"conversations": [{"from": "human" | "gpt", "value": "<image>\\n…"}], "image": name or
    names}` or `{"messages": [{"role": …, "content": str | parts}], "images": [name, …]}`. `<image>` in a
    text, or a part `{"type": "image"}`, marks where an image goes; there must be as many marks as images.

    Every entry's form is checked at once, no image is opened. Raises `DataError` naming file, entry, value,
    fix.
    """

    def __init__(self, file: Path | str, images: Path | str | None = None) -> None:
        self.file = Path(file)
        self.images = Path(images) if images is not None else self.file.parent
        self._entries: list[bytes] = []  # as JSON: a quarter of the memory that the parsed entries would take
        for where, text, entry in _read(self.file):
            self._parse(where, entry)
            self._entries.append(text.encode())
        if not self._entries:
            raise DataError(f"{self.file}: holds no entries; give it at least one conversation")

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> RawSample:
        return self._parse(f"{self.file}: entry {index}", json.loads(self._entries[index]))

    def _parse(self, where: str, entry: Any) -> RawSample:
        try:
            turns = _turns(entry)
            messages = [_message(number, turn) for number, turn in enumerate(turns)]
            names = _image_names(entry)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        marks = sum(part["type"] == "image" for message in messages for part in message["content"])
        if marks != len(names):
            raise DataError(
                f"{where}: {marks} {PLACEHOLDER} marks in the text but {len(names)} images {names}; "
                f"write one {PLACEHOLDER} for each image"
            )
        return RawSample(messages, [ImageFile(self.images / name) for name in names])


def _read(file: Path) -> Iterator[tuple[str, str, Any]]:
    """(where it stands, its JSON, the entry) of every entry: "file: entry i", or "file:line" for JSONL."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{file}: no such data file; check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text ({error}); give a JSON or JSONL file") from error
    if text.lstrip().startswith("["):
        for number, entry in enumerate(_decode(text, str(file))):
            yield f"{file}: entry {number}", json.dumps(entry), entry
        return
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{file}:{number}", line, _decode(line, f"{file}:{number}")


def _decode(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON at line {error.lineno}, column {error.colno} of it ({error.msg}); "
            "expected a JSON list of entries, or JSONL with one entry a line"
        ) from error


def _turns(entry: Any) -> Sequence[Any]:
    if not isinstance(entry, dict):
        raise DataError(f"expected an object with 'conversations', found {_shown(entry)}")
    turns = entry.get("conversations", entry.get("messages"))
    if not isinstance(turns, list) or not turns:
        keys = ", ".join(entry) or "none"
        raise DataError(f"no list of 'conversations' or 'messages' (keys: {keys}); add one with at least one turn")
    return turns


def _message(number: int, turn: Any) -> dict[str, Any]:
    """One turn of either form → a chat message whose content is a list of parts."""
    if not isinstance(turn, dict):
        raise DataError(f"turn {number}: expected an object with 'from' and 'value', found {_shown(turn)}")
    role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if role not in ROLES:
        raise DataError(f"turn {number}: unknown speaker {_shown(role)}; use one of {', '.join(ROLES)}")
    if isinstance(content, str):
        return {"role": ROLES[role], "content": _split(content)}
    if not isinstance(content, list):
        raise DataError(f"turn {number}: expected text, found {_shown(content)}")
    return {"role": ROLES[role], "content": [part for given in content for part in _part(number, given)]}


def _part(number: int, part: Any) -> list[dict[str, str]]:
    match part:
        case {"type": "text", "text": str(text)}:
            return _split(text)
        case {"type": "image"}:
            return [{"type": "image"}]
    raise DataError(f'turn {number}: unknown part {_shown(part)}; use {{"type": "text", "text": …}}, {{"type": "image"}}')


def _split(text: str) -> list[dict[str, str]]:
    """Text with marks → parts, less the line breaks around marks: the chat template writes its own."""
    pieces = text.split(PLACEHOLDER)
    if len(pieces) == 1:
        return [{"type": "text", "text": text}]
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image"})
        if stripped := piece.strip("\n"):
            parts.append({"type": "text", "text": stripped})
    return parts


def _image_names(entry: Mapping[str, Any]) -> list[str]:
    names = entry.get("image", entry.get("images"))
    listed = [] if names is None else names if isinstance(names, list) else [names]
    if wrong := [name for name in listed if not isinstance(name, str) or not name]:
        raise DataError(f"'image' must be a file name or a list of file names, found {_shown(wrong[0])}")
    return listed


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
