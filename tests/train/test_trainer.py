"""A run trains, logs, evaluates, exports; and ends with one message when it cannot."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import CONFIGS, write_model_folder
from transformers import AutoModelForImageTextToText

from meshweave.config import RunConfig, parse_config
from meshweave.errors import CheckpointError, ConfigError, DataError
from meshweave.model.blueprint import read_model_config
from meshweave.model.encoder import EncoderStage
from meshweave.report.summary import Summary
from meshweave.step.schedules import typical_step
from meshweave.train.trainer import train
from meshweave.world import World, _join_slurm, launch


def run_of(tmp_path: Path, **changes: Any) -> RunConfig:
    folder = write_model_folder(CONFIGS["llava"](), tmp_path / "model", weights=True)
    tree: dict[str, Any] = {
        "model": str(folder),
        "modules": {"vision": {"ranks": "0-1", "dp": 2}, "language": {"ranks": "0-1", "tp": 2}},
        "data": {"source": "synthetic", "samples": 64, "eval_samples": 10},
        "train": {"steps": 12, "batch_size": 8, "lr": 3e-3, "warmup_steps": 2},
        "output": str(tmp_path / "out"),
        "timeout_seconds": 60,
    }
    return parse_config(tree | changes)


def trained(run: RunConfig) -> Summary:
    config = read_model_config(run.model)
    summary = launch(run, lambda world, run: train(world, run, config))
    assert summary is not None
    return summary


def test_a_run_writes_metrics_curve_and_a_model_that_transformers_loads(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    summary = trained(run)
    records = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(12))
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[0]["lr"]["vision"] == pytest.approx(1.5e-3)
    assert summary.evaluated == 10
    assert summary.flops["vision"] > 0 < summary.flops["language"]
    assert summary.crossings["vision"].forward_bytes > 0
    assert (run.output / "loss.png").stat().st_size > 1000
    assert list((run.output / "tensorboard").iterdir())
    before = AutoModelForImageTextToText.from_pretrained(run.model, dtype=torch.float32).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(run.output / "model", dtype=torch.float32).state_dict()
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any(name.startswith("model.vision_tower") for name in moved)
    assert any(name.startswith("model.language_model") for name in moved)


def test_the_exported_model_does_not_depend_on_the_layout(tmp_path: Path) -> None:
    layouts = {
        "one": {"vision": {"ranks": 0}, "language": {"ranks": 0}},
        "two": {"vision": {"ranks": "0-1", "dp": 2}, "language": {"ranks": "0-1", "tp": 2}},
        "apart": {"vision": {"ranks": "1"}, "language": {"ranks": "0"}},
    }
    weights = []
    for name, modules in layouts.items():
        run = run_of(tmp_path, modules=modules, dtype="float64", output=str(tmp_path / name))
        trained(run)
        weights.append(AutoModelForImageTextToText.from_pretrained(run.output / "model", dtype=torch.float64).state_dict())
    for other in weights[1:]:
        for name, value in weights[0].items():
            # The input folder is of float32, so what differs by rounding in float64 may leave one float32 apart.
            torch.testing.assert_close(other[name], value, rtol=2e-7, atol=1e-9)


def test_a_learning_rate_per_module_is_used(tmp_path: Path) -> None:
    modules = {"vision": {"ranks": 0, "lr": 1e-5}, "language": {"ranks": 0}}
    run = run_of(tmp_path, modules=modules)
    trained(run)
    last = json.loads((run.output / "metrics.jsonl").read_text().splitlines()[2])
    assert last["lr"]["vision"] / last["lr"]["language"] == pytest.approx(1e-5 / 3e-3)


def test_bfloat16_trains_close_to_float32(tmp_path: Path) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        losses[dtype] = trained(run_of(tmp_path, dtype=dtype, output=str(tmp_path / dtype))).loss
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bfloat16"] != losses["float32"]


def test_a_bfloat16_pipeline_trains_close_to_one_rank_in_float32(tmp_path: Path) -> None:
    """Float32 gradient sums, also of the weight gradients that zero-bubble puts off; evaluated as a pipeline, too."""
    options = {"steps": 8, "batch_size": 8, "microbatches": 4, "lr": 3e-3, "warmup_steps": 2}
    one = {"vision": {"ranks": 0}, "language": {"ranks": 0}}
    pipeline = {"vision": {"ranks": "0-1"}, "language": {"ranks": "0-1", "pp": 2}}
    schedule = {"encoders": "nested", "language": "zero_bubble"}
    plain = trained(run_of(tmp_path, modules=one, train=options, output=str(tmp_path / "one")))
    piped = trained(
        run_of(tmp_path, modules=pipeline, train=options, schedule=schedule, dtype="bfloat16", output=str(tmp_path / "pipeline"))
    )
    assert piped.loss == pytest.approx(plain.loss, rel=0.02)
    assert piped.eval_loss == pytest.approx(plain.eval_loss, rel=0.02)
    assert piped.evaluated == plain.evaluated == 10


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_more_media_tokens_than_the_data_counts_are_refused(
    frozen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen encoder's surplus would otherwise shift every later token of the lane in silence."""
    whole = EncoderStage.forward

    def longer(stage: EncoderStage, *arguments: Any) -> Any:
        return tuple(torch.cat([tensor, tensor[:1]]) for tensor in whole(stage, *arguments))

    monkeypatch.setattr(EncoderStage, "forward", longer)
    modules = {"vision": {"ranks": "0-1", "frozen": frozen}, "language": {"ranks": "0-1"}}
    with pytest.raises(DataError, match=r"vision, pass 0, on rank \d: the encoder made \d+ media tokens of \d+ items"):
        trained(run_of(tmp_path, modules=modules))


