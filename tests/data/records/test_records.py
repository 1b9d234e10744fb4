"""Every form becomes the one internal form; every key is used or refused; every medium is read or named as missing."""

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from meshweave.data.dataset import RawSample
from meshweave.data.media.image import ImageBytes, ImageFile
from meshweave.data.records import read_record
from meshweave.errors import DataError

IMAGES = Path("/images")
IMAGE = {"type": "image"}
SAID = [{"type": "text", "text": "A cat."}]


def read(record: Any, form: str = "auto", ignored: tuple[str, ...] = ()) -> RawSample:
    return read_record(record, form, IMAGES, ignored)


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 6)).save(out, "PNG")
    return out.getvalue()


DATA_URL = "data:image/png;base64," + base64.b64encode(png()).decode()
ASKED = {"from": "human", "value": "<image>\nWhat?"}
ANSWERED = {"from": "gpt", "value": "A cat."}
CHAT_ANSWERED = {"role": "assistant", "content": "A cat."}


def asked_with(*parts: Any, **keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, CHAT_ANSWERED], **keys}


ONE_PICTURE: dict[str, dict[str, Any]] = {
    "llava": {"image": "a.png", "conversations": [ASKED, ANSWERED]},
    "llava, bookkeeping": {"id": "7", "source": "coco", "image": "a.png", "conversations": [ASKED, ANSWERED]},
    "a list of one": {"images": ["a.png"], "conversations": [ASKED, ANSWERED]},
    "null beside it": {"image": None, "images": ["a.png"], "conversations": [ASKED, ANSWERED], "video": None},
    "null forms": {
        "conversations": None,
        "messages": [{"role": "user", "content": "<image>\nWhat?"}, CHAT_ANSWERED],
        "images": ["a.png"],
    },
    "a numbered mark": {"image": "a.png", "conversations": [{"from": "human", "value": "<image_1>\nWhat?"}, ANSWERED]},
    "roles in conversations": {"image": "a.png", "conversations": [{"role": "user", "content": "<image>What?"}, CHAT_ANSWERED]},
    "part, image": asked_with({"type": "image", "image": "a.png"}, text("What?")),
    "part, path": asked_with({"type": "image", "path": "a.png"}, text("What?")),
    "part, url": asked_with({"type": "image_url", "image_url": {"url": "a.png"}}, text("What?")),
    "part, url with detail": asked_with({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, text("What?")),
    "part, file url": asked_with({"type": "image_url", "image_url": "file:///images/a.png"}, text("What?")),
    "part without a name": asked_with(IMAGE, text("What?"), images=["a.png"]),
    "mark, path and bytes": {
        "images": [{"path": "a.png", "bytes": None}],
        "messages": asked_with(text("<image>\nWhat?"))["messages"],
    },
    "query": {"images": ["a.png"], "query": "<image>What?", "response": "A cat."},
}


@pytest.mark.parametrize("record", ONE_PICTURE.values(), ids=ONE_PICTURE)
def test_forms_of_one_sample_read_alike(record: dict[str, Any]) -> None:
    sample = read(record)
    assert sample.messages == [{"role": "user", "content": [IMAGE, text("What?")]}, {"role": "assistant", "content": SAID}]
    assert sample.media == [ImageFile(IMAGES / "a.png")]
    assert (list(sample.tools), dict(sample.flags)) == ([], {})


@pytest.mark.parametrize(
    "named", [DATA_URL, {"bytes": png(), "path": None}, {"url": DATA_URL}, png(), {"bytes": base64.b64encode(png()).decode()}]
)
def test_pictures_may_stand_in_the_record_itself(named: Any) -> None:
    (found,) = read({"images": [named], "query": "<image>What?", "response": "A cat."}).media
    assert isinstance(found, ImageBytes)
    assert found.size() == (6, 8)


def test_marks_in_a_text_part_the_picture_where_it_stands() -> None:
    asked = {"from": "human", "value": "Compare <image> and <image>.\n\nNow."}
    sample = read({"image": ["a.png", "b.png"], "conversations": [asked, {"from": "gpt", "value": "Line\n"}]})
    assert sample.messages[0]["content"] == [text("Compare "), IMAGE, text(" and "), IMAGE, text(".\n\nNow.")]
    assert sample.messages[1]["content"] == [text("Line\n")]


def test_a_system_text_beside_the_turns_is_a_system_turn() -> None:
    beside = read({"conversations": [{"from": "human", "value": "What?"}, ANSWERED], "system": "Be terse."})
    turn = read({"conversations": [{"from": "system", "value": "Be terse."}, {"from": "human", "value": "What?"}, ANSWERED]})
    developer = read(
        {"messages": [{"role": "developer", "content": "Be terse."}, {"role": "user", "content": "What?"}, CHAT_ANSWERED]}
    )
    query = read({"query": "What?", "response": "A cat.", "system": "Be terse."})
    assert beside == turn == developer == query
    assert beside.messages[0] == {"role": "system", "content": [text("Be terse.")]}


def test_earlier_rounds_come_first() -> None:
    sample = read({"query": "And now?", "response": "Yes.", "history": [["What?", "A cat."]]})
    assert [message["content"][0]["text"] for message in sample.messages] == ["What?", "A cat.", "And now?", "Yes."]


TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}


