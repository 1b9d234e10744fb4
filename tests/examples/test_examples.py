"""What `examples/` shows works as shown."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.models import CONFIGS, write_model_folder
from typer.testing import CliRunner

import meshweave
from meshweave.cli import app
from meshweave.config import load_config
from meshweave.model.blueprint import read_model_config
from meshweave.model.check import check_executable, check_model
from meshweave.model.shrink import shrink_run

EXAMPLES = Path(__file__).parents[2] / "examples"


FILES = sorted(EXAMPLES.glob("*.yaml"))
FEW = 4
"""Ranks up to which `verify --shrink` of an example is run here; more are checked up to where processes would start."""


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a clone: paths of the repository, nothing else there, no net."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_example_inspects_simulates_and_verifies_before_anything_else_was_run(file: Path) -> None:
    name = f"examples/{file.name}"
    shown = run("inspect", name)
    assert "picture: " in shown
    if "path:" in file.read_text():
        assert "random samples stand in for the run's data" in shown
    assert "bubble" in run("simulate", name)
    ranks = load_config(file).world_size
    if ranks <= FEW:
        assert "same as the single process" in run("verify", name, "--shrink", "--steps", "1", "--set", "train.batch_size=16")
    else:
        small, config = shrink_run(load_config(file), read_model_config(load_config(file).model))
        check_model(small, config)
        check_executable(small, config)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("gpus", [1, 8, 64, 1024])
@pytest.mark.parametrize("model", ["llava-1.5-7b-hf", "Qwen3-VL-8B-Instruct", "Qwen3-VL-30B-A3B-Instruct"])
def test_init_writes_a_run_file_that_the_other_commands_take(model: str, gpus: int) -> None:
    Path("data.jsonl").write_text('{"query": "?", "response": "!"}\n' * 100_000)
    result = CliRunner().invoke(
        app, ["init", f"examples/models/{model}", "run.yaml", "--gpus", str(gpus), "--data", "data.jsonl"]
    )
    if gpus * 80 * 0.6 * 2**30 < {"llava-1.5-7b-hf": 7.1e9, "Qwen3-VL-8B-Instruct": 8.8e9}.get(model, 31.1e9) * 16:
        assert result.exit_code == 2
        assert "give --gpus" in result.output
        assert not Path("run.yaml").exists()
        return
    assert result.exit_code == 0, result.output
    its = load_config(Path("run.yaml"))
    check_model(its, read_model_config(its.model))
    assert its.world_size == gpus
    assert its.train.steps * its.train.batch_size <= 100_000 < (its.train.steps + 1) * its.train.batch_size
    again = CliRunner().invoke(app, ["init", f"examples/models/{model}", "--gpus", "8"])
    assert again.exit_code == 2
    assert "is there already" in again.output


def test_the_python_example_verifies_a_layout(tmp_path: Path) -> None:
    folder = write_model_folder(CONFIGS["qwen3_vl"](), tmp_path / "model")
    file = tmp_path / "run.yaml"
    modules = {"vision": {"ranks": "0-1", "dp": 2}, "language": {"ranks": "1-2", "tp": 2}}
    file.write_text(yaml.safe_dump({"model": str(folder), "modules": modules, "train": {"steps": 2, "batch_size": 4}}))
    command = [sys.executable, str(EXAMPLES / "python_api.py"), str(file)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "passed: True" in result.stdout


def test_every_public_name_is_there() -> None:
    for name in meshweave.__all__:
        assert callable(getattr(meshweave, name))
