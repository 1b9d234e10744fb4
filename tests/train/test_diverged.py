"""Steps without a finite loss make no update, say what is not finite, and end a run where they do not end."""

import json
import logging
from pathlib import Path

import pytest
from support.folders import model_folder

from meshweave.config import parse_config
from meshweave.errors import DivergedError
from meshweave.model.blueprint import read_model_config
from meshweave.train.trainer import train
from meshweave.world import launch


def test_so_many_steps_in_a_row_end_the_run_and_their_samples_are_written_down(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = {
        "model": str(model_folder("llava", tmp_path / "model")),
        "modules": {"vision": {"ranks": 0}, "language": {"ranks": 0}},
        "data": {"source": "synthetic", "samples": 12},
        "train": {"steps": 9, "batch_size": 3, "lr": 1e38, "max_grad_norm": None, "max_skipped_steps": 3},
        "weights": "seeded",
        "output": str(tmp_path / "out"),
    }
    run = parse_config(tree)
    config = read_model_config(run.model)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(DivergedError, match=r"^steps 1 to 3: its loss and .* 3 steps in a row .*diverged\.jsonl lists their sa"),
    ):
        launch(run, lambda world, run: train(world, run, config))
    written = [json.loads(line) for line in (run.output / "diverged.jsonl").read_text().splitlines()]
    assert [step["step"] for step in written] == [1, 2, 3]
    assert all(len(set(step["samples"])) == 3 for step in written)
    assert "language" in written[0]["gradient_norms"]
    said = [record.getMessage() for record in caplog.records if record.name == "meshweave.train.trainer"]
    assert said[0].startswith("step 1: its loss and the gradient of")
    assert len(said) == 3
    assert not (run.output / "model").exists()
