"""What docs/data.md shows is read as it says, and its table lists what runs."""

import json
import re
from itertools import product
from pathlib import Path

from data.test_bring_your_data import CONTAINERS, FORMS, cases

from meshweave.config import DataConfig
from meshweave.data.media.image import ImageBytes
from meshweave.data.records import read_record

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_every_snippet_is_read() -> None:
    samples = [read_record(json.loads(text), "auto", Path()) for text in re.findall(r"```json\n(.*?)\n```", PAGE, re.DOTALL)]
    assert [len(sample.media) for sample in samples] == [1, 1, 1, 2, 1]
    assert [message["role"] for message in samples[1].messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert len(samples[1].tools) == 1
    assert all(item.size() == (6, 8) for item in samples[2].media + samples[4].media if isinstance(item, ImageBytes))


def test_every_key_of_the_tables_is_one_of_the_run_file() -> None:
    keys = set(re.findall(r"`(?:data\.)?([a-z_]+)(?:: [a-z]+)?`", PAGE[PAGE.index("## What is learned") :]))
    assert {"train_on", "reasoning", "max_length", "too_long", "max_images", "on_error", "max_skipped"} <= keys
    named = {key for key in keys if key.startswith(("max_", "min_", "train_", "too_", "on_", "reason"))}
    assert named <= set(DataConfig.model_fields)


def test_the_table_of_what_ran_lists_what_the_tests_run() -> None:
    rows = [line.strip("|").split("|") for line in PAGE[PAGE.index("## What ran") :].splitlines() if line.startswith("| ")]
    header, *body = [[cell.strip().replace("`datasets`", "datasets") for cell in row] for row in rows if "---" not in row[0]]
    listed = {
        (row[0], container): set(cell.split(", ")) for row in body for container, cell in zip(header[1:], row[1:], strict=True)
    }
    ran = {pair: {case.family for case in cases() if (case.form, case.container) == pair} for pair in product(FORMS, CONTAINERS)}
    assert listed == ran
