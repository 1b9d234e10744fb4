"""Which sample and which media item goes where? From metadata alone, the same answer on every rank."""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import fsum
from typing import Literal

import numpy as np

from meshweave.batch.even import Numbers, Work
from meshweave.batch.slots import PADDED, Packing, fill_slots
from meshweave.errors import LayoutError


@dataclass(frozen=True)
class MediaMeta:
    """One media item of a sample, before anything is decoded."""

    module: str
    """The encoder that will encode it, e.g. "vision"."""
    tokens: int
    """How many tokens it yields in the language model's sequence."""
    cost: float
    """Relative encoding cost (model FLOPs, patches, …): only ratios matter."""
    grid: tuple[int, ...] | None = None
    """(t, h, w) in patches, or (frames,) of a sound, where the family's position ids need it."""
    runs: tuple[tuple[int, int], ...] = ()
    """(position in the sample's fused sequence, tokens) of each unbroken run of its media tokens, ascending: who embeds a
    slice of the sequence needs to know where it falls."""
    kind: Literal["image", "video", "audio"] = "image"
    """An encoder may take several: a video is a grid of several frames, under another placeholder."""
    size: tuple[int, int] | None = None
    """(height, width) in pixels, where the encoder arranges its tokens by it."""


@dataclass(frozen=True)
class SampleMeta:
    """One sample, before anything is decoded."""

    sample: int
    """Its index in the dataset."""
    tokens: int
    """Fused sequence length: text tokens and media tokens."""
    media: tuple[MediaMeta, ...] = ()


@dataclass(frozen=True)
class MediaItem:
    """One media item of a microbatch; its number is its index in `MicrobatchPlan.items`."""

    sample: int
    slot: int
    """Its position among the sample's media."""
    meta: MediaMeta


@dataclass(frozen=True)
class MicrobatchPlan:
    """Who embeds which samples and who encodes which media items, in one microbatch."""

    lanes: tuple[tuple[SampleMeta, ...], ...]
    """Language-model lane → its samples in order; a lane may be empty."""
    items: Mapping[str, tuple[MediaItem, ...]]
    """Encoder → items in destination order: language-model lane, sample, slot."""
    encoder_lanes: Mapping[str, tuple[tuple[int, ...], ...]]
    """Encoder → encoder lane → item numbers, ascending; a lane may be empty."""

    def item_tokens(self, encoder: str) -> tuple[int, ...]:
        """How many media tokens each item yields, by item number."""
        return tuple(item.meta.tokens for item in self.items[encoder])

    def language_items(self, encoder: str) -> tuple[tuple[int, ...], ...]:
        """Language-model lane → the numbers of the items that its samples contain, ascending."""
        counts = [sum(media.module == encoder for sample in lane for media in sample.media) for lane in self.lanes]
        ends = list(accumulate(counts))
        return tuple(tuple(range(end - count, end)) for count, end in zip(counts, ends, strict=True))

    def __str__(self) -> str:
        lanes = " | ".join(" ".join(str(meta.sample) for meta in lane) or "-" for lane in self.lanes)
        encoders = "".join(
            f"; {name}: " + " | ".join(" ".join(map(str, lane)) or "-" for lane in assigned)
            for name, assigned in self.encoder_lanes.items()
        )
        return f"samples: {lanes}{encoders}"


@dataclass(frozen=True)
class EncoderPasses:
    """How one encoder works through a step."""

    per_pass: int = 1
    """Consecutive microbatches that one pass serves; their items are balanced together."""
    shares: tuple[tuple[float, ...], ...] | None = None
    """Pass → encoder lane → its share of the pass, relative to an even one; 0 keeps the lane out. None is even throughout."""
    weight: float = 1.0
    """How much even passes count next to even slots of the language model, where both cannot be had; 0 is not at all."""


EVEN = EncoderPasses()


@dataclass(frozen=True)
class StepPlan:
    """Everything one optimiser step reads and where it goes."""

    microbatches: tuple[MicrobatchPlan, ...]
    per_pass: Mapping[str, int]
    """Encoder → microbatches that one of its passes serves."""

    def passes(self, encoder: str) -> tuple[tuple[MicrobatchPlan, ...], ...]:
        """The microbatches of each pass of an encoder."""
        size = self.per_pass[encoder]
        return tuple(self.microbatches[first : first + size] for first in range(0, len(self.microbatches), size))

    def __str__(self) -> str:
        return "\n".join(f"microbatch {number}: {plan}" for number, plan in enumerate(self.microbatches))


def plan_step(
    samples: Sequence[SampleMeta],
    *,
    microbatches: int,
    language_lanes: int,
    encoder_lanes: Mapping[str, int],
    passes: Mapping[str, EncoderPasses] | None = None,
    packing: Packing = PADDED,
) -> StepPlan:
    """Place the samples of one step, and their media items, on microbatches and lanes.

    Samples fill the slots (microbatch, lane) as `fill_slots` says: even language-model work in every slot, counted by `packing`,
    and even encoder work in every pass; a slot's samples keep the order of `samples`.
    Media items are then balanced over each encoder's lanes, wherever their sample went: pass by pass, or, where `passes` gives
    lanes unequal shares, so that the shares hold over the step so far. The same arguments give the same plan on every machine.

    Raises `LayoutError` for a media item whose module has no lanes, and where samples do not fit into `packing.max_tokens`.
    """
    passes = {name: (passes or {}).get(name, EVEN) for name in encoder_lanes}
    works = [Work(_media_costs(samples, name), each.per_pass, each.weight) for name, each in passes.items()]
    slots = fill_slots([sample.tokens for sample in samples], works, microbatches, language_lanes, packing)
    return _plan([tuple(tuple(samples[s] for s in lane) for lane in part) for part in slots], encoder_lanes, passes)


