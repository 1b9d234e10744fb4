"""What do the benchmarks share? One rank's training step, as `meshweave train` takes it, with whatever data it is handed."""

from dataclasses import dataclass, replace

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedConfig

from meshweave.config import RunConfig
from meshweave.data.dataset import Dataset
from meshweave.data.loader import Loader, LocalStep
from meshweave.model.blueprint import TRAVELS_AS
from meshweave.model.modules import media_widths
from meshweave.parallel.build import LocalModel, build_model
from meshweave.schedule.schedule import Schedule
from meshweave.schedule.simulate import Span
from meshweave.step.loading import build_loader
from meshweave.step.run import Totals, finish_gradients, run_step
from meshweave.step.schedules import agreed_schedule
from meshweave.step.worker import Travel
from meshweave.train.optimizer import build_optimizer, build_schedule
from meshweave.world import World


@dataclass(frozen=True)
class Training:
    """A model in its layouts and what a step of it needs. State: the model's weights, the optimizer and its rates."""

    world: World
    run: RunConfig
    model: LocalModel
    schedule: Schedule
    loader: Loader
    optimizer: Optimizer
    rates: LRScheduler
    travel: Travel

    def take(self, local: LocalStep, clocked: list[Span] | None = None) -> Totals:
        """Takes one step, update included; `clocked` gets the span of every computation of this rank, if given."""
        totals = run_step(self.model, local, self.world, self.schedule, self.travel, clocked)
        if finish_gradients(self.model, totals, self.run.train.max_grad_norm):
            self.optimizer.step()
        self.rates.step()
        self.optimizer.zero_grad()
        return totals


def build_training(world: World, run: RunConfig, config: PreTrainedConfig, dataset: Dataset) -> Training:
    """A collective over all ranks of the run."""
    schedule = agreed_schedule(world, run, config, dataset)
    model = build_model(run, config, world.placements, world.meshes, world.rank, world.device)
    optimizer = build_optimizer(run, {name: part.parameters for name, part in model.modules.items()})
    loader = build_loader(run, dataset, world, schedule, model.part.rule)
    travel = Travel(media_widths(config), config.get_text_config().hidden_size, TRAVELS_AS[run.dtype])
    return Training(world, run, model, schedule, loader, optimizer, build_schedule(run, optimizer), travel)


def with_data(training: Training, config: PreTrainedConfig, dataset: Dataset) -> Training:
    """The same training on other data; a collective over all ranks of the run."""
    schedule = agreed_schedule(training.world, training.run, config, dataset)
    loader = build_loader(training.run, dataset, training.world, schedule, training.model.part.rule)
    return replace(training, schedule=schedule, loader=loader)
