"""A run folder is one run's at a time, and is not written over without being told."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.folders import model_folder

from meshweave.config import RunConfig, parse_config
from meshweave.errors import ConfigError
from meshweave.model.blueprint import read_model_config
from meshweave.train import output
from meshweave.train.output import Start, check_output
from meshweave.train.trainer import train
from meshweave.world import launch


def run_into(folder: Path, model: Path, ranks: int = 1) -> RunConfig:
    where = {"ranks": f"0-{ranks - 1}"}
    tree = {
        "model": str(model),
        "modules": {"vision": where, "language": where},
        "data": {"source": "synthetic"},
        "train": {"steps": 2, "batch_size": 2},
        "weights": "seeded",
        "output": str(folder),
    }
    return parse_config(tree)


def trained(run: RunConfig, **options: Any) -> None:
    config = read_model_config(run.model)
    launch(run, lambda world, run: train(world, run, config, **options))


def test_a_folder_that_holds_a_run_is_written_over_only_where_that_is_asked_for(tmp_path: Path) -> None:
    run = run_into(tmp_path / "out", model_folder("llava", tmp_path / "model"))
    trained(run)
    (run.output / "notes.txt").write_text("mine")
    before = (run.output / "metrics.jsonl").read_text()
    for refuse in (lambda: check_output(run, Start()), lambda: trained(run)):
        with pytest.raises(ConfigError, match=r"output: '.*out' holds a run; .*name another folder .*--overwrite"):
            refuse()
    assert (run.output / "metrics.jsonl").read_text() == before
    trained(run, start=Start(overwrite=True))
    assert (run.output / "metrics.jsonl").read_text() != before
    assert (run.output / "notes.txt").read_text() == "mine"
    assert len(list((run.output / "tensorboard").iterdir())) == 1


def test_a_file_system_without_locks_does_not_keep_a_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(output.fcntl, "flock", unknown)
    run = run_into(tmp_path / "out", model_folder("llava", tmp_path / "model"))
    trained(run)
    assert "nothing keeps a second run out of it (No locks available)" in caplog.text
    assert (run.output / "model").exists()


def test_what_inspect_leaves_in_a_folder_is_no_run(tmp_path: Path) -> None:
    run = run_into(tmp_path / "out", tmp_path)
    run.output.mkdir()
    for name in ("layout.png", "timeline.json", "data.png"):
        (run.output / name).write_text("")
    check_output(run.model_copy(update={"model": tmp_path / "model"}), Start())


@pytest.mark.parametrize("inside", [".", "runs/a"])
def test_the_model_folder_is_no_place_for_a_run(inside: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is the model folder .*, or in it"):
        check_output(run_into(tmp_path / inside, tmp_path), Start(overwrite=True))


def test_a_file_is_no_place_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        check_output(run_into(tmp_path / "out", tmp_path / "model"), Start(overwrite=True))


HOLD = """
import sys, time, pathlib
from meshweave.train import output
from meshweave.train.output import _lock
_lock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_is_refused_on_all_ranks_while_the_first_lives_and_not_when_it_was_killed(tmp_path: Path) -> None:
    run = run_into(tmp_path / "out", model_folder("llava", tmp_path / "model"), ranks=2)
    source = str(Path(__file__).parents[2] / "src")
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.output)], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": source}
    )
    assert first.stdout is not None
    assert first.stdout.readline() == b"held\n"
    try:
        with pytest.raises(ConfigError, match=rf"a run is writing into .*\(process {first.pid} on .*\); name another folder"):
            trained(run)
        assert not (run.output / "metrics.jsonl").exists()
    finally:
        first.kill()
        first.wait()
    time.sleep(0.1)
    trained(run)
    assert (run.output / "model").is_dir()
