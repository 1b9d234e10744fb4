"""Which schedules does a run follow, and on what grounds? Durations of actions, from model FLOPs of typical samples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from meshweave.batch.plan import SampleMeta, StepPlan, plan_step
from meshweave.batch.slots import Packing
from meshweave.config import LANGUAGE, RunConfig
from meshweave.data.dataset import Dataset
from meshweave.errors import DataError
from meshweave.layout import Placement
from meshweave.model.blueprint import STORED, TRAVELS_AS, blueprint_of
from meshweave.model.flops import TRAINING_FACTOR, count_flops
from meshweave.model.modules import ModelGraph, graph_of, media_widths
from meshweave.model.parts import parts_of
from meshweave.model.stages import stage_costs, stage_cuts
from meshweave.schedule.actions import Kind
from meshweave.schedule.durations import Durations, Key
from meshweave.schedule.plan import plan_schedule
from meshweave.schedule.schedule import Schedule
from meshweave.schedule.work import StepWork
from meshweave.world import World

_LOOKED_AT = 256
"""Samples whose metadata the durations are estimated from, at most."""


@dataclass(frozen=True)
class Speed:
    """What one rank achieves. Only ratios decide on a schedule, so the order of magnitude will do."""

    flops_per_second: float
    bytes_per_second: float
    seconds_per_message: float


GPU = Speed(4e14, 4e10, 2e-5)
"""Of the order of one data-centre GPU in bfloat16."""

CPU = Speed(5e10, 1e9, 2e-4)
"""Of the order of one core in float32, with gloo on one machine."""


def usual_speed() -> Speed:
    """`GPU` where there is one, else `CPU`."""
    return GPU if torch.cuda.is_available() else CPU


def agreed_schedule(
    world: World, run: RunConfig, config: PreTrainedConfig, dataset: Dataset, *, training: bool = True
) -> Schedule:
    """The schedule of a run's steps, or of the forward passes of its evaluation; a collective over all ranks.

    Rank 0 plans and the others get its result: what they see of the data might differ.

    Raises:
        ConfigError, ScheduleError: as `plan_schedule`, on rank 0.
    """
    planned: list[Schedule | None] = [None]
    if world.rank == 0:
        planned = [run_schedule(run, config, world.placements, dataset, training=training)]
    if world.size > 1:
        dist.broadcast_object_list(planned, src=0)
    assert planned[0] is not None
    return planned[0]


def run_schedule(
    run: RunConfig,
    config: PreTrainedConfig,
    placements: Mapping[str, Placement],
    dataset: Dataset,
    *,
    training: bool = True,
) -> Schedule:
    """The schedule of a run as this process sees its data; raises as `plan_schedule`."""
    durations = model_durations(run, config, placements, typical_step(run, dataset))
    return plan_schedule(run, placements, durations, training=training)


def typical_step(run: RunConfig, dataset: Dataset) -> StepPlan:
    """A step of the data's first readable samples, planned in the run's lanes; of fewer samples where a step takes many."""
    metas: list[SampleMeta] = []
    for index in range(min(run.train.batch_size, len(dataset), _LOOKED_AT)):
        try:
            metas.append(dataset.meta(index))
        except DataError:
            continue  # a run skips it, too
    return plan_step(
        metas,
        microbatches=run.train.microbatches,
        language_lanes=run.modules[LANGUAGE].dp,
        encoder_lanes={name: run.modules[name].dp for name in run.encoders},
        # No budget: these samples are no step of the run, whose own ones have to fit.
        packing=Packing(run.packed),
    )


def model_durations(
    run: RunConfig,
    config: PreTrainedConfig,
    placements: Mapping[str, Placement],
    typical: StepPlan,
    speed: Speed | None = None,
) -> Callable[[StepWork], Durations]:
    """Seconds of the actions of any work of this run, from model FLOPs, message sizes and a speed."""
    graph = graph_of(blueprint_of(config, STORED[run.dtype]))
    return partial(_durations, run, graph, placements, typical, speed or usual_speed())


def _durations(
    run: RunConfig, graph: ModelGraph, placements: Mapping[str, Placement], typical: StepPlan, speed: Speed, work: StepWork
) -> Durations:
    table: dict[Key, float] = {}
    samples = sum(len(lane) for part in typical.microbatches for lane in part.lanes)
    scale = run.train.batch_size / max(1, samples)
    for name, module in work.modules.items():
        layout = placements[name].layout
        ranks = layout.dp * layout.cp * layout.tp
        forward = scale * _forward_flops(graph, name, typical) / module.passes(work.microbatches) / ranks / speed.flops_per_second
        message = scale * _message_bytes(run, graph, name, typical) / work.microbatches
        carried = speed.seconds_per_message + message / layout.dp / speed.bytes_per_second
        for stage, share in enumerate(_stage_shares(run, graph, name)):
            table[Kind.FORWARD, name, stage] = forward * share
            table[Kind.BACKWARD, name, stage] = forward * share * (TRAINING_FACTOR - 1)
            table[Kind.INPUT_GRADIENT, name, stage] = table[Kind.WEIGHT_GRADIENT, name, stage] = forward * share
            for kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD, Kind.SEND_TOKENS, Kind.SEND_TOKEN_GRADIENTS):
                table[kind, name, stage] = carried
    return Durations(table)


def _stage_shares(run: RunConfig, graph: ModelGraph, name: str) -> list[float]:
    """The share of a module's work that lies on each of its stages."""
    cut = stage_cuts(run, graph)[name]
    if len(cut) == 1:
        return [1.0]
    costs = stage_costs(graph, name, parts_of(graph, name))
    whole = [sum(costs.blocks[block] for block in blocks) for blocks in cut]
    whole[0] += costs.first
    whole[-1] += costs.last
    return [cost / sum(whole) for cost in whole]


def _forward_flops(graph: ModelGraph, name: str, plan: StepPlan) -> float:
    flops = count_flops(graph, name)
    if name == LANGUAGE:
        return sum(flops.sample(sample.tokens) for part in plan.microbatches for lane in part.lanes for sample in lane)
    return sum(flops.item(item.meta) for part in plan.microbatches for item in part.items[name])


def _message_bytes(run: RunConfig, graph: ModelGraph, name: str, plan: StepPlan) -> float:
    """Of a step's activations between two stages of a module; for an encoder, of its media tokens."""
    widths, size = media_widths(graph.model.config), TRAVELS_AS[run.dtype].itemsize
    if name == LANGUAGE:
        hidden = graph.model.config.get_text_config().hidden_size
        return size * hidden * sum(sample.tokens for part in plan.microbatches for lane in part.lanes for sample in lane)
    return size * sum(widths[name]) * sum(sum(part.item_tokens(name)) for part in plan.microbatches)