def test_tools_and_calls_are_read_in_both_forms() -> None:
    sharegpt = {
        "tools": '[{"type": "function", "function": {"name": "look", "parameters": {}}}]',
        "conversations": [
            {"from": "human", "value": "What?"},
            {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "sky"}}'},
            {"from": "observation", "value": "blue"},
            ANSWERED,
        ],
    }
    openai = {
        "tools": [TOOL],
        "messages": [
            {"role": "user", "content": "What?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}],
            },
            {"role": "tool", "content": "blue"},
            CHAT_ANSWERED,
        ],
    }
    assert read(sharegpt) == read(openai)
    assert read(openai).messages[1] == {"role": "assistant", "content": [], "tool_calls": [CALL]}
    assert read(openai).tools == [TOOL]
    assert read({**ONE_PICTURE["llava"], "tools": "[]"}).tools == []


@pytest.mark.parametrize(("key", "value", "expected"), [("loss", False, False), ("loss_mask", 1, True), ("trainable", 0, False)])
def test_flags_of_turns_are_read(key: str, value: Any, expected: bool) -> None:
    sample = read({"messages": [{"role": "user", "content": "What?"}, {**CHAT_ANSWERED, key: value}]})
    assert sample.flags == {1: expected}


@pytest.mark.parametrize(
    "said", ["Use <video> or <audio>.", "Write <image> there.", "<image>", "<video>\nplays films", "In HTML, <img> is right."]
)
def test_an_answer_that_speaks_of_marks_is_text(said: str) -> None:
    for record in (
        {"conversations": [{"from": "human", "value": "Which tag?"}, {"from": "gpt", "value": said}]},
        {"image": "a.png", "conversations": [ASKED, {"from": "gpt", "value": said}]},
    ):
        assert read(record).messages[1]["content"] == [text(said)]


def test_a_question_that_speaks_of_a_mark_is_text_where_no_picture_is_named() -> None:
    asked = "What does the <image> tag do, and <video> in HTML?"
    assert read({"query": asked, "response": "Nothing."}).messages[0]["content"] == [text(asked)]


def turns(*values: Any) -> dict[str, Any]:
    return {"conversations": list(values)}


