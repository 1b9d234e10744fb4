"""ms-swift's and Alpaca's form: `query` and `response`, earlier rounds in `history`, pictures in `images` with marks."""

from pathlib import Path
from typing import Any

from meshweave.data.dataset import RawSample
from meshweave.data.records.fields import Fields, shown
from meshweave.data.records.messages import Turn, finish
from meshweave.errors import DataError


def read(fields: Fields, media: Path) -> RawSample:
    """A record of this form. Raises DataError."""
    query, response, history = fields.take("query"), fields.take("response"), fields.take("history", default=[])
    if not isinstance(history, list) or not all(isinstance(round_, list) and len(round_) == 2 for round_ in history):
        raise DataError(f"'history' must be a list of [query, response], found {shown(history)}", "form")
    turns: list[Turn] = []
    for asked, answered in (*history, (query, response)):
        turns.append(_turn("user", "query", asked))
        if answered is not None:
            turns.append(_turn("assistant", "response", answered))
    return finish(turns, fields, media)


def _turn(role: str, key: str, value: Any) -> Turn:
    if not isinstance(value, str):
        raise DataError(f"{key!r} must be a text, found {shown(value)}", "form")
    return {"role": role, "content": [{"type": "text", "text": value}]}, None, []
