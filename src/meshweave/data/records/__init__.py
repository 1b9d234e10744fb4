"""What does a record mean? One file a form in which tools write conversations; every key is used, or refused by name."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from meshweave.data.dataset import RawSample
from meshweave.data.records import conversations, messages, query_response
from meshweave.data.records.fields import Fields, refuse_broken_text, shown
from meshweave.errors import DataError

FORMS: dict[str, tuple[str, Callable[[Fields, Path], RawSample]]] = {
    "conversations": ("conversations", conversations.read),
    "messages": ("messages", messages.read),
    "query_response": ("query", query_response.read),
}
"""Form → the key that tells it, and how it is read."""


def read_record(record: Any, form: str, media: Path, ignored: Sequence[str] = ()) -> RawSample:
    """One record, in the one form that everything behind it knows.

    Args:
        form: one of `FORMS`, or "auto": told by the record's keys.
        media: the folder that names of pictures are relative to.
        ignored: keys that may stand there although nothing reads them.

    Raises:
        DataError: it is no record, or of no known form; a key is unknown; turns, marks or media are wrong.
    """
    if not isinstance(record, dict):
        raise DataError(f"expected an object with keys, found {shown(record)}", "form")
    refuse_broken_text(record)
    fields = Fields(record, ignored)
    name = form if form != "auto" else next((name for name, (key, _) in FORMS.items() if fields.has(key)), None)
    if name is None:
        keys = ", ".join(map(str, record)) or "none"
        wanted = ", ".join(f"'{key}'" for key, _ in FORMS.values())
        raise DataError(f"none of the keys {wanted}, by which a record's form is told (keys: {keys})", "form")
    fields.refuse_unsupported()
    sample = FORMS[name][1](fields, media)
    fields.refuse_others()
    return sample
