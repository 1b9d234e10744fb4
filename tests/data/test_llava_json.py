"""Is a LLaVA-style file read as it is meant, and is a wrong one refused by naming where and what?"""

import json

import pytest
from PIL import Image

from meshweave.data.dataset import RawSample
from meshweave.data.media.image import ImageFile
from meshweave.data.sources.llava_json import LlavaJson
from meshweave.errors import DataError

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
TEXT = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]


def text(value: str) -> dict:
    return {"type": "text", "text": value}


IMAGE = {"type": "image"}


def written(tmp_path, content, name="data.json"):
    file = tmp_path / name
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def paths(sample: RawSample) -> list[str]:
    return [str(item.path) for item in sample.media]


def test_conversations_become_chat_messages_with_their_images(tmp_path):
    entries = [
        {"id": "0", "image": "a/cat.png", "conversations": TALK},
        {"id": "1", "conversations": TEXT},
        {
            "id": "2",
            "image": ["a.png", "b.png"],
            "conversations": [
                {"from": "system", "value": "Be short."},
                {"from": "human", "value": "Compare <image> and <image>.\n\nNow."},
                {"from": "gpt", "value": "Line\n"},
            ],
        },
    ]
    source = LlavaJson(written(tmp_path, entries), tmp_path / "images")
    assert len(source) == 3
    assert source[0].messages == [
        {"role": "user", "content": [IMAGE, text("What?")]},
        {"role": "assistant", "content": [text("A cat.")]},
    ]
    assert paths(source[0]) == [str(tmp_path / "images/a/cat.png")]
    assert source[1].media == []
    assert source[2].messages == [
        {"role": "system", "content": [text("Be short.")]},
        {"role": "user", "content": [text("Compare "), IMAGE, text(" and "), IMAGE, text(".\n\nNow.")]},
        {"role": "assistant", "content": [text("Line\n")]},
    ]
    assert paths(source[2]) == [str(tmp_path / "images" / name) for name in ("a.png", "b.png")]


def test_the_chat_form_is_accepted_with_marks_or_parts(tmp_path):
    said = {"role": "assistant", "content": "yes"}
    asked = {"role": "user", "content": [IMAGE, text("Is it?")]}
    entries = [
        {"messages": [asked, said], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": "<image>Is it?"}, said], "images": ["a.png"]},
    ]
    source = LlavaJson(written(tmp_path, entries))
    assert source[0] == source[1]
    assert source[0].messages[0] == asked
    assert paths(source[0]) == [str(tmp_path / "a.png")]


def test_jsonl_is_one_entry_a_line_whatever_characters_it_holds(tmp_path):
    separator = "\u2028"  # str.splitlines would cut here
    entries = [{"conversations": TEXT}, {"conversations": [{"from": "gpt", "value": f"a{separator}b"}]}]
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    source = LlavaJson(written(tmp_path, "\n\n".join(lines) + "\n", "data.jsonl"))
    assert len(source) == 2
    assert source[1].messages[0]["content"] == [text(f"a{separator}b")]


TURN = {"from": "human", "value": "x"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2", r"data.json: not valid JSON at line 1, column 6 .*expected a JSON list"),
        ("", r"data.json: holds no entries"),
        ("[]", r"data.json: holds no entries"),
        ('{"conversations": []', r"data.json:1: not valid JSON"),
        (["text"], r"data.json: entry 0: expected an object with 'conversations', found 'text'"),
        ([{"id": 1, "image": "a"}], r"entry 0: no list of 'conversations' or 'messages' \(keys: id, image\)"),
        ([{"conversations": []}], r"entry 0: no list of"),
        (
            [{"conversations": TEXT}, {"conversations": ["hi"]}],
            r"entry 1: turn 0: expected an object .* 'hi'",
        ),
        ([{"conversations": [TURN | {"from": "bot"}]}], r"turn 0: unknown speaker 'bot'; use one of human, "),
        ([{"conversations": [TURN, TURN | {"value": 3}]}], r"turn 1: expected text, found 3"),
        ([{"conversations": [TURN | {"value": [{"type": "video"}]}]}], r"turn 0: unknown part .*'video'"),
        ([{"conversations": TALK}], r"entry 0: 1 <image> marks in the text but 0 images \[\]; write one"),
        (
            [{"conversations": TEXT, "image": "a.png"}],
            r"0 <image> marks in the text but 1 images \['a.png'\]",
        ),
        ([{"conversations": TALK, "image": ["a", "b"]}], r"1 <image> marks in the text but 2 images"),
        ([{"conversations": TALK, "image": {"a": 1}}], r"'image' must be a file name .* found \{'a': 1\}"),
        (json.dumps({"conversations": TEXT}) + "\n{", r"data.json:2: not valid JSON"),
        (json.dumps({"conversations": TEXT}) + "\n\n3", r"data.json:3: expected an object"),
    ],
)
def test_a_wrong_file_is_refused_by_naming_file_entry_value_and_fix(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        LlavaJson(written(tmp_path, content))


def test_a_missing_or_binary_data_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: no such data file"):
        LlavaJson(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"binary\.json: cannot be read as UTF-8 text"):
        LlavaJson(tmp_path / "binary.json")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_tells_its_size_from_the_header_and_loads_as_rgb(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.new("L", (300, 200), 128).save(path)
    assert ImageFile(path).size() == (200, 300)
    assert ImageFile(path).load().mode == "RGB"
    path.write_bytes(path.read_bytes()[:-40])  # cut off: the header still tells the size
    assert ImageFile(path).size() == (200, 300)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_turned_image_is_upright_in_size_and_in_pixels(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (30, 20)).save(tmp_path / f"a.{suffix}", exif=exif)
    image = ImageFile(tmp_path / f"a.{suffix}")
    assert image.size() == (30, 20)
    assert image.load().size == (20, 30)


def test_missing_and_broken_images_are_named_when_they_are_read(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:1000])
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(DataError, match=r"none\.png: no such image; check the image folder"):
        ImageFile(tmp_path / "none.png").size()
    with pytest.raises(DataError, match=r"text\.png: the image is broken or cut off"):
        ImageFile(tmp_path / "text.png").size()
    with pytest.raises(DataError, match=r"cut\.png: the image is broken or cut off"):
        ImageFile(tmp_path / "cut.png").load()
