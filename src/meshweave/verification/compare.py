"""Does a layout train the same model? Runs it beside the plain single-process model and reports the worst difference."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedConfig

from meshweave.batch.plan import StepPlan
from meshweave.checkpoint.collect import Gathered, gather, held_gradients, held_parameters
from meshweave.config import LANGUAGE, RunConfig
from meshweave.data.build import build_datasets
from meshweave.data.dataset import Dataset
from meshweave.data.loader import Loader, LocalStep
from meshweave.data.processed import ProcessedDataset
from meshweave.data.synthetic import SyntheticDataset
from meshweave.errors import ConfigError
from meshweave.model.blueprint import STORED, blueprint_of
from meshweave.model.flops import count_flops
from meshweave.model.modules import ENCODERS, graph_of, has_encoder, media_widths, module_config
from meshweave.parallel.build import build_model
from meshweave.step.loading import build_loader
from meshweave.step.run import Totals, finish_gradients, run_step, stopped
from meshweave.step.schedules import agreed_schedule
from meshweave.step.worker import Travel
from meshweave.train.optimizer import build_optimizer, build_schedule
from meshweave.verification.oracle import Expected, Oracle
from meshweave.verification.precision import full_precision
from meshweave.verification.reference_data import SHARED
from meshweave.world import World

TOLERANCES = {"float64": 1e-9, "float32": 1e-4}
"""Largest relative error that passes, by dtype."""

_FLOOR = 1e-3
"""Share of the global norm below which a parameter's own norm is too much rounding to divide by: some gradients (a key bias
before a softmax) are zero but for rounding. An error of 1e-3 × tolerance of the global norm still fails."""


@dataclass(frozen=True)
class Worst:
    """The largest relative error of a kind, and where."""

    error: float = 0.0
    name: str = ""
    step: int = 0


@dataclass(frozen=True)
class VerifyReport:
    """How far a layout is from the single process, over all steps and all parameters."""

    steps: int
    dtype: str
    tolerance: float
    loss: Worst
    gradient: Worst
    weight: Worst
    parameters: int
    """Parameter tensors compared."""
    samples: int
    media_items: int
    shared: str
    """What the reference takes from the run, so that it is not covered."""

    @property
    def passed(self) -> bool:
        """Whether every error is finite and within the tolerance, and something was compared."""
        errors = (self.loss.error, self.gradient.error, self.weight.error)
        return self.parameters > 0 and all(error <= self.tolerance for error in errors)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"passed": self.passed}


def verify(world: World, run: RunConfig, config: PreTrainedConfig, steps: int) -> VerifyReport:
    """Takes `steps` optimizer steps in the run's layouts and in the plain model; compares loss, every gradient, every weight.

    The batches are those of the run's data, or random ones where it names none. Rank 0 runs the
    plain model and compares with it what the ranks of all modules send.

    Raises:
        ConfigError: the run's dtype has no tolerance.
        StoppedError: some rank was asked to stop; on all ranks alike.
    """
    if run.dtype not in TOLERANCES:
        raise ConfigError(f"dtype {run.dtype}: verify compares in {' or '.join(TOLERANCES)}")
    if run.dtype == "float32":
        # AdamW turns the rounding of a near-zero gradient into a full-size step; this keeps the comparison about layouts.
        run = run.model_copy(update={"train": run.train.model_copy(update={"eps": max(run.train.eps, 1e-6)})})
    config = _without_dropout(config)
    dtype = STORED[run.dtype]
    dataset: Dataset
    if run.data is None:
        dataset = SyntheticDataset(config, run.train.batch_size * steps, run.seed)
    else:
        dataset, _ = build_datasets(run, config)
    model = build_model(run, config, world.placements, world.meshes, world.rank, world.device, world.expert_meshes)
    schedule = agreed_schedule(world, run, config, dataset)
    blueprint = graph_of(blueprint_of(config, dtype))
    loader = build_loader(run, dataset, world, schedule, model.part.rule, flops=count_flops(blueprint, LANGUAGE))
    optimizer = build_optimizer(run, {name: part.parameters for name, part in model.modules.items()})
    rates = build_schedule(run, optimizer)
    travel = Travel(media_widths(config), config.get_text_config().hidden_size, dtype)
    initial = gather(world, held_parameters(model)).values if run.weights == "seeded" else None
    oracle = Oracle(run, config, initial, dtype) if world.rank == 0 else None
    loss, gradient, drift = Worst(), Worst(), Worst()
    samples = items = 0
    for number in range(steps):
        step = loader.step(number)
        with full_precision(dtype):
            totals = run_step(model, step, world, schedule, travel)
        gathered = gather(world, held_gradients(model))
        drift = max(drift, _replica_drift(gathered, number), key=lambda worst: worst.error)
        if oracle is not None:
            with full_precision(dtype):
                expected = oracle.backward(dataset, _readable(loader, number, step), _token_groups(run, step.plan))
            loss = max(loss, _loss_error(totals, expected, number), key=lambda worst: worst.error)
            actual = {name: value / max(1, totals.targets) for name, value in gathered.values.items()}
            found = _worst(actual, expected.gradients, number), _norm_error(totals, expected, number)
            gradient = max(gradient, *found, key=lambda worst: worst.error)
            oracle.update()
        if finish_gradients(model, totals, run.train.max_grad_norm):
            optimizer.step()
        rates.step()
        optimizer.zero_grad()
        samples += totals.samples
        items += sum(len(found) for plan in step.plan.microbatches for found in plan.items.values())
        if totals.asked:
            raise stopped(world)
    weights = gather(world, held_parameters(model)).values
    shared = SHARED if isinstance(dataset, ProcessedDataset) else "the random samples"
    gradient = max(gradient, drift, key=lambda worst: worst.error)
    weight, compared = Worst(), 0
    if oracle is not None:
        parameters = oracle.parameters()
        weight, compared = _worst(weights, parameters, steps - 1), len(parameters)
    mine = VerifyReport(steps, run.dtype, TOLERANCES[run.dtype], loss, gradient, weight, compared, samples, items, shared)
    return _from_first(mine, world)


def _without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """Random masks differ between any two runs; the comparison is about everything else."""
    config = copy.deepcopy(config)
    modules = [module_config(config, name) for name in (LANGUAGE, *ENCODERS) if name == LANGUAGE or has_encoder(config, name)]
    for part in (config, *modules):
        for key, value in part.to_dict().items():
            if key.endswith(("dropout", "_pdrop", "jitter_noise")) and value:
                setattr(part, key, 0.0)
    return config


def _replica_drift(gathered: Gathered, step: int) -> Worst:
    """The largest relative difference between ranks that hold the same part of a gradient: replicas must not drift apart."""
    norms = {name: float(value.double().norm()) for name, value in gathered.values.items()}
    floor = _FLOOR * sum(norm**2 for norm in norms.values()) ** 0.5
    worst = Worst(step=step)
    for (name, rank), apart in gathered.drift.items():
        error = _finite(apart / max(norms[name], floor, 1e-300))
        if error > worst.error:
            worst = Worst(error, f"{name} (replica on rank {rank})", step)
    return worst


def _readable(loader: Loader, number: int, step: LocalStep) -> list[int]:
    """The samples of a step in dataset order, less those that all ranks skip."""
    ids = loader.sample_ids(number)
    planned = {sample.sample for part in step.plan.microbatches for lane in part.lanes for sample in lane}
    return [sample for sample in ids if sample in planned] if step.faults else ids


def _token_groups(run: RunConfig, plan: StepPlan) -> list[list[int]]:
    """Samples among whose tokens experts shall be loaded evenly: those of each lane's microbatch, or of each microbatch."""
    lanes = [[[sample.sample for sample in lane] for lane in part.lanes] for part in plan.microbatches]
    if run.train.router_aux_scope == "lane":
        return [lane for part in lanes for lane in part]
    return [[sample for lane in part for sample in lane] for part in lanes]


