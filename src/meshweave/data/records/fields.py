"""Which keys of a record are used? All, or the others are refused by name; null is as if it were not there."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from meshweave.errors import DataError

BOOKKEEPING = frozenset(
    {"id", "idx", "index", "uid", "uuid", "sample_id", "question_id", "image_id", "source", "dataset", "data_source", "split"}
    | {"category", "type", "task", "topic", "lang", "language", "width", "height", "metadata", "meta", "license", "url"}
)
"""Keys at the top of a record that say where it comes from: nothing to learn from, so nothing reads them."""
UNSUPPORTED = {"video": "videos", "videos": "videos", "audio": "sounds", "audios": "sounds"}
_FLAGS = ("loss", "loss_mask", "trainable", "train", "weight")


class Fields:
    """A mapping whose keys are taken one by one. State: those that nobody has taken."""

    def __init__(self, tree: Mapping[str, Any], ignored: Sequence[str] = ()) -> None:
        self._left = {key: value for key, value in tree.items() if value is not None}
        self._ignored = frozenset(ignored)

    def has(self, key: str) -> bool:
        """Whether the key is there, and not taken yet."""
        return key in self._left

    def take(self, *keys: str, default: Any = None) -> Any:
        """The value of the one of these keys that is there.

        Raises:
            DataError: several are.
        """
        found = [key for key in keys if key in self._left]
        if len(found) > 1:
            raise DataError(f"both {' and '.join(map(repr, found))} are there; leave one", "form")
        return self._left.pop(found[0]) if found else default

    def flag(self) -> bool | None:
        """Whether a turn is a target, where one of the usual keys says so.

        Raises:
            DataError: it says neither yes nor no.
        """
        value = self.take(*_FLAGS)
        if value is None:
            return None
        if isinstance(value, (bool, int, float)) and value in (0, 1):
            return bool(value)
        raise DataError(f"a flag of a turn ({', '.join(_FLAGS)}) is true, false, 1 or 0, found {shown(value)}", "form")

    def refuse_unsupported(self) -> None:
        """Raises DataError for media that are not read."""
        for key, what in UNSUPPORTED.items():
            if self.has(key) and key not in self._ignored:
                raise DataError(
                    f"{key!r}: {what} are not read, pictures and text are; take such records out", "unsupported medium"
                )

    def refuse_others(self, where: str = "") -> None:
        """Raises DataError for a key that nobody has taken, but those of bookkeeping at the top of a record."""
        left = [key for key in self._left if key not in self._ignored and (where or key not in BOOKKEEPING)]
        if not left:
            return
        keys = ", ".join(repr(key) for key in left)
        raise DataError(f"{where}nothing reads {keys}; take it out, or name it in data.ignore_keys", "unknown key")


def refuse_broken_text(value: Any) -> None:
    """Raises DataError for halves of surrogate pairs, which JSON can write and no tokenizer reads."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise DataError(
                f"a text holds {half}, half of a surrogate pair, which is no character; mend the export", "form"
            ) from None
    elif isinstance(value, dict):
        for each in (*value, *value.values()):
            refuse_broken_text(each)
    elif isinstance(value, list):
        for each in value:
            refuse_broken_text(each)


def parsed(value: Any, what: str) -> Any:
    """JSON that some tools write as a text. Raises DataError."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except json.JSONDecodeError as error:
        raise DataError(f"{what} is no JSON ({error.msg}): {shown(value)}", "form") from None


def tools_of(fields: Fields) -> list[Any]:
    """The descriptions of tools of a record. Raises DataError."""
    tools = parsed(fields.take("tools", "functions"), "'tools'")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"'tools' must be a list of descriptions, found {shown(tools)}", "form")
    return tools or []


def shown(value: Any) -> str:
    """A value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
