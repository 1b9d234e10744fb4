"""How does a rank load its part of a run's steps? The plan follows from the run file, and from where the rank stands."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from meshweave.batch.plan import EncoderPasses, MicrobatchPlan
from meshweave.batch.slots import Packing
from meshweave.boundary import TransferPlan
from meshweave.boundary.crossing import plan_crossing
from meshweave.config import LANGUAGE, RunConfig
from meshweave.data.dataset import Dataset
from meshweave.data.loader import EncoderRole, Loader
from meshweave.layout import Placement
from meshweave.model.flops import ModuleFlops
from meshweave.schedule.schedule import Schedule
from meshweave.sequence.cut import multiple_of
from meshweave.sequence.grid import LaneGrid, SequenceRule
from meshweave.world import World

_IN_TURN = 0.1
"""Weight of even passes where uneven ones cost memory but no time."""


def packing_of(run: RunConfig, flops: ModuleFlops | None = None) -> Packing:
    """How samples share a slot; a sequence costs what `flops`, of the language model, says, or else its tokens."""
    language = run.modules[LANGUAGE]
    multiple = multiple_of(language.cp, language.tp if language.sequence_parallel else 1)
    packing = Packing(run.packed, run.train.max_tokens, multiple)
    return packing if flops is None else replace(packing, per_token=flops.per_token, per_pair=flops.per_pair)


def build_planner(
    run: RunConfig,
    dataset: Dataset,
    placements: Mapping[str, Placement],
    schedule: Schedule,
    flops: ModuleFlops | None = None,
) -> Loader:
    """A loader that plans the run's steps (`Loader.plan`) in this process alone, as the ranks of the run will."""
    return Loader(
        dataset,
        batch_size=run.train.batch_size,
        microbatches=run.train.microbatches,
        language_lanes=placements[LANGUAGE].layout.dp,
        language_lane=None,
        encoders={
            name: EncoderRole(placements[name].layout.dp, passes=encoder_passes(name, placements[name], schedule))
            for name in run.encoders
        },
        packing=packing_of(run, flops),
        seed=run.seed,
        on_error=run.data.on_error if run.data else "stop",
        max_skipped=run.data.max_skipped if run.data else 0.0,
    )


def build_loader(
    run: RunConfig,
    dataset: Dataset,
    world: World,
    schedule: Schedule,
    rule: SequenceRule,
    *,
    training: bool = True,
    flops: ModuleFlops | None = None,
) -> Loader:
    """Loader of this rank's part of every step; without `training`, one ordered pass over everything.

    Sequences are cut by `rule`, and balanced by `flops` of the language model where these are given, else by their tokens.
    """
    language = world.placements[LANGUAGE]
    return Loader(
        dataset,
        batch_size=run.train.batch_size,
        microbatches=run.train.microbatches,
        language_lanes=language.layout.dp,
        language_lane=language.lane(world.rank),
        encoders={name: _role(name, world.placements[name], schedule, world.rank) for name in run.encoders},
        rule=rule,
        # Without gradients there is room, and a step that does not fit must not end a run that is done.
        packing=packing_of(run, flops) if training else Packing(run.packed),
        crossing=partial(_crossing, world),
        rank=world.rank,
        world=world.size,
        group=world.data_group,
        seed=run.seed,
        shuffle=training,
        on_error=run.data.on_error if run.data else "stop",
        max_skipped=run.data.max_skipped if run.data else 0.0,
        drop_last=training,
    )


def _crossing(world: World, plan: MicrobatchPlan, grids: Sequence[LaneGrid], encoder: str) -> TransferPlan:
    """With this rank's part of both ways worked out: in the loader's thread, which the step does not wait for."""
    crossing = plan_crossing(plan, encoder, world.placements, grids, world.node_size)
    for way in (crossing, crossing.transpose()):
        way.for_rank(world.rank)
    return crossing


def encoder_passes(encoder: str, placement: Placement, schedule: Schedule) -> EncoderPasses:
    """What the batch planner has to know of an encoder's place in a schedule."""
    shares = schedule.shares.get(encoder)
    programs = [schedule.work.program_of(lane[0]) for lane in placement.lanes()]
    of_lanes = None
    if shares is not None:
        of_lanes = tuple(tuple(part[program] for program in programs if program is not None) for part in shares)
    # On the language model's ranks and without a pipeline, passes follow one another: what counts is their sum, not the heaviest,
    # which only holds more activations.
    colocated = all(LANGUAGE in program.stages for program in schedule.work.programs if encoder in program.stages)
    in_turn = colocated and schedule.work.modules[LANGUAGE].stages == 1
    return EncoderPasses(schedule.work.modules[encoder].per_pass, of_lanes, weight=_IN_TURN if in_turn else 1.0)


def _role(encoder: str, placement: Placement, schedule: Schedule, rank: int) -> EncoderRole:
    coordinate = placement.coordinate(rank)
    return EncoderRole(
        lanes=placement.layout.dp,
        lane=coordinate["dp"] if coordinate else None,
        reads=coordinate is not None and coordinate["pp"] == 0,
        passes=encoder_passes(encoder, placement, schedule),
        together=schedule.streams(encoder),
    )
