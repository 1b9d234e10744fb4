"""How even is the work of a planned step, and what does it cost that it is not? Pure numbers of a plan."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum

from meshweave.batch.plan import MediaMeta, MicrobatchPlan, StepPlan
from meshweave.batch.slots import Packing
from meshweave.config import LANGUAGE
from meshweave.layout import Placement


@dataclass(frozen=True)
class Uneven:
    """The heaviest of several over their mean; 1 is even."""

    ratio: float
    at_least: float = 1.0
    """What no plan can go below: one sample, or one media item, is not divided."""


@dataclass(frozen=True)
class Imbalance:
    """How unevenly a step is laid out. Costs are those of the packing (language model, padding included) and of the items."""

    tokens: int
    positions: int
    """Tokens and padding, over all slots."""
    fullest: int
    """Positions of the fullest slot."""
    encoder_lanes: Mapping[str, Uneven]
    """Lanes of an encoder: what its heaviest lanes take, pass after pass, over what even lanes would, and could at least."""
    encoder_passes: Mapping[str, Uneven]
    """Passes of an encoder, all lanes together, by microbatch that they serve."""
    slots: Uneven
    """Slots (microbatch, language lane) of the whole step: the heaviest sets the pace of a pipeline."""
    microbatch_lanes: Uneven
    """The heaviest lanes of microbatch after microbatch, over even lanes: what is waited for without a pipeline."""
    language_lanes: Uneven
    """Language lanes over the whole step."""
    microbatches: Uneven
    """Microbatches, all language lanes together."""

    @property
    def padding(self) -> float:
        """Share of the positions that hold no token."""
        return 1 - self.tokens / self.positions if self.positions else 0.0


def imbalance(plan: StepPlan, packing: Packing) -> Imbalance:
    """Imbalance of a step, its language-model work counted as `packing` says, that of encoders by the items' `cost`."""
    lengths = [[[sample.tokens for sample in lane] for lane in part.lanes] for part in plan.microbatches]
    loads = _slot_costs(plan, packing)
    flat = [load for part in loads for load in part]
    positions = [packing.slot_tokens(slot) for part in lengths for slot in part]
    heaviest_sample = max((packing.cost(length) for part in lengths for slot in part for length in slot), default=0.0)
    return Imbalance(
        tokens=sum(length for part in lengths for slot in part for length in slot),
        positions=sum(positions),
        fullest=max(positions, default=0),
        encoder_lanes={name: _lanes_of_passes(plan, name) for name in plan.per_pass},
        encoder_passes={name: _passes(plan, name) for name in plan.per_pass},
        slots=_uneven(flat, heaviest_sample),
        microbatch_lanes=_microbatch_lanes(loads, heaviest_sample),
        language_lanes=_uneven([fsum(lane) for lane in zip(*loads, strict=True)], heaviest_sample),
        microbatches=_uneven([fsum(part) for part in loads], heaviest_sample),
    )


def slowest_rank(
    plan: StepPlan, packing: Packing, item_cost: Mapping[str, Callable[[MediaMeta], float]], placements: Mapping[str, Placement]
) -> float:
    """What the busiest ranks work in a step, waiting for slower ones included; an estimate, in the unit of the costs.

    A module's lanes meet after every pass or microbatch, those of a language-model pipeline at the end of the step, whose pace
    its heaviest microbatch sets. Modules that share ranks work one after the other, others at the same time.
    """
    seconds = {name: _encoder_path(plan, name, cost, placements[name]) for name, cost in item_cost.items()}
    layout = placements[LANGUAGE].layout
    loads = _slot_costs(plan, packing)
    if layout.pp == 1:
        path = fsum(max(part) for part in loads)
    else:
        path = max(fsum(lane) + (layout.pp - 1) * max(lane) for lane in zip(*loads, strict=True)) / layout.pp
    seconds[LANGUAGE] = path / (layout.cp * layout.tp)
    modules: dict[int, list[str]] = {}
    for name in seconds:
        for rank in placements[name].ranks:
            modules.setdefault(rank, []).append(name)
    return max(fsum(seconds[name] for name in its) for its in modules.values())


def _encoder_path(plan: StepPlan, name: str, cost: Callable[[MediaMeta], float], placement: Placement) -> float:
    layout = placement.layout
    heaviest = (max(_lane_loads(served, name, cost)) for served in plan.passes(name))
    return fsum(heaviest) / (layout.pp * layout.cp * layout.tp)


def _slot_costs(plan: StepPlan, packing: Packing) -> list[list[float]]:
    return [[packing.slot_cost([sample.tokens for sample in lane]) for lane in part.lanes] for part in plan.microbatches]


def _lane_loads(served: Sequence[MicrobatchPlan], name: str, cost: Callable[[MediaMeta], float]) -> list[float]:
    """Lane → the work of its items in one pass."""
    lanes = zip(*(part.encoder_lanes[name] for part in served), strict=True)
    return [
        fsum(cost(part.items[name][item].meta) for part, items in zip(served, lane, strict=True) for item in items)
        for lane in lanes
    ]


def _own_cost(meta: MediaMeta) -> float:
    return meta.cost


def _lanes_of_passes(plan: StepPlan, name: str) -> Uneven:
    lanes = len(plan.microbatches[0].encoder_lanes[name])
    passes = plan.passes(name)
    least = [_least_heaviest([item.meta.cost for part in served for item in part.items[name]], lanes) for served in passes]
    return _one_after_the_other([_lane_loads(served, name, _own_cost) for served in passes], least)


def _least_heaviest(costs: Sequence[float], lanes: int) -> float:
    """What the heaviest lane carries at least: of the k · lanes + 1 most expensive items, k + 1 share a lane."""
    ordered = sorted(costs, reverse=True)
    return max((fsum(ordered[k * lanes - k : k * lanes + 1]) for k in range(-(-len(ordered) // lanes))), default=0.0)


def _passes(plan: StepPlan, name: str) -> Uneven:
    passes = plan.passes(name)
    # The last pass may serve fewer microbatches.
    loads = [fsum(item.meta.cost for part in served for item in part.items[name]) / len(served) for served in passes]
    total = fsum(load * len(served) for load, served in zip(loads, passes, strict=True))
    return Uneven(max(loads) * len(plan.microbatches) / total if total else 1.0)


def _one_after_the_other(rounds: Sequence[Sequence[float]], least: Sequence[float]) -> Uneven:
    """Several rounds, each as long as its heaviest lane, that is as `least` says at least."""
    even = [fsum(loads) / len(loads) for loads in rounds]
    if not fsum(even):
        return Uneven(1.0)
    return Uneven(fsum(max(loads) for loads in rounds) / fsum(even), fsum(map(max, even, least)) / fsum(even))


def _microbatch_lanes(loads: Sequence[Sequence[float]], heaviest: float) -> Uneven:
    """Another plan may move samples between microbatches: only the whole step bounds it."""
    even = fsum(fsum(part) for part in loads) / len(loads[0])
    return replace(_one_after_the_other(loads, [0.0] * len(loads)), at_least=max(1.0, heaviest / even if even else 0.0))


def _uneven(loads: Sequence[float], heaviest: float) -> Uneven:
    mean = fsum(loads) / len(loads)
    return Uneven(max(loads) / mean, max(1.0, heaviest / mean)) if mean else Uneven(1.0)
