"""How does a test compare a layout with the plain model? Small runs, and `verify` of them."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from meshweave.batch.plan import SampleMeta
from meshweave.config import RunConfig, parse_config
from meshweave.data.synthetic import SyntheticDataset
from meshweave.model.blueprint import read_model_config
from meshweave.verification.compare import VerifyReport, verify
from meshweave.world import launch

STEPS = 2


def module(ranks: str, dp: int = 1, tp: int = 1, **options: Any) -> dict[str, Any]:
    return {"ranks": ranks, "dp": dp, "tp": tp, **options}


def run_of(folder: Path, vision: dict[str, Any] | None, language: dict[str, Any], **changes: Any) -> RunConfig:
    """A run of two modules, and of others where `modules` names them; `train` and other keys replace what is set here."""
    train = {
        "steps": STEPS,
        "batch_size": 10,
        "microbatches": 2,
        "lr": 1e-3,
        "weight_decay": 0.1,
        "warmup_steps": 1,
    } | changes.pop("train", {})
    tree = {
        "model": str(folder),
        "modules": {**({"vision": vision} if vision else {}), **changes.pop("modules", {}), "language": language},
        "train": train,
        "dtype": "float64",
        "weights": "seeded",
        "seed": 3,
        "timeout_seconds": 60,
    }
    return parse_config(tree | changes)


def verified(run: RunConfig, steps: int = STEPS) -> VerifyReport:
    """Runs on as many processes as the run has ranks."""
    report = launch(run, partial(verify, config=read_model_config(run.model), steps=steps))
    assert report is not None
    return report


class TextOnly(SyntheticDataset):
    """Its samples without media alone; a test puts it in the place of `meshweave.verification.compare.SyntheticDataset`."""

    def __init__(self, config: Any, samples: int, seed: int) -> None:
        super().__init__(config, 4 * samples, seed)

    def __len__(self) -> int:
        return self.samples // 4

    def meta(self, index: int) -> SampleMeta:
        return replace(super().meta(4 * index + 1), sample=index)

    def text(self, index: int) -> Any:
        return super().text(4 * index + 1)
