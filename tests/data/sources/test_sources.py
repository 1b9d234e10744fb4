"""Every container yields the same records, found without reading the others, and says where a bad one stands."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshweave.data.media.image import ImageBytes
from meshweave.data.sources import RecordSource, json_text, open_records
from meshweave.data.sources.table import Table
from meshweave.errors import ConfigError, DataError

RECORDS = [{"query": f"Which {number}?", "response": 'A "cat" \\ [x], {y}\u2028é\n'} for number in range(5)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def written(tmp_path: Path, content: Any, name: str) -> Path:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def as_list(tmp_path: Path) -> Path:
    return written(tmp_path, json.dumps(RECORDS, indent=1, ensure_ascii=False), "data.json")


def as_lines(tmp_path: Path) -> Path:
    return written(tmp_path, "".join(json.dumps(each) + "\n" for each in RECORDS), "data.jsonl")


def with_a_mark_and_gaps(tmp_path: Path) -> Path:
    lines = "\r\n\r\n".join(json.dumps(each, ensure_ascii=False) for each in RECORDS)
    return written(tmp_path, b"\xef\xbb\xbf" + lines.encode() + b"\n \n", "data.jsonl")


def list_with_a_mark(tmp_path: Path) -> Path:
    return written(tmp_path, b"\xef\xbb\xbf \n" + json.dumps(RECORDS).encode(), "data.json")


def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, part in enumerate((RECORDS[:2], RECORDS[2:])):
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in part))
    return folder


def parquet(tmp_path: Path) -> Path:
    import datasets

    datasets.Dataset.from_list(RECORDS).to_parquet(tmp_path / "data.parquet")
    return tmp_path / "data.parquet"


def saved(tmp_path: Path) -> Path:
    import datasets

    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def saved_splits(tmp_path: Path) -> Path:
    import datasets

    whole = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict({"test": whole.select([0]), "train": whole}).save_to_disk(tmp_path / "splits")
    return tmp_path / "splits"


@pytest.mark.parametrize(
    "container", [as_list, as_lines, with_a_mark_and_gaps, list_with_a_mark, shards, parquet, saved, saved_splits]
)
def test_containers_hold_the_same_records(container: Any, tmp_path: Path) -> None:
    records = open_records(container(tmp_path))
    assert [records.record(index) for index in range(len(records))] == RECORDS


VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=8) | st.sampled_from(['"', "\\", '\\"', "[", "]", "{", "},", '",{']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(VALUES, max_size=6), indent=st.sampled_from([None, 0, 2]), at_once=st.integers(1, 40))
def test_elements_of_a_list_are_found_whatever_they_hold(values: list[Any], indent: int | None, at_once: int) -> None:
    data = np.frombuffer(json.dumps(values, indent=indent, ensure_ascii=False).encode(), dtype=np.uint8)
    usual, json_text._AT_ONCE = json_text._AT_ONCE, at_once
    try:
        spans = json_text._elements(data, 0)
    finally:
        json_text._AT_ONCE = usual
    assert [json.loads(bytes(data[first:last])) for first, last in spans] == values


def test_the_index_is_kept_and_made_anew_when_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = as_lines(tmp_path)
    open_records(file)
    with monkeypatch.context() as patched:
        patched.setattr(json_text, "_lines", lambda *_: pytest.fail("the file is read again"))
        assert open_records(file).record(4) == RECORDS[4]
    file.write_text(json.dumps({"query": "New?", "response": "Yes."}) + "\n")
    assert open_records(file).record(0)["query"] == "New?"


def test_without_a_place_for_an_index_files_are_read_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    assert len(open_records(as_lines(tmp_path))) == len(RECORDS)


GOOD = json.dumps({"query": "Which?", "response": "A cat."})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"query": "Whi', r"data\.jsonl:3: not valid JSON at column"),
        ("3", r"data\.jsonl:3: expected an object with keys, found 3"),
        ('{"query": "\\ud83d", "response": "x"}', r"data\.jsonl:3: a text holds \\ud83d"),
        ("\x00\x00", r"data\.jsonl:3: not valid JSON"),
        (b'{"query": "\xff"}', r"data\.jsonl:3: not valid UTF-8 at byte"),
        ('{"a":' * 100_000, r"data\.jsonl:3: its JSON is nested too deeply|not valid JSON"),
    ],
)
def test_a_bad_line_is_named_when_it_is_read_and_no_other_is(bad: Any, message: str, tmp_path: Path) -> None:
    line = bad if isinstance(bad, bytes) else bad.encode()
    source = RecordSource(
        open_records(written(tmp_path, b"\n".join([GOOD.encode()] * 2 + [line]), "data.jsonl")), "auto", tmp_path
    )
    assert len(source) == 3
    assert source[0] == source[1]
    with pytest.raises(DataError, match=message):
        source[2]


def test_a_list_that_is_cut_off_has_a_bad_last_entry(tmp_path: Path) -> None:
    source = RecordSource(open_records(written(tmp_path, f'[{GOOD}, {GOOD}, {{"query": "W', "data.json")), "auto", tmp_path)
    assert source[1] == source[0]
    with pytest.raises(DataError, match=r"data\.json: entry 2: not valid JSON"):
        source[2]


def test_pictures_in_columns_are_taken_as_they_are_stored(tmp_path: Path) -> None:
    import datasets
    from PIL import Image

    rows = {"query": ["<image>What?"], "response": ["A cat."], "images": [[Image.new("RGB", (8, 6))]]}
    features = datasets.Features(
        {"query": datasets.Value("string"), "response": datasets.Value("string"), "images": datasets.List(datasets.Image())}
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "data.parquet")
    table.save_to_disk(tmp_path / "saved")
    for place in ("data.parquet", "saved"):
        (found,) = RecordSource(open_records(tmp_path / place), "auto", tmp_path)[0].media
        assert isinstance(found, ImageBytes)
        assert found.size() == (6, 8)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "none.json", r"none\.json: no such data file"),
        ("", "data.jsonl", r"data\.jsonl: holds no records"),
        ("[]", "data.json", r"data\.json: holds no records"),
        (" \n\n", "data.jsonl", r"data\.jsonl: holds no records"),
        ("not parquet", "data.parquet", r"data\.parquet: datasets cannot read it"),
    ],
)
def test_a_container_that_cannot_be_opened_is_named(content: str | None, name: str, message: str, tmp_path: Path) -> None:
    if content is not None:
        written(tmp_path, content, name)
    with pytest.raises(DataError, match=message):
        open_records(tmp_path / name)


def test_a_folder_of_several_kinds_or_none_is_refused(tmp_path: Path) -> None:
    for name, message in (("a.txt", "no .parquet, .jsonl or .json file"), ("a.jsonl", ""), ("a.json", "several kinds")):
        (tmp_path / name).write_text(GOOD)
        if message:
            with pytest.raises(DataError, match=message):
                open_records(tmp_path)


def test_without_datasets_the_message_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'meshweave\[datasets\]'"):
        Table.parquet([tmp_path / "data.parquet"])


def test_lines_are_counted_in_large_files(tmp_path: Path) -> None:
    random.seed(0)
    file = written(tmp_path, "\n".join(["x" * random.randint(0, 40) for _ in range(2000)]), "data.jsonl")
    usual, json_text._AT_ONCE = json_text._AT_ONCE, 1000
    try:
        records = open_records(file)
        lines = file.read_text().split("\n")
        for index in (0, 700, len(records) - 1):
            line = int(records.where(index).rpartition(":")[2])
            first, last = records._spans[index].tolist()
            assert lines[line - 1].encode() == file.read_bytes()[first:last]
    finally:
        json_text._AT_ONCE = usual
