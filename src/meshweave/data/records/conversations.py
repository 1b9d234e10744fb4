"""LLaVA's and ShareGPT's form: `conversations` of turns with `from` and `value`; pictures in `image` or `images`."""

from pathlib import Path
from typing import Any

from meshweave.data.dataset import RawSample
from meshweave.data.records.fields import Fields, parsed, shown
from meshweave.data.records.messages import Turn, arguments, chat_turns, finish
from meshweave.errors import DataError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "function_call",
}


def read(fields: Fields, media: Path) -> RawSample:
    """A record of this form. Raises DataError."""
    turns = fields.take("conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"'conversations' must be a list of at least one turn, found {shown(turns)}", "form")
    if all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return finish(chat_turns(turns, media), fields, media)
    return finish([_turn(number, turn) for number, turn in enumerate(turns)], fields, media)


def _turn(number: int, turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise DataError(f"turn {number}: expected an object with 'from' and 'value', found {shown(turn)}", "form")
    given = Fields(turn)
    speaker, value, flag = given.take("from", "role"), given.take("value", "content"), given.flag()
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise DataError(f"turn {number}: unknown speaker {shown(speaker)}; use one of {', '.join(ROLES)}", "form")
    given.refuse_others(f"turn {number}: ")
    if ROLES[speaker] == "function_call":
        call = parsed(value, f"turn {number}: the call")
        calls = [arguments(number, each) for each in (call if isinstance(call, list) else [call])]
        return {"role": "assistant", "content": [], "tool_calls": calls}, flag, []
    return {"role": ROLES[speaker], "content": [_text(number, value)]}, flag, []


def _text(number: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, str):
        raise DataError(f"turn {number}: expected text, found {shown(value)}", "form")
    return {"type": "text", "text": value}