def _loss_error(totals: Totals, expected: Expected, step: int) -> Worst:
    if totals.targets != expected.targets:
        return Worst(float("inf"), f"{totals.targets} target tokens, the plain model has {expected.targets}", step)
    pairs = {"loss": (totals.loss or 0.0, expected.loss), "router_aux_loss": (totals.router_aux_loss, expected.router_aux_loss)}
    errors = [Worst(_finite(abs(mine - its) / max(abs(its), 1e-12)), name, step) for name, (mine, its) in pairs.items()]
    return max(errors, key=lambda worst: worst.error)


def _norm_error(totals: Totals, expected: Expected, step: int) -> Worst:
    """Of the one norm that gradients are clipped by, which AdamW would hide: to it, a factor of all gradients is nothing."""
    norm = sum(float(value.double().square().sum()) for value in expected.gradients.values()) ** 0.5
    return Worst(_finite(abs(totals.grad_norm - norm) / max(norm, 1e-300)), "grad_norm", step)


def _worst(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], step: int) -> Worst:
    squares = [float(value.double().square().sum()) for value in expected.values()]
    floor = _FLOOR * sum(squares) ** 0.5
    worst, zero = Worst(step=step), torch.zeros((), dtype=torch.float64)
    for name in {**expected, **actual}:
        mine, theirs = actual.get(name, zero).double(), expected.get(name, zero).double()
        error = _finite(float((mine - theirs).norm()) / max(float(theirs.norm()), floor, 1e-300))
        if error >= worst.error:
            worst = Worst(error, name, step)
    return worst


def _finite(error: float) -> float:
    return error if error == error else float("inf")


def _from_first(mine: VerifyReport, world: World) -> VerifyReport:
    """Rank 0's report, on every rank: it alone has compared."""
    if world.size == 1:
        return mine
    reports = [mine]
    dist.broadcast_object_list(reports, src=0, group=world.data_group)
    return reports[0]
