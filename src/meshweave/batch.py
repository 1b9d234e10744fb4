"""Which sample and which media item goes where? From metadata alone, the same answer on every rank."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

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
    """(t, h, w) in patches, where the family's position ids need it."""


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
class StepPlan:
    """Everything one optimiser step reads and where it goes."""

    microbatches: tuple[MicrobatchPlan, ...]

    def __str__(self) -> str:
        return "\n".join(f"microbatch {number}: {plan}" for number, plan in enumerate(self.microbatches))


def plan_step(
    samples: Sequence[SampleMeta], *, microbatches: int, language_lanes: int, encoder_lanes: Mapping[str, int]
) -> StepPlan:
    """Place the samples of one step, and their media items, on microbatches and lanes.

    Samples fill the slots (microbatch, lane) in equal counts (± 1), the longest first onto the shortest slot.
    Media items are then balanced over each encoder's lanes, wherever their sample went. The same arguments
    give the same plan on every machine. Raises `LayoutError` for a media item whose module has no lanes.
    """
    slots = _fill_slots(samples, microbatches * language_lanes)
    return StepPlan(
        tuple(
            _plan_microbatch(slots[first : first + language_lanes], encoder_lanes)
            for first in range(0, microbatches * language_lanes, language_lanes)
        )
    )


def balance(costs: Sequence[float], lanes: int) -> tuple[tuple[int, ...], ...]:
    """Share items out to lanes: the most expensive first, each onto the lane with the least load so far.

    Returns each lane's item numbers, ascending. The heaviest lane carries at most 4/3 - 1/(3 · lanes) of the
    best possible (Graham 1969, "Bounds on multiprocessing timing anomalies").
    """
    assigned: list[list[int]] = [[] for _ in range(lanes)]
    heap = [(0.0, lane) for lane in range(lanes)]  # sorted, hence a heap
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        load, lane = heap[0]
        assigned[lane].append(item)
        heapq.heapreplace(heap, (load + costs[item], lane))
    return tuple(tuple(sorted(items)) for items in assigned)


def _fill_slots(samples: Sequence[SampleMeta], slots: int) -> list[tuple[SampleMeta, ...]]:
    """Equal counts (± 1), balanced by tokens."""
    longest_first = sorted(samples, key=lambda sample: -sample.tokens)
    chosen: list[list[SampleMeta]] = [[] for _ in range(slots)]
    tokens = [0] * slots
    for first in range(0, len(samples), slots):
        # One round gives each slot one sample: the round's longest to the slot with the fewest tokens.
        emptiest = sorted(range(slots), key=lambda slot: tokens[slot])
        for sample, slot in zip(longest_first[first : first + slots], emptiest, strict=False):
            chosen[slot].append(sample)
            tokens[slot] += sample.tokens
    return [tuple(slot) for slot in chosen]


def _plan_microbatch(lanes: Sequence[tuple[SampleMeta, ...]], encoder_lanes: Mapping[str, int]) -> MicrobatchPlan:
    items: dict[str, list[MediaItem]] = {module: [] for module in encoder_lanes}
    for lane in lanes:
        for sample in lane:
            for slot, meta in enumerate(sample.media):
                if meta.module not in items:
                    raise LayoutError(
                        f"sample {sample.sample}, media item {slot}: module {meta.module!r} has no encoder "
                        f"lanes (encoders: {', '.join(items) or 'none'}); add it under `modules:`"
                    )
                items[meta.module].append(MediaItem(sample.sample, slot, meta))
    return MicrobatchPlan(
        lanes=tuple(lanes),
        items={module: tuple(found) for module, found in items.items()},
        encoder_lanes={
            module: balance([item.meta.cost for item in found], encoder_lanes[module]) for module, found in items.items()
        },
    )
