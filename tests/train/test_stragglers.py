"""The rank that others wait for is named, and no rank that just waits, or that has other work."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.folders import model_folder

from meshweave.config import parse_config
from meshweave.data.loader import Loader
from meshweave.layout import placements
from meshweave.model.blueprint import read_model_config
from meshweave.step.worker import StepWorker
from meshweave.train.stragglers import FACTOR, Pace, Stragglers, same_work, slowest
from meshweave.train.trainer import train
from meshweave.world import launch


def modules_of(vision: dict[str, Any], language: dict[str, Any]) -> dict[str, Any]:
    tree = {"model": "/nowhere", "modules": {"vision": vision, "language": language}, "train": {"steps": 1, "batch_size": 1}}
    return dict(placements(parse_config(tree)))


def test_one_of_thousands_of_ranks_is_found_among_those_with_its_work() -> None:
    where = modules_of({"ranks": "0-1023", "dp": 1024}, {"ranks": "1024-4095", "pp": 3, "dp": 128, "tp": 8})
    started = time.perf_counter()
    works = same_work(where, 4096)
    assert len(set(works)) == 4
    # Encoders have a third of the language model's work, and the last stage twice that of the others.
    usual = dict(zip(sorted(set(works), key=str), (1.0, 1.0, 2.0, 0.3), strict=True))
    busy = [usual[work] * (1 + 0.01 * (rank % 7)) for rank, work in enumerate(works)]
    _, factor = slowest(busy, works)
    assert factor < FACTOR
    busy[777] = 0.9
    rank, factor = slowest(busy, works)
    assert (rank, factor) == (777, pytest.approx(2.9, abs=0.1))
    assert time.perf_counter() - started < 2.0


@pytest.mark.parametrize(
    ("busy", "expected"),
    [([1.0, 1.0], (0, 1.0)), ([1.0, 4.0], (1, 4.0)), ([0.0, 0.0], (0, 1.0)), ([3.0], (0, 1.0)), ([2.0, 1.0, 9.0], (2, 4.5))],
)
def test_the_median_is_a_time_that_a_rank_has(busy: list[float], expected: tuple[int, float]) -> None:
    assert slowest(busy, ["the same"] * len(busy)) == expected


def test_a_rank_is_named_once_after_some_steps_in_a_row() -> None:
    named = Stragglers.__new__(Stragglers)
    named._slow = None, 0
    pace = Pace(2.0, 0.1, 0.0, 0.0)
    lines = [named._named(rank, factor, pace, 2) for rank, factor in [(1, 2.0)] * 5 + [(1, 1.1)] + [(1, 2.0), (0, 2.0)] * 4]
    assert [at for at, line in enumerate(lines) if line] == [2]
    assert str(lines[2]).startswith("rank 1 is slow: its own work, waits left out, takes 2.000 s a step, 2.0 × the median")


def sleeping(method: Callable[..., Any], rank_of: Callable[[Any], int], seconds: float) -> Callable[..., Any]:
    def slow(self: Any, *args: Any) -> Any:
        if rank_of(self) == 1:
            time.sleep(seconds)
        return method(self, *args)

    return slow


# Without a pipeline, ranks that shard parameters wait for each other inside their work.
PIPELINE = {"vision": {"ranks": "0-3", "dp": 4}, "language": {"ranks": "0-3", "pp": 2, "dp": 2}}
LANES = {"vision": {"ranks": "0-1", "dp": 2}, "language": {"ranks": "0-1", "dp": 2}}


@pytest.mark.parametrize(
    ("modules", "target", "name", "rank_of", "expected", "wait"),
    [
        (PIPELINE, StepWorker, "compute", lambda worker: worker.world.rank, "its own work", "boundary_wait"),
        (LANES, Loader, "_load_language", lambda loader: loader.rank, "loading its data", "data_wait"),
    ],
    ids=["compute", "loader"],
)
def test_a_rank_that_sleeps_is_named(
    modules: dict[str, Any],
    target: Any,
    name: str,
    rank_of: Callable[[Any], int],
    expected: str,
    wait: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(world: Any, run: Any) -> None:
        logging.getLogger("meshweave").addHandler(logging.FileHandler(tmp_path / f"log-{world.rank}"))
        train(world, run, config)

    run = parse_config(
        {
            "model": str(model_folder("llava", tmp_path / "model")),
            "modules": modules,
            "data": {"source": "synthetic", "samples": 8},
            "train": {"steps": 5, "batch_size": 4, "log_every": 5, "checkpoint": None},
            "weights": "seeded",
            "output": str(tmp_path / "out"),
        }
    )
    config = read_model_config(run.model)
    monkeypatch.setattr(target, name, sleeping(getattr(target, name), rank_of, 0.3))
    launch(run, work)
    lines = (tmp_path / "log-0").read_text().splitlines()
    assert [line for line in lines if line.startswith(f"rank 1 is slow: {expected}")], lines
    assert "is slow" not in (tmp_path / "log-1").read_text()
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert ["slowest_rank" in record for record in records] == [False] * 4 + [True]
    assert records[-1]["slowest_rank"] == 1
    assert records[-1]["busy"]["max"] > 0.3
    assert records[-1][wait]["max"] > 0.15