def deal_step(
    samples: Sequence[SampleMeta],
    *,
    microbatches: int,
    language_lanes: int,
    encoder_lanes: Mapping[str, int],
    passes: Mapping[str, EncoderPasses] | None = None,
) -> StepPlan:
    """The step as a plain data loader would lay it out, to measure `plan_step` by: samples in order and in equal counts (± 1),
    and each encoder lane encodes the media of an equal count of samples of the microbatch, whatever they cost."""
    slots = microbatches * language_lanes
    ends = [len(samples) * (slot + 1) // slots for slot in range(slots)]
    dealt = [tuple(samples[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]
    lanes = [tuple(dealt[first : first + language_lanes]) for first in range(0, slots, language_lanes)]
    plan = _plan(lanes, encoder_lanes, {name: (passes or {}).get(name, EVEN) for name in encoder_lanes})
    return replace(plan, microbatches=tuple(_tied(part, encoder_lanes) for part in plan.microbatches))


def _tied(part: MicrobatchPlan, encoder_lanes: Mapping[str, int]) -> MicrobatchPlan:
    place = {sample.sample: number for number, sample in enumerate(sample for lane in part.lanes for sample in lane)}
    assigned = {}
    for name, lanes in encoder_lanes.items():
        whose = [place[item.sample] * lanes // len(place) for item in part.items[name]]
        assigned[name] = tuple(tuple(item for item, lane in enumerate(whose) if lane == each) for each in range(lanes))
    return replace(part, encoder_lanes=assigned)


def _plan(
    lanes: Sequence[tuple[tuple[SampleMeta, ...], ...]], encoder_lanes: Mapping[str, int], passes: Mapping[str, EncoderPasses]
) -> StepPlan:
    """The plan of samples that have their slots."""
    items = [_items(its, encoder_lanes) for its in lanes]
    assigned = {name: _assign([found[name] for found in items], count, passes[name]) for name, count in encoder_lanes.items()}
    return StepPlan(
        tuple(
            MicrobatchPlan(its, found, {name: assigned[name][number] for name in encoder_lanes})
            for number, (its, found) in enumerate(zip(lanes, items, strict=True))
        ),
        {name: each.per_pass for name, each in passes.items()},
    )


def balance(
    costs: Sequence[float], weights: Sequence[float], loads: Sequence[float] | None = None
) -> tuple[tuple[int, ...], ...]:
    """Share items out to lanes: the most expensive first, each onto the lane with the least load so far for its weight.

    Args:
        weights: of each lane; one of weight 0 gets nothing.
        loads: what lanes carry already; nothing if left out.

    Returns each lane's item numbers, ascending. With equal weights and no loads, the heaviest lane carries at most
    4/3 - 1/(3 · lanes) of the best possible (Graham 1969, "Bounds on multiprocessing timing anomalies").
    """
    assigned: list[list[int]] = [[] for _ in weights]
    carried = list(loads) if loads is not None else [0.0] * len(weights)
    heap = [(carried[lane] / weight, -weight, lane) for lane, weight in enumerate(weights) if weight]
    heapq.heapify(heap)
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        lane = heap[0][2]
        assigned[lane].append(item)
        carried[lane] += costs[item]
        heapq.heapreplace(heap, (carried[lane] / weights[lane], -weights[lane], lane))
    return tuple(tuple(sorted(items)) for items in assigned)


def _media_costs(samples: Sequence[SampleMeta], encoder: str) -> Numbers:
    """[samples]: what each costs an encoder."""
    costs = (fsum(media.cost for media in sample.media if media.module == encoder) for sample in samples)
    return np.fromiter(costs, np.float64, len(samples))


def _items(lanes: Sequence[tuple[SampleMeta, ...]], encoders: Iterable[str]) -> dict[str, tuple[MediaItem, ...]]:
    """Encoder → the items of one microbatch in destination order."""
    items: dict[str, list[MediaItem]] = {module: [] for module in encoders}
    for lane in lanes:
        for sample in lane:
            for slot, meta in enumerate(sample.media):
                if meta.module not in items:
                    raise LayoutError(
                        f"sample {sample.sample}, media item {slot}: module {meta.module!r} has no encoder "
                        f"lanes (encoders: {', '.join(items) or 'none'}); add it under `modules:`"
                    )
                items[meta.module].append(MediaItem(sample.sample, slot, meta))
    return {module: tuple(found) for module, found in items.items()}


def _assign(items: Sequence[Sequence[MediaItem]], lanes: int, passes: EncoderPasses) -> list[tuple[tuple[int, ...], ...]]:
    """Microbatch → encoder lane → item numbers."""
    assigned = []
    loads, weights = [0.0] * lanes, [0.0] * lanes
    for microbatch, its in enumerate(items):
        number, begins = divmod(microbatch, passes.per_pass)
        if not begins:
            share = passes.shares[number] if passes.shares else (1.0,) * lanes
            if passes.shares:
                weights = [weight + more for weight, more in zip(weights, share, strict=True)]
            else:
                loads, weights = [0.0] * lanes, [1.0] * lanes
        costs = [item.meta.cost for item in its]
        here = balance(costs, [weight if part else 0.0 for weight, part in zip(weights, share, strict=True)], loads)
        loads = [load + sum(costs[item] for item in lane) for load, lane in zip(loads, here, strict=True)]
        assigned.append(here)
    return assigned
