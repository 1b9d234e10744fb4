"""`meshweave data check` goes through all samples in parallel, names what a run would skip, and survives what it dies of."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.folders import model_folder
from typer.testing import CliRunner

from meshweave.cli import app
from meshweave.config import parse_config
from meshweave.data.build import data_to_check
from meshweave.data.processed import ProcessedDataset
from meshweave.errors import ConfigError, DataError
from meshweave.model.blueprint import read_model_config
from meshweave.preview.check_data import check_samples, sample_facts
from meshweave.preview.show_data import first_readable

GOOD = {"image": "a.png", "query": "<image>What?", "response": "A cat."}
RECORDS = [
    *[GOOD] * 6,
    GOOD | {"image": "none.png"},
    GOOD | {"image": "cut.png"},
    {"query": "?", "response": 3},
    {"query": "What?"},
    {"query": "Long?", "response": "cat " * 200},
]
MANY = [GOOD] * 300


def run_file(folder: Path, records: list[Any], **data: Any) -> Path:
    Image.effect_noise((64, 48), 60).convert("RGB").save(folder / "a.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:2000])
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tree = {
        "model": str(model_folder("qwen3_vl", folder / "model")),
        "modules": {"vision": {"ranks": "0"}, "language": {"ranks": "0"}},
        "data": {"path": str(folder / "data.jsonl"), "max_length": 120, **data},
        "train": {"steps": 1, "batch_size": 1},
        "output": str(folder / "out"),
    }
    (folder / "run.yaml").write_text(json.dumps(tree))
    return folder / "run.yaml"


def dataset_of(file: Path) -> ProcessedDataset:
    run = parse_config(json.loads(file.read_text()))
    return data_to_check(run, read_model_config(run.model))[0]


@pytest.mark.parametrize("workers", [1, 3])
def test_every_sample_is_gone_through_once_by_however_many_processes(workers: int, tmp_path: Path) -> None:
    dataset = dataset_of(run_file(tmp_path, RECORDS))
    told: list[int] = []
    facts = sorted(check_samples(dataset, len(RECORDS), workers, True, told.append), key=lambda each: each.sample)
    assert [each.sample for each in facts] == list(range(len(RECORDS)))
    assert sum(told) == len(RECORDS)
    kinds = [each.fault.kind if each.fault else None for each in facts]
    assert kinds == [None] * 6 + ["missing file", "broken file", "form", "no target", "too long"]
    assert [each.fault.left_out for each in facts if each.fault] == [False, False, False, True, True]
    assert facts[0] == sample_facts(dataset, 0, True)
    assert facts[0].sizes == ((48, 64),)


def test_headers_alone_do_not_find_a_picture_that_is_cut_off(tmp_path: Path) -> None:
    dataset = dataset_of(run_file(tmp_path, RECORDS))
    assert sample_facts(dataset, 7, False).fault is None


def test_the_command_names_kinds_and_files_draws_and_says_whether_a_run_goes_through(tmp_path: Path) -> None:
    file = run_file(tmp_path, RECORDS)
    result = CliRunner().invoke(app, ["data", "check", str(file), "--show", "1", "--workers", "2"])
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    assert "11 samples, 6 to train on" in shown
    assert "⟦A cat.<|im_end|>⟧" in shown
    for kind in ("missing file", "broken file", "form", "no target", "too long"):
        assert kind in shown
    assert (tmp_path / "out" / "data.png").stat().st_size > 1000
    with_faults = run_file(tmp_path, [GOOD] * 20 + [{"query": 3}] * 20)
    bad = CliRunner().invoke(app, ["data", "check", str(with_faults), "--json"])
    assert bad.exit_code == 1
    report = json.loads(bad.output[bad.output.index("{") :])
    assert (report["passed"], report["unreadable"], report["trained"]) == (False, {"form": 20}, 20)


def test_a_decoder_that_takes_its_process_with_it_is_told_by_the_samples_it_was_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = dataset_of(run_file(tmp_path, MANY))
    media = ProcessedDataset.media

    def dying(self: ProcessedDataset, index: int, slot: int) -> Any:
        if index == 140:
            os._exit(7)
        return media(self, index, slot)

    monkeypatch.setattr(ProcessedDataset, "media", dying)
    with pytest.raises(DataError, match=r"ended with exit code 7 at one of samples 128 to 254 \(every 2th\)"):
        list(check_samples(dataset, len(MANY), 2, True))


def test_samples_are_shown_as_the_model_sees_them(tmp_path: Path) -> None:
    dataset = dataset_of(run_file(tmp_path, [{"query": 3}, *RECORDS]))
    ((index, pieces),) = first_readable(dataset, 1, 5)
    assert index == 1
    assert [(piece.text, piece.target) for piece in pieces if piece.target] == [("A cat.<|im_end|>", True)]
    assert sum(piece.media_tokens for piece in pieces) == dataset.meta(1).media[0].tokens


def test_random_samples_are_nothing_to_check(tmp_path: Path) -> None:
    file = run_file(tmp_path, RECORDS)
    tree = json.loads(file.read_text()) | {"data": {"source": "synthetic"}}
    run = parse_config(tree)
    with pytest.raises(ConfigError, match="names no data that could be checked"):
        data_to_check(run, read_model_config(run.model))


def test_balance_counts_what_is_left_out_and_what_limits_do_by_kind(tmp_path: Path) -> None:
    records = [*[GOOD] * 6, *RECORDS[-2:], GOOD | {"image": "none.png"}]
    file = run_file(tmp_path, records, max_pixels=1000, max_length=60)
    overrides = ["--set", "train.batch_size=9"]
    result = CliRunner().invoke(app, ["balance", str(file), *overrides])
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    assert "3 samples left out: " in shown
    for part in ("1 × no target", "1 × too long", "1 × missing file", "6 × pictures reduced to data.max_pixels"):
        assert part in shown
    report = json.loads(CliRunner().invoke(app, ["balance", str(file), *overrides, "--json"]).output)
    assert report["faults"] == {"no target": 1, "too long": 1, "missing file": 1}
    assert report["effects"] == {"pictures reduced to data.max_pixels": 6}
