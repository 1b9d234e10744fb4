"""A step without targets, or whose samples cannot be read, changes nothing and has no loss; a run of such steps fails."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.folders import model_folder

from meshweave.config import RunConfig, parse_config
from meshweave.errors import DataError
from meshweave.model.blueprint import read_model_config
from meshweave.parallel.build import build_model
from meshweave.report.summary import Summary
from meshweave.step.run import finish_gradients
from meshweave.train import trainer
from meshweave.train.trainer import train
from meshweave.world import World, launch

GOOD = {"image": "a.png", "query": "<image>What?", "response": "A cat."}
MISSING = GOOD | {"image": "none.png"}
UNANSWERED = {"image": "a.png", "query": "<image>What?"}


def run_on(records: list[dict[str, Any]], folder: Path, ranks: int = 1, **changes: Any) -> RunConfig:
    Image.new("RGB", (40, 30)).save(folder / "a.png")
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    where = {"ranks": f"0-{ranks - 1}"}
    tree = {
        "model": str(model_folder("llava", folder / "model")),
        "modules": {"vision": where, "language": where},
        "data": {"path": str(folder / "data.jsonl")},
        "train": {"steps": len(records) // 4, "batch_size": 4, "lr": 1e-2, "weight_decay": 0.1},
        "weights": "seeded",
        "output": str(folder / "out"),
    }
    return parse_config(tree | changes)


def trained(run: RunConfig) -> Summary | None:
    config = read_model_config(run.model)
    return launch(run, lambda world, run: train(world, run, config))


def metrics(run: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("bad", "kind", "message"), [(UNANSWERED, "no target", "no answer"), (MISSING, "missing file", "none.png: no such image")]
)
def test_a_run_that_has_nothing_to_learn_from_fails_and_leaves_no_model(
    bad: dict[str, Any], kind: str, message: str, ranks: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_on([bad] * 8, tmp_path, ranks)
    with pytest.raises(DataError, match=rf"nothing was trained, so no model is written: .*\(8 × {kind}\)"):
        trained(run)
    assert not (run.output / "model").exists()
    records = metrics(run)
    assert [(record["loss"], record["updated"]) for record in records] == [(None, 0)] * 2
    assert [record["faults"] for record in records] == [{kind: 4}] * 2
    if ranks == 1:
        assert message in caplog.text


def test_a_step_without_targets_moves_nothing_and_the_next_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither weights nor moments, not even by weight decay."""
    run = run_on([GOOD] * 4 + [UNANSWERED] * 4 + [GOOD] * 4, tmp_path)
    states: list[list[torch.Tensor]] = []

    def noted(model: Any, totals: Any, norm: Any) -> bool:
        states.append([p.detach().clone() for part in model.modules.values() for p in part.parameters.values()])
        return finish_gradients(model, totals, norm)

    monkeypatch.setattr(trainer, "finish_gradients", noted)
    monkeypatch.setattr("meshweave.data.loader.Loader.sample_ids", lambda self, number: list(range(4 * number, 4 * number + 4)))
    summary = trained(run)
    assert summary is not None
    first, second, third = states
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(second, third, strict=True))
    assert [record["loss"] is None for record in metrics(run)] == [False, True, False]
    assert (summary.skipped, summary.left_out, summary.faults) == (0, 4, {"no target": 4})


def test_gradients_are_left_alone_where_nothing_is_a_target(tmp_path: Path) -> None:
    run = run_on([GOOD] * 4, tmp_path)
    config = read_model_config(run.model)

    def work(world: World, run: RunConfig) -> bool:
        model = build_model(run, config, world.placements, world.meshes, world.rank, world.device, world.expert_meshes)
        return finish_gradients(model, trainer_totals(), 1.0)

    assert launch(run, work) is False


def trainer_totals() -> Any:
    from meshweave.step.run import Totals

    return Totals(0.0, 0, 0, 0, {"vision": 0.0, "language": 0.0}, {})
