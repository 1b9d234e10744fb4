"""How is one step worked? Its schedule is executed, gradients are summed; then one update."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from signal import Signals

import torch
import torch.distributed as dist

from meshweave.config import LANGUAGE
from meshweave.data.loader import LocalStep
from meshweave.errors import StoppedError
from meshweave.parallel.build import LocalModel
from meshweave.schedule.runtime import Place, execute, lost_ranks_named
from meshweave.schedule.schedule import Schedule
from meshweave.schedule.simulate import Span
from meshweave.schedule.waits import Waits
from meshweave.step.gradients import scale_gradients, squared_norm, sum_partial_gradients, sum_tied_gradients
from meshweave.step.worker import StepWorker, Travel
from meshweave.world import World


@dataclass(frozen=True)
class Totals:
    """Sums over all samples of a step, the same on every rank."""

    loss_sum: float
    targets: int
    """Target tokens."""
    exact: int
    """Samples whose every target token was the most likely one; counted in evaluation only."""
    samples: int
    squared_norms: Mapping[str, float]
    """Module to its squared gradient norm, of the summed (not yet divided) gradients; empty without a backward."""
    crossed: Mapping[str, tuple[int, int]]
    """Encoder to the media tokens sent from rank to rank over its boundary, forward and backward."""
    aux_sum: float = 0.0
    """Load-balancing loss of every group of tokens (`model/routing.py`), times its target tokens; 0 without a backward."""
    load: tuple[tuple[float, ...], ...] = ()
    """Layer with a router → expert → (token, slot) pairs; of a step with a backward."""
    asked: int = 0
    """Ranks that were asked to stop before these sums."""
    save_due: bool = False
    """Whether any rank finds that it is time for a checkpoint."""

    @property
    def loss(self) -> float | None:
        """Mean loss per target token; None without any."""
        return self.loss_sum / self.targets if self.targets else None

    @property
    def router_aux_loss(self) -> float:
        """Mean load-balancing loss, its coefficient left out: 1 where experts are loaded evenly."""
        return self.aux_sum / max(1, self.targets)

    @property
    def imbalance(self) -> float:
        """Load of a layer's busiest expert, relative to the mean of that layer; mean over layers. 0 without experts."""
        busiest = [max(layer) * len(layer) / max(1.0, sum(layer)) for layer in self.load]
        return sum(busiest) / max(1, len(busiest))

    @property
    def grad_norm(self) -> float:
        """Norm of the gradient of the step's whole loss, over all modules."""
        return math.sqrt(sum(self.squared_norms.values())) / max(1, self.targets)


def run_step(
    model: LocalModel,
    step: LocalStep,
    world: World,
    schedule: Schedule,
    travel: Travel,
    clocked: list[Span] | None = None,
    *,
    save_due: bool = False,
    waits: Waits | None = None,
) -> Totals:
    """Works a step as the schedule says and leaves summed gradients on the parameters, where the schedule has any backward.

    Args:
        clocked: gets the span of every computation of this rank, if given.
        save_due: whether this rank's clock says that it is time for a checkpoint: one clock goes first, and all follow it.
        waits: gets what this rank waits for others, if given.

    Raises:
        RankError: a peer hangs or is gone.
    """
    worker = StepWorker(model, step, world, schedule, travel)
    in_order = world.device.type == "cuda"
    waits = Waits(in_order) if waits is None else waits
    execute(Place(schedule, world.rank, world.timeout_seconds, in_order, waits), worker, clocked)
    backward = schedule.work.modules[LANGUAGE].backward
    norms = torch.zeros(len(world.placements), dtype=torch.float64, device=world.device)
    last = lost_ranks_named(world.rank, world.timeout_seconds, "sums over all ranks after the step's last action")
    with last, waits.clocked():
        for index, (name, placement) in enumerate(world.placements.items() if backward else ()):
            if name in model.modules:
                sum_partial_gradients(model.modules[name], world.meshes[name])
                sum_tied_gradients(model.modules[name], placement, world.rank)
                norms[index] = squared_norm(model.modules[name], placement, world.rank)
        asked = worker.sums.new_tensor([0.0 if world.stop.signal is None else 1.0, float(save_due)])
        totals = torch.cat([worker.sums, asked, norms, worker.load.flatten()])
        if world.size > 1:
            dist.all_reduce(totals)
    loss_sum, targets, exact, samples, aux_sum, stops, saves, *rest = totals.tolist()
    squared_norms = dict(zip(world.placements, rest[: len(norms)], strict=True)) if backward else {}
    load = tuple(map(tuple, totals[len(totals) - worker.load.numel() :].view_as(worker.load).tolist()))
    crossed = _crossed(step, schedule)
    return Totals(loss_sum, int(targets), int(exact), int(samples), squared_norms, crossed, aux_sum, load, int(stops), saves > 0)


def _crossed(step: LocalStep, schedule: Schedule) -> dict[str, tuple[int, int]]:
    crossed = dict.fromkeys(schedule.work.encoders, (0, 0))
    for (encoder, _), crossing in step.crossings.items():
        there, back = crossed[encoder]
        returned = crossing.transpose().tokens_moved if schedule.work.modules[encoder].backward else 0
        crossed[encoder] = there + crossing.tokens_moved, back + returned
    return crossed


def stopped(world: World) -> StoppedError:
    """The end of a run in which a rank was asked to stop (`Totals.asked`), to be raised on all ranks. A collective over them."""
    signals = torch.zeros(world.size, dtype=torch.int64, device=world.device)
    signals[world.rank] = world.stop.signal or 0
    if world.size > 1:
        with lost_ranks_named(world.rank, world.timeout_seconds, "asking who was asked to stop"):
            dist.all_reduce(signals)
    asked = {rank: Signals(number) for rank, number in enumerate(signals.tolist()) if number}
    sent = f", sent to rank {', '.join(map(str, asked))}," if len(asked) < world.size else ""
    return world.stop.stopped(next(iter(asked.values())), sent)


def finish_gradients(model: LocalModel, totals: Totals, max_grad_norm: float | None) -> bool:
    """Divides gradients by the step's number of target tokens and clips them by the one global norm.

    Returns False, on all ranks alike, where loss or norm is not finite, or nothing was a target: there must be no update then.
    """
    if not totals.targets:
        return False
    norm = totals.grad_norm
    if not (math.isfinite(norm) and math.isfinite(totals.loss_sum)):
        return False
    clip = min(1.0, max_grad_norm / (norm + 1e-6)) if max_grad_norm is not None else 1.0
    scale_gradients(model.modules, clip / max(1, totals.targets))
    return True
