"""OpenAI's form: `messages` with `role` and `content`, a text or parts; pictures in parts, or in `images` with marks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meshweave.data.dataset import MediaRef, RawSample
from meshweave.data.records.fields import UNSUPPORTED, Fields, parsed, shown, tools_of
from meshweave.data.records.pictures import picture, place, take_pictures
from meshweave.errors import DataError

ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system", "tool": "tool", "function": "tool"}
Turn = tuple[dict[str, Any], bool | None, list[MediaRef]]
"""A message, whether the record says that it is a target, and the pictures that its own parts name."""


def read(fields: Fields, media: Path) -> RawSample:
    """A record of this form. Raises DataError."""
    given = fields.take("messages")
    if not isinstance(given, list) or not given:
        raise DataError(f"'messages' must be a list of at least one turn, found {shown(given)}", "form")
    return finish(chat_turns(given, media), fields, media)


def chat_turns(given: Sequence[Any], media: Path) -> list[Turn]:
    """Turns with `role` and `content`. Raises DataError."""
    return [_turn(number, turn, media) for number, turn in enumerate(given)]


def finish(turns: Sequence[Turn], fields: Fields, media: Path) -> RawSample:
    """A sample of these turns, and of what else the record's keys say. Raises DataError."""
    turns = list(turns)
    if (system := fields.take("system")) is not None:
        if not isinstance(system, str):
            raise DataError(f"'system' must be a text, found {shown(system)}", "form")
        turns.insert(0, ({"role": "system", "content": [{"type": "text", "text": system}]}, None, []))
    tools = tools_of(fields)
    named, in_parts = take_pictures(fields, media), [ref for _, _, refs in turns for ref in refs]
    if named and in_parts:
        raise DataError("pictures are named both in parts and by the record; leave one", "form")
    messages = [message for message, _, _ in turns]
    if in_parts:
        marks = sum(part["type"] == "image" for message in messages for part in message["content"])
        if marks != len(in_parts):
            raise DataError(f"{marks} parts are images, but only {len(in_parts)} of them name one", "form")
    else:
        placed = place([(message["role"], message["content"]) for message in messages], named)
        messages = [message | {"content": parts} for message, parts in zip(messages, placed, strict=True)]
    flags = {number: flag for number, (_, flag, _) in enumerate(turns) if flag is not None}
    return RawSample(messages, named or in_parts, tools, flags)


def arguments(number: int, call: Any) -> dict[str, Any]:
    """A tool call as chat templates take it: arguments as an object. Raises DataError."""
    if isinstance(call, dict):
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            given = parsed(function.get("arguments", function.get("parameters", {})), f"turn {number}: arguments of a call")
            return {"type": "function", "function": {"name": function["name"], "arguments": given}}
    raise DataError(f"turn {number}: a call needs a 'name' and 'arguments', found {shown(call)}", "form")


def _turn(number: int, turn: Any, media: Path) -> Turn:
    where = f"turn {number}: "
    if not isinstance(turn, dict):
        raise DataError(f"{where}expected an object with 'role' and 'content', found {shown(turn)}", "form")
    given = Fields(turn)
    role, content, flag = given.take("role"), given.take("content"), given.flag()
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where}unknown role {shown(role)}; use one of {', '.join(ROLES)}", "form")
    message: dict[str, Any] = {"role": ROLES[role]}
    refs: list[MediaRef] = []
    calls = given.take("tool_calls")
    if calls:
        message["tool_calls"] = [arguments(number, call) for call in calls]
    if (reasoning := given.take("reasoning_content", "reasoning")) is not None:
        message["reasoning_content"] = reasoning
    for key in ("name", "tool_call_id"):
        if (value := given.take(key)) is not None:
            message[key] = value
    given.refuse_others(where)
    if isinstance(content, str):
        message["content"] = [{"type": "text", "text": content}]
    elif isinstance(content, list):
        message["content"] = [_part(where, part, media, refs) for part in content]
    elif content is None and calls:
        message["content"] = []
    else:
        raise DataError(f"{where}expected a text or parts, found {shown(content)}", "form")
    return message, flag, refs


def _part(where: str, part: Any, media: Path, refs: list[MediaRef]) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise DataError(f"{where}unknown part {shown(part)}", "form")
    given = Fields(part)
    kind = given.take("type", default="text" if given.has("text") else "image" if given.has("image") else None)
    if kind == "text":
        text = given.take("text")
        if not isinstance(text, str):
            raise DataError(f"{where}a part's text must be a text, found {shown(text)}", "form")
        given.refuse_others(where)
        return {"type": "text", "text": text}
    if kind in ("image", "image_url", "input_image"):
        named = given.take("image", "image_url", "path", "url", "bytes")
        if isinstance(named, dict) and "detail" in named:
            named = {key: value for key, value in named.items() if key != "detail"}  # how closely OpenAI's models look
        given.refuse_others(where)
        if named is not None:
            refs.append(picture(named, media))
        return {"type": "image"}
    if str(kind).removesuffix("_url").removeprefix("input_") in UNSUPPORTED:
        raise DataError(
            f"{where}a part of type {kind!r}: pictures and text are read; take such records out", "unsupported medium"
        )
    raise DataError(f'{where}unknown part {shown(part)}; use {{"type": "text", "text": …}} or {{"type": "image", …}}', "form")
