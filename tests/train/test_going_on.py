"""A run goes on in its own folder: its record has no gap and no step twice, and nothing is lost or passed over in silence."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.folders import model_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from meshweave.checkpoint.manifest import MANIFEST, checkpoint_folder, checkpoint_folders
from meshweave.config import RunConfig, parse_config
from meshweave.errors import CheckpointError, ConfigError
from meshweave.model.blueprint import read_model_config
from meshweave.report.summary import Summary
from meshweave.train import trainer
from meshweave.train.output import START, Start
from meshweave.train.trainer import train
from meshweave.world import launch

AGAIN = Start(resume=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder("llava", tmp_path_factory.mktemp("model"))


def run_of(model: Path, output: Path, **changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "model": str(model),
        "modules": {"vision": {"ranks": 0}, "language": {"ranks": 0}},
        "data": {"source": "synthetic", "samples": 12, "eval_samples": 2},
        "train": {"steps": 6, "batch_size": 3, "lr": 1e-2, "checkpoint": {"every": 2, "async": False}},
        "weights": "seeded",
        "dtype": "float64",
        "output": str(output),
    }
    return parse_config(
        tree | {name: tree.get(name, {}) | its if isinstance(its, dict) else its for name, its in changes.items()}
    )


def trained(run: RunConfig, start: Start = START) -> Summary:
    config = read_model_config(run.model)
    summary = launch(run, lambda world, run: train(world, run, config, start=start))
    assert summary is not None
    return summary


class PowerCutError(Exception):
    pass


def cut_off(run: RunConfig, after: int, start: Start = START) -> None:
    """Trains, and is gone after so many steps of this process."""
    steps = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > after:
            raise PowerCutError
        return run_step(*args, **options)

    run_step = trainer.run_step
    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCutError):
        patch.setattr(trainer, "run_step", counted)
        trained(run, start)


def records(run: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]


def weights(run: RunConfig) -> dict[str, Tensor]:
    return load_file(run.output / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def unbroken(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Summary]:
    run = run_of(model, tmp_path_factory.mktemp("unbroken") / "out")
    return run, trained(run)


def test_a_run_that_was_cut_off_twice_leaves_what_one_that_was_not_leaves(
    model: Path, tmp_path: Path, unbroken: tuple[RunConfig, Summary]
) -> None:
    whole, summary = unbroken
    run = run_of(model, tmp_path / "out")
    cut_off(run, after=3)
    with (run.output / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 3, "lo')  # a machine that goes down leaves half a line
    cut_off(run, 2, AGAIN)
    assert [record["step"] for record in records(run)] == [0, 1, 2, 3]
    again = trained(run, AGAIN)
    same = ("step", "loss", "grad_norm", "lr", "tokens", "updated")
    assert [[record[key] for key in same] for record in records(run)] == [
        [record[key] for key in same] for record in records(whole)
    ]
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(run).items())
    for fact in ("steps", "loss", "flops", "skipped", "left_out", "faults", "exact", "eval_loss"):
        assert getattr(again, fact) == getattr(summary, fact), fact
    board = EventAccumulator(str(run.output / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(6))


def test_a_run_that_ended_while_it_wrote_its_model_trains_no_step_again(
    model: Path, tmp_path: Path, unbroken: tuple[RunConfig, Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = unbroken
    run = run_of(model, tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(PowerCutError):
        patch.setattr(trainer, "export_model", raising(PowerCutError()))
        trained(run)
    monkeypatch.setattr(trainer, "run_step", raising(AssertionError("a step")))
    trained(run, AGAIN)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(run).items())


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("meshweave.")]


def raising(error: Exception) -> Callable[..., Any]:
    def fails(*args: Any, **options: Any) -> Any:
        raise error

    return fails


def test_of_an_unfinished_checkpoint_the_one_before_is_taken_and_both_are_said(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(model, tmp_path / "out")
    cut_off(run, after=5)
    (checkpoint_folder(run.output, 4) / MANIFEST).unlink()
    with caplog.at_level(logging.WARNING):
        trained(run, AGAIN)
    passed_over, from_where = said(caplog)
    assert re.search(r"step-4: no manifest.json: its save did not end, .*; it is removed$", passed_over)
    assert from_where == f"going on from {checkpoint_folder(run.output, 2)}, after step 2"
    assert [record["step"] for record in records(run)] == list(range(6))
    assert [folder.name for folder in checkpoint_folders(run.output)] == ["step-2", "step-4", "step-6"]


def test_a_run_that_goes_back_sets_later_checkpoints_aside(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_of(model, tmp_path / "out")
    cut_off(run, after=5)
    with caplog.at_level(logging.WARNING):
        cut_off(run, 1, Start(checkpoint=checkpoint_folder(run.output, 2)))
    assert re.search(r"step-4: is later than .*step-2, or as old; it is set aside, as step-4\.aside-\d+$", said(caplog)[0])
    assert [folder.name for folder in checkpoint_folders(run.output)] == ["step-2"]
    assert [record["step"] for record in records(run)] == [0, 1, 2]
    with pytest.raises(ConfigError, match="holds a run"):
        trained(run, Start(checkpoint=shutil.copytree(checkpoint_folder(run.output, 2), tmp_path / "elsewhere")))


def test_a_run_may_go_on_from_what_was_set_aside(model: Path, tmp_path: Path) -> None:
    run = run_of(model, tmp_path / "out")
    cut_off(run, after=5)
    cut_off(run, 3, Start(checkpoint=checkpoint_folder(run.output, 2)))
    (aside,) = (run.output / "checkpoints").glob("*.aside-*")
    cut_off(run, 1, Start(checkpoint=aside))
    assert [record["step"] for record in records(run)] == [0, 1, 2, 3, 4]
    # The other course's step 4 must not be what the run goes on from next.
    assert [folder.name for folder in checkpoint_folders(run.output)] == ["step-2"]


@pytest.mark.parametrize("start", [Start(), AGAIN], ids=["auto", "asked for"])
def test_checkpoints_that_cannot_be_read_are_not_started_over(start: Start, model: Path, tmp_path: Path) -> None:
    run = run_of(model, tmp_path / "out", train={"steps": 6, "batch_size": 3, "resume": "auto", "checkpoint": {"every": 2}})
    cut_off(run, after=3)
    manifest = checkpoint_folder(run.output, 2) / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match=r"no whole checkpoint to go on from\n.*format 99.*--overwrite"):
        trained(run, start)
    assert manifest.exists()
    assert [record["step"] for record in records(run)] == [0, 1, 2]


def test_a_finished_run_without_checkpoints_is_not_started_over(model: Path, tmp_path: Path) -> None:
    run = run_of(model, tmp_path / "out", train={"steps": 1, "batch_size": 3, "resume": "auto", "checkpoint": None})
    trained(run)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint to go on from; name another folder"):
        trained(run)
    assert weights(run)


def test_writing_over_a_run_and_going_on_from_it_exclude_each_other(
    model: Path, tmp_path: Path, unbroken: tuple[RunConfig, Summary]
) -> None:
    run = run_of(model, tmp_path / "out")
    cut_off(run, after=5)
    own = checkpoint_folder(run.output, 4)
    for start in (Start(overwrite=True, resume=True), Start(overwrite=True, checkpoint=own)):
        with pytest.raises(ConfigError, match=r"--overwrite removes what .* leave one of them out"):
            trained(run, start)
    assert checkpoint_folders(run.output)
    # From another folder's, nothing of this one stays: neither steps nor checkpoints.
    cut_off(run, 1, Start(overwrite=True, checkpoint=checkpoint_folder(unbroken[0].output, 2)))
    assert [record["step"] for record in records(run)] == [2]
    assert checkpoint_folders(run.output) == []


def test_another_folders_checkpoint_does_not_go_on_in_a_folder_that_holds_a_run(
    model: Path, tmp_path: Path, unbroken: tuple[RunConfig, Summary]
) -> None:
    run = run_of(model, tmp_path / "out", train={"steps": 6, "batch_size": 3, "resume": "auto", "checkpoint": {"every": 2}})
    cut_off(run, after=3)
    with pytest.raises(ConfigError, match="holds a run"):
        trained(run, Start(checkpoint=checkpoint_folder(unbroken[0].output, 4)))
    assert [record["step"] for record in records(run)] == [0, 1, 2]


def test_a_folder_that_holds_checkpoints_says_how_to_go_on(model: Path, tmp_path: Path) -> None:
    run = run_of(model, tmp_path / "out")
    cut_off(run, after=3)
    with pytest.raises(ConfigError, match=r"holds a run; go on from its newest checkpoint \(--resume\), name another folder"):
        trained(run)
    assert checkpoint_folders(run.output)
    trained(run, Start(overwrite=True))
    assert records(run)[0]["step"] == 0


def test_auto_starts_goes_on_and_starts_anew_where_nothing_was_saved(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(model, tmp_path / "out", train={"steps": 6, "batch_size": 3, "resume": "auto", "checkpoint": {"every": 2}})
    cut_off(run, after=1)
    with caplog.at_level(logging.WARNING):
        cut_off(run, after=3)
    assert said(caplog) == [f"{run.output}: a run ended there before its first checkpoint; it starts anew"]
    assert [record["step"] for record in records(run)] == [0, 1, 2]
    trained(run)
    assert [record["step"] for record in records(run)] == list(range(6))


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(model: Path, tmp_path: Path) -> None:
    run = run_of(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"holds no whole checkpoint to go on from; start without --resume"):
        trained(run, AGAIN)
    with pytest.raises(CheckpointError, match=r"there is no such checkpoint"):
        trained(run, Start(checkpoint=tmp_path / "none"))


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "batch size": ({"train": {"batch_size": 4}}, r"train\.batch_size: 3 → 4\n.*--allow-changed train\.batch_size"),
    "data": ({"data": {"samples": 13}}, r"data\.samples: 12 → 13\n.*--allow-changed data$"),
    "seed": ({"seed": 5}, r"seed: 0 → 5"),
    "frozen": ({"modules": {"vision": {"ranks": 0, "frozen": True}}}, r"modules\.vision\.frozen: False → True"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_is_another_one_is_refused_until_that_is_allowed(
    change: str, model: Path, tmp_path: Path, unbroken: tuple[RunConfig, Summary]
) -> None:
    changes, message = CHANGES[change]
    whole, _ = unbroken
    run = run_of(model, tmp_path / "out", **{name: its for name, its in changes.items() if name != "train"})
    train = whole.train.model_copy(update=changes.get("train", {}))
    run = run.model_copy(update={"train": train})
    saved = checkpoint_folder(whole.output, 4)
    with pytest.raises(ConfigError, match=message):
        trained(run, Start(checkpoint=saved))
    with pytest.raises(ConfigError, match=r"--allow-changed train\.bach_size: there is no such key"):
        trained(run, Start(checkpoint=saved, allow_changed=("train.bach_size",)))
    key = message.split(":")[0].replace("\\", "")
    allowed = Start(checkpoint=saved, allow_changed=("data" if change == "data" else key,))
    assert trained(run, allowed).steps == 6


def test_rates_steps_and_evaluation_may_change_and_that_is_said(
    model: Path, tmp_path: Path, unbroken: tuple[RunConfig, Summary], caplog: pytest.LogCaptureFixture
) -> None:
    whole, _ = unbroken
    changed = whole.train.model_copy(update={"steps": 8, "lr": 5e-3})
    around = {"source": "synthetic", "samples": 12, "eval_samples": 3, "max_skipped": 0.2}
    run = run_of(model, tmp_path / "out", data=around).model_copy(update={"train": changed})
    with caplog.at_level(logging.WARNING):
        trained(run, Start(checkpoint=checkpoint_folder(whole.output, 6)))
    assert said(caplog)[1:] == [
        "changed since: data.eval_samples: 2 → 3",
        "changed since: data.max_skipped: 0.05 → 0.2",
        "changed since: train.lr: 0.01 → 0.005",
        "changed since: train.steps: 6 → 8",
    ]
    assert [record["step"] for record in records(run)] == [6, 7]
    fewer = run.model_copy(update={"train": changed.model_copy(update={"steps": 5}), "output": tmp_path / "fewer"})
    with pytest.raises(ConfigError, match=r"train\.steps=5: .*step-6 is 6 steps old already"):
        trained(fewer, Start(checkpoint=checkpoint_folder(whole.output, 6)))


def test_a_checkpoint_of_another_model_is_refused_by_the_first_parameter_that_differs(
    tmp_path: Path, unbroken: tuple[RunConfig, Summary]
) -> None:
    whole, _ = unbroken
    other = run_of(model_folder("qwen3_vl", tmp_path / "other"), tmp_path / "out")
    start = Start(checkpoint=checkpoint_folder(whole.output, 4), allow_changed=("model",))
    with pytest.raises(CheckpointError, match=r"step-4: it is of another model: \S+ has shape \(.*\) in it and has shape \("):
        trained(other, start)


def test_a_flipped_bit_is_noticed_where_that_is_asked_for(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"every": 2, "verify_on_load": True}
    run = run_of(model, tmp_path / "out", train={"steps": 6, "batch_size": 3, "checkpoint": settings})
    cut_off(run, after=5)
    flip(checkpoint_folder(run.output, 4))
    with pytest.raises(CheckpointError, match=r"step-4: damaged: rank-0-0\.safetensors is not what was written"):
        trained(run, Start(checkpoint=checkpoint_folder(run.output, 4)))
    with caplog.at_level(logging.WARNING):
        cut_off(run, 1, AGAIN)
    assert re.search(r"step-4: damaged: .* it is set aside, as step-4\.aside-\d+$", said(caplog)[0])
    assert said(caplog)[1] == f"going on from {checkpoint_folder(run.output, 2)}, after step 2"
    flip(checkpoint_folder(run.output, 2))
    with pytest.raises(CheckpointError, match="step-2: damaged"):
        trained(run, AGAIN)
    assert checkpoint_folder(run.output, 2).exists()


def flip(checkpoint: Path) -> None:
    (file,) = checkpoint.glob("rank-0-*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def test_checkpoints_by_the_clock(model: Path, tmp_path: Path) -> None:
    settings = {"every": None, "every_minutes": 1e-6, "keep": 2}
    run = run_of(model, tmp_path / "out", train={"steps": 3, "batch_size": 3, "checkpoint": settings})
    trained(run)
    assert [folder.name for folder in checkpoint_folders(run.output)] == ["step-2", "step-3"]


def test_a_run_may_go_without(model: Path, tmp_path: Path) -> None:
    run = run_of(model, tmp_path / "out", train={"steps": 2, "batch_size": 3, "checkpoint": None})
    trained(run)
    assert not (run.output / "checkpoints").exists()


def test_a_disk_without_room_for_a_checkpoint_is_found_before_the_first_step(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(model, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))  # type: ignore[attr-defined]
    with pytest.raises(
        ConfigError, match=r"output: .*out' cannot be written \(\S+ GB are needed, 1e-06 GB are free on the disk of"
    ):
        trained(run)
    assert not (run.output / "metrics.jsonl").exists()
