"""`meshweave checkpoint` and `meshweave export`, as they are typed."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.folders import model_folder
from typer.testing import CliRunner

from meshweave.cli import app
from meshweave.config import parse_config
from meshweave.model.blueprint import read_model_config
from meshweave.train.trainer import train
from meshweave.world import launch


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with checkpoints after steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    tree = {
        "model": str(model_folder("llava", folder / "start")),
        "modules": {"vision": {"ranks": 0}, "language": {"ranks": 0}},
        "data": {"source": "synthetic", "samples": 8},
        "train": {"steps": 2, "batch_size": 2, "checkpoint": {"every": 1}},
        "weights": "seeded",
        "output": str(folder / "out"),
    }
    run = parse_config(tree)
    config = read_model_config(run.model)
    launch(run, lambda world, run: train(world, run, config))
    return run.output


def said(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_checkpoints_are_listed_shown_and_checked(output: Path, tmp_path: Path) -> None:
    code, text = said("checkpoint", "list", output)
    assert code == 0
    assert [line.split()[0] for line in text.splitlines()] == ["step", "1", "language", "2", "language"]
    assert text.count("whole") == 2
    code, text = said("checkpoint", "show", output)
    assert code == 0
    assert "step: 2" in text
    assert "rank-0-0.safetensors" in text
    assert said("checkpoint", "check", output)[0] == 0
    code, text = said("checkpoint", "list", tmp_path)
    assert code == 2
    assert "holds no checkpoints" in text


def test_a_save_that_is_under_way_is_not_what_is_shown(output: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(output, tmp_path / "copy"))
    (copy / "checkpoints" / "step-2" / "manifest.json").unlink()
    code, text = said("checkpoint", "show", copy)
    assert code == 0
    assert "step: 1" in text


def test_a_damaged_one_is_named_by_list_and_check(output: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(output, tmp_path / "copy"))
    flipped = copy / "checkpoints" / "step-1" / "rank-0-0.safetensors"
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    (copy / "checkpoints" / "step-2" / "tensors.json").unlink()
    code, text = said("checkpoint", "check", copy)
    assert code == 2
    assert "step-1: damaged: rank-0-0.safetensors is not what was written" in text
    assert "step-2: damaged: tensors.json is missing" in text
    assert "damaged: tensors.json is missing" in said("checkpoint", "list", copy)[1]


def test_a_checkpoint_leaves_as_the_run_s_own_model_does(output: Path, tmp_path: Path) -> None:
    assert said("export", output, tmp_path / "newest")[0] == 0
    assert said("export", output / "checkpoints" / "step-1", tmp_path / "first", "--dtype", "bfloat16")[0] == 0
    own, newest, first = (
        load_file(folder / "model.safetensors") for folder in (output / "model", tmp_path / "newest", tmp_path / "first")
    )
    assert own.keys() == newest.keys() == first.keys()
    assert all(torch.equal(newest[name], value) for name, value in own.items())
    assert {value.dtype for value in first.values()} == {torch.bfloat16}
    assert any(not torch.equal(first[name], value.bfloat16()) for name, value in own.items())
    files = {file.name for file in (output / "model").iterdir()}
    assert {file.name for file in (tmp_path / "newest").iterdir()} == files
    code, text = said("export", output, tmp_path / "newest")
    assert code == 2
    assert "is there already" in text


def test_a_model_folder_that_has_moved_is_named(output: Path, tmp_path: Path) -> None:
    start = output.parent / "start"
    moved = start.rename(tmp_path / "moved")
    try:
        code, text = said("export", output, tmp_path / "out")
        assert code == 2
        assert str(start) in text
        assert said("export", output, tmp_path / "out", "--model", moved)[0] == 0
    finally:
        moved.rename(start)
