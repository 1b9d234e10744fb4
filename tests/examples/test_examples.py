"""What `examples/` shows works as shown."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.models import CONFIGS, write_model_folder

import meshweave
from meshweave.config import parse_config
from meshweave.layout import placements

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.name)
def test_every_run_file_is_accepted(file: Path) -> None:
    tree = yaml.safe_load(file.read_text())
    if tree.get("data", {}).get("path"):
        tree["data"] |= {"path": str(file), "images": str(EXAMPLES)}  # any file that exists
    run = parse_config(tree, where=file.name)
    assert placements(run).keys() == run.modules.keys()


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