REFUSED: list[tuple[Any, str, str]] = [
    ("text", "form", r"expected an object with keys, found 'text'"),
    ({"id": 1, "image": "a"}, "form", r"none of the keys 'conversations', 'messages', 'query'.*\(keys: id, image\)"),
    (turns(), "form", r"'conversations' must be a list of at least one turn"),
    (turns("hi"), "form", r"turn 0: expected an object .*'hi'"),
    (turns({"from": "moderator", "value": "x"}), "form", r"turn 0: unknown speaker 'moderator'; use one of human, "),
    (turns(ANSWERED, {"from": "gpt", "value": 3}), "form", r"turn 1: expected text, found 3"),
    (turns({"from": ["gpt"], "value": "x"}), "form", r"unknown speaker \['gpt'\]"),
    (turns(ASKED, ANSWERED), "form", r"<image> stands for a picture, but the record names none"),
    ({"image": "a.png", **turns(ANSWERED)}, "form", r"0 <image> marks in the text but 1 images"),
    ({"image": ["a", "b"], **turns(ASKED, ANSWERED)}, "form", r"1 <image> marks in the text but 2 images"),
    ({"image": "", **turns(ASKED, ANSWERED)}, "form", r"a picture is named by .* found ''"),
    ({"image": 3, **turns(ASKED, ANSWERED)}, "form", r"a picture is named by .* found 3"),
    ({"image": "a", "images": ["a"], **turns(ASKED, ANSWERED)}, "form", r"both 'image' and 'images'"),
    (
        {"image": ["a", "b"], **turns({"from": "human", "value": "<image_2> <image_1>"}, ANSWERED)},
        "form",
        r"numbered \[2, 1\], but must count the 2 pictures",
    ),
    ({"images": ["https://x.org/a.png"], **turns(ASKED, ANSWERED)}, "unsupported medium", r"nothing is downloaded .*x\.org"),
    ({"images": ["data:image/png;base64,%%%"], **turns(ASKED, ANSWERED)}, "broken file", r"base64 text cannot be decoded"),
    ({"images": ["data:image/png,abc"], **turns(ASKED, ANSWERED)}, "form", r"must hold base64"),
    (
        {"video": "x.mp4", **turns({"from": "human", "value": "What?"}, ANSWERED)},
        "unsupported medium",
        r"'video': videos are not read",
    ),
    (
        {"audios": ["x.wav"], **turns({"from": "human", "value": "What?"}, ANSWERED)},
        "unsupported medium",
        r"'audios': sounds are not",
    ),
    (turns({"from": "human", "value": "<video>\nWhat?"}, ANSWERED), "unsupported medium", r"<video> stands for what is not read"),
    (asked_with({"type": "video", "video": "x.mp4"}), "unsupported medium", r"turn 0: a part of type 'video'"),
    (asked_with({"type": "input_audio", "input_audio": {}}), "unsupported medium", r"a part of type 'input_audio'"),
    (asked_with({"type": "drawing"}), "form", r"turn 0: unknown part .*'drawing'"),
    (asked_with(IMAGE, {"type": "image", "image": "a"}), "form", r"2 parts are images, but only 1 of them name one"),
    (asked_with({"type": "image", "image": "a"}, images=["b"]), "form", r"both in parts and by the record"),
    (
        {**ONE_PICTURE["llava"], "rating": 5},
        "unknown key",
        r"nothing reads 'rating'; take it out, or name it in data.ignore_keys",
    ),
    ({"conversations": [ASKED | {"emotion": "glad"}, ANSWERED], "image": "a"}, "unknown key", r"turn 0: nothing reads 'emotion'"),
    ({**ONE_PICTURE["llava"], "tools": "{"}, "form", r"'tools' is no JSON"),
    ({**ONE_PICTURE["llava"], "system": ["x"]}, "form", r"'system' must be a text"),
    (
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": []}]},
        "form",
        r"turn 1: ",
    ),
    ({"messages": [{"role": "user", "content": "?", "loss": "maybe"}]}, "form", r"a flag of a turn .* found 'maybe'"),
    ({"query": "a", "response": "b", "history": "c"}, "form", r"'history' must be a list"),
    ({"query": "\ud83d", "response": "b"}, "form", r"a text holds \\ud83d, half of a surrogate pair"),
]


@pytest.mark.parametrize(("record", "kind", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_a_wrong_record_is_refused_by_naming_what_is_wrong(record: Any, kind: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(record)
    assert caught.value.kind == kind


def test_keys_that_the_run_file_names_may_stand_there() -> None:
    assert read({**ONE_PICTURE["llava"], "rating": 5}, ignored=("rating",)) == read(ONE_PICTURE["llava"])


def test_a_form_that_is_asked_for_is_the_only_one() -> None:
    both = {"query": "What?", "response": "A cat.", "messages": [{"role": "user", "content": "Who?"}, CHAT_ANSWERED]}
    with pytest.raises(DataError, match="nothing reads 'query', 'response'"):
        read(both, "messages")
