"""How evenly would a run's data be worked? Plans steps from metadata; decodes nothing and starts no process."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from meshweave.batch.plan import EncoderPasses, MediaMeta, SampleMeta, StepPlan, deal_step, plan_step
from meshweave.batch.slots import Packing
from meshweave.config import LANGUAGE, RunConfig
from meshweave.data.build import dataset_of
from meshweave.data.dataset import Dataset
from meshweave.data.loader import Loader
from meshweave.data.processed import ProcessedDataset
from meshweave.errors import DataError, FaultKind, LayoutError
from meshweave.layout import Placement, placements
from meshweave.model.blueprint import STORED, blueprint_of, read_model_config
from meshweave.model.check import check_model
from meshweave.model.flops import TRAINING_FACTOR, ModuleFlops, count_flops
from meshweave.model.modules import graph_of
from meshweave.report.balance import BalanceReport, Spread, Variant
from meshweave.report.imbalance import imbalance, slowest_rank
from meshweave.step.loading import build_planner, encoder_passes, packing_of
from meshweave.step.schedules import run_schedule


def balance_run(run: RunConfig, steps: int) -> BalanceReport:
    """Plans the first steps of a run (of one epoch at most) as a plain loader would, in padded rows, and packed.

    Raises:
        ConfigError, CheckpointError, DataError, LayoutError, ScheduleError: whatever would also keep the run from starting, or
            these steps from being planned.
    """
    config = read_model_config(run.model)
    check_model(run, config)
    where = placements(run)
    dataset = dataset_of(run, config)
    schedule = run_schedule(run, config, where, dataset)
    graph = graph_of(blueprint_of(config, STORED[run.dtype]))
    flops = {name: count_flops(graph, name) for name in run.modules}
    loader = build_planner(run, dataset, where, schedule, flops[LANGUAGE])
    taken, skipped = _samples(loader, steps)
    # Lanes get even shares here, also where the schedule means to give some less.
    passes = {name: replace(encoder_passes(name, where[name], schedule), shares=None) for name in run.encoders}
    samples = [sample for step in taken for sample in step]
    counts = {name: [sum(media.module == name for media in sample.media) for sample in samples] for name in run.encoders}
    return BalanceReport(
        samples=len(samples),
        skipped=len(skipped),
        tokens=Spread.of([sample.tokens for sample in samples]),
        media={name: Spread.of(its) for name, its in counts.items()},
        items={name: sum(its) for name, its in counts.items()},
        microbatches=run.train.microbatches,
        lanes={name: placement.layout.dp for name, placement in where.items()},
        passes={name: -(-run.train.microbatches // each.per_pass) for name, each in passes.items()},
        max_tokens=run.train.max_tokens,
        variants=_variants(run, taken, where, passes, flops),
        faults=Counter(_kind(dataset, sample) for sample in skipped),
        effects=_effects(dataset, samples),
    )


def _samples(loader: Loader, steps: int) -> tuple[list[list[SampleMeta]], list[int]]:
    """The samples of each step in the loader's order, and those that it leaves out."""
    taken: list[list[SampleMeta]] = []
    skipped: list[int] = []
    for number in range(min(steps, loader.steps_per_epoch)):
        try:
            plan = loader.plan(number)
        except LayoutError as error:
            raise LayoutError(f"step {number}: {error}") from error
        found = {sample.sample: sample for part in plan.microbatches for lane in part.lanes for sample in lane}
        order = loader.sample_ids(number)
        taken.append([found[sample] for sample in order if sample in found])
        skipped += [sample for sample in order if sample not in found]
    return taken, skipped


def _kind(dataset: Dataset, sample: int) -> FaultKind:
    try:
        dataset.meta(sample)
    except DataError as error:
        return error.kind
    return "too long"  # for `train.max_tokens`, of which the dataset knows nothing


def _effects(dataset: Dataset, samples: Sequence[SampleMeta]) -> Counter[str]:
    if not isinstance(dataset, ProcessedDataset):
        return Counter()
    return Counter(effect for sample in samples for effect in dataset.effects(sample.sample))


def _variants(
    run: RunConfig,
    taken: Sequence[Sequence[SampleMeta]],
    where: Mapping[str, Placement],
    passes: Mapping[str, EncoderPasses],
    flops: Mapping[str, ModuleFlops],
) -> tuple[Variant, ...]:
    packing = packing_of(run, flops[LANGUAGE])
    rows, packed = replace(packing, packed=False, max_tokens=None), replace(packing, packed=True)
    lanes = {
        "microbatches": run.train.microbatches,
        "language_lanes": where[LANGUAGE].layout.dp,
        "encoder_lanes": {name: where[name].layout.dp for name in run.encoders},
        "passes": passes,
    }
    ways: dict[str, tuple[Packing, Callable[..., StepPlan]]] = {
        "in order": (rows, deal_step),
        "in order, packed": (packed, deal_step),
        "planned": (rows, partial(plan_step, packing=rows)),
        "planned, packed": (packed, partial(plan_step, packing=packed)),
    }
    item_cost = {name: partial(_item_cost, flops[name], run.modules[name].frozen is True) for name in run.encoders}
    variants = []
    for name, (costs, plan) in ways.items():
        plans = [plan(samples, **lanes) for samples in taken]
        trained = replace(costs, per_token=TRAINING_FACTOR * costs.per_token, per_pair=TRAINING_FACTOR * costs.per_pair)
        work = sum(slowest_rank(plan, trained, item_cost, where) for plan in plans)
        variants.append(
            Variant(
                name,
                name == ("planned, packed" if run.packed else "planned"),
                tuple(imbalance(p, costs) for p in plans),
                work,
            )
        )
    return tuple(variants)


def _item_cost(flops: ModuleFlops, frozen: bool, meta: MediaMeta) -> float:
    return float((1 if frozen else TRAINING_FACTOR) * flops.item(meta))
