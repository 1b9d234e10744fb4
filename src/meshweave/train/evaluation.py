"""How good is the model on held-out data?"""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from meshweave.config import RunConfig
from meshweave.data.dataset import Dataset
from meshweave.parallel.build import LocalModel
from meshweave.step.loading import build_loader
from meshweave.step.run import run_step, stopped
from meshweave.step.schedules import agreed_schedule
from meshweave.step.worker import Travel
from meshweave.world import World


@dataclass(frozen=True)
class Evaluation:
    """Held-out totals."""

    loss: float | None
    """Per target token; None without any."""
    exact: int
    samples: int


def evaluate(
    world: World, run: RunConfig, config: PreTrainedConfig, model: LocalModel, dataset: Dataset, travel: Travel
) -> Evaluation:
    """One forward pass over held-out data, in the run's layouts.

    A sample is exact if every target token is the most likely one given those before it: what greedy decoding would write.

    Raises:
        StoppedError: some rank was asked to stop; on all ranks alike.
    """
    schedule = agreed_schedule(world, run, config, dataset, training=False)
    loader = build_loader(run, dataset, world, schedule, model.part.rule, training=False)
    for part in model.modules.values():
        for stage in part.stages.values():
            stage.eval()
    results = []
    steps = loader.steps(0, loader.steps_per_epoch)
    for step in steps:
        results.append(run_step(model, step, world, schedule, travel))
        if results[-1].asked:
            steps.close()
            raise stopped(world)
    for part in model.modules.values():
        for stage in part.stages.values():
            stage.train()
    targets = sum(totals.targets for totals in results)
    return Evaluation(
        sum(totals.loss_sum for totals in results) / targets if targets else None,
        sum(totals.exact for totals in results),
        sum(totals.samples for totals in results),
    )