def test_ranks_that_see_other_data_follow_the_same_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What rank 1 cannot read when schedules are planned must not make it plan another one."""
    seen: list[int] = []

    def blind(run: RunConfig, dataset: Any) -> Any:
        seen.append(dist.get_rank())
        assert seen == [0], "only rank 0 looks at the data to plan"
        return typical_step(run, dataset)

    monkeypatch.setattr("meshweave.step.schedules.typical_step", blind)
    modules = {"vision": {"ranks": 0}, "language": {"ranks": "1-2", "pp": 2}}
    options = {"steps": 2, "batch_size": 8, "microbatches": 4}
    data = {"source": "synthetic", "samples": 64}
    assert trained(run_of(tmp_path, modules=modules, train=options, data=data)).steps == 2


def test_a_non_finite_gradient_skips_the_update_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from meshweave.train import trainer

    original = trainer.run_step
    calls = []

    def poisoned(model: Any, *args: Any, **options: Any) -> Any:
        calls.append(1)
        totals = original(model, *args, **options)
        if len(calls) == 3:
            return replace(totals, loss_sum=float("nan"))
        return totals

    monkeypatch.setattr(trainer, "run_step", poisoned)
    run = run_of(tmp_path, modules={"vision": {"ranks": 0}, "language": {"ranks": 0}})
    trained(run)
    records = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    assert [record["updated"] for record in records[:5]] == [1, 1, 0, 1, 1]


def test_an_error_on_one_rank_arrives_as_the_same_error(tmp_path: Path) -> None:
    def broken(world: World, run: RunConfig) -> None:
        if world.rank == 1:
            raise DataError("picture 7 is broken")

    with pytest.raises(DataError, match="picture 7 is broken"):
        launch(run_of(tmp_path), broken)


def test_a_launched_world_of_the_wrong_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="describes 2 ranks, but the launcher started 8"):
        launch(run_of(tmp_path), lambda world, run: None)


def test_slurm_tasks_become_ranks_and_a_batch_script_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    _join_slurm()
    assert "WORLD_SIZE" not in os.environ
    for name, value in {"STEP_NUM_TASKS": "8", "LOCALID": "1", "JOB_ID": "123456"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "node0")
    _join_slurm()
    assert [os.environ[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")] == ["8", "5", "1", "32956"]


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    (run.model / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*.safetensors file"):
        trained(run)
