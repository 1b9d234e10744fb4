"""Which samples fill which slot (microbatch, language-model lane)? Even work for encoders and language model, little padding."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import fsum

import numpy as np

from meshweave.batch.even import Numbers, Work, best_fit, cut, fill_level, share, spread
from meshweave.errors import DataError, LayoutError

Slots = list[list[list[int]]]
"""Microbatch → lane → sample numbers, ascending."""

_CLOSE = 1.04
"""A plan this close to the bound is taken without looking for a better one."""
_MANY = 256
"""Slots that share their samples out among themselves: more of them make rows no more alike."""
_CROWDED = 0.9
"""Share of the token budget from which on room is looked for slot by slot."""


@dataclass(frozen=True)
class Packing:
    """How the samples of a slot lie in memory, and what a sequence costs the language model."""

    packed: bool = False
    """One behind the other in one sequence. Otherwise one row each, padded to the longest."""
    max_tokens: int | None = None
    """Packed: tokens that a slot may hold; no bound if left out."""
    multiple: int = 1
    """Packed: a slot's sequence is padded to a multiple of this many tokens."""
    per_token: float = 1.0
    """Cost of a sequence per token …"""
    per_pair: float = 0.0
    """… and per pair of its tokens (attention); only the ratio of the two matters."""

    @property
    def budget(self) -> int | None:
        """Tokens of samples that a slot may hold so that it is within `max_tokens` with padding."""
        return None if self.max_tokens is None else self.max_tokens // self.multiple * self.multiple

    def require_fit(self, tokens: int) -> None:
        """Raises `DataError` for a sample that no slot can hold."""
        if self.budget is not None and tokens > self.budget:
            raise DataError(
                f"its {tokens:,} tokens are more than train.max_tokens={self.max_tokens} lets a sequence hold; raise that, or "
                "shorten the sample",
                "too long",
            )

    def cost(self, tokens: int) -> float:
        """Of one sequence; packed ones attend within themselves."""
        return self.per_token * tokens + self.per_pair * tokens * tokens

    def slot_cost(self, tokens: Sequence[int]) -> float:
        """Of a slot with samples of these lengths: padded rows cost as much as the longest."""
        if self.packed:
            return fsum(self.cost(each) for each in tokens)
        return len(tokens) * self.cost(max(tokens, default=0))

    def slot_tokens(self, tokens: Sequence[int]) -> int:
        """Tokens that a slot with samples of these lengths takes in memory, padding included."""
        if self.packed:
            return -(-sum(tokens) // self.multiple) * self.multiple
        return len(tokens) * max(tokens, default=0)


PADDED = Packing()


def fill_slots(tokens: Sequence[int], encoders: Sequence[Work], microbatches: int, lanes: int, packing: Packing) -> Slots:
    """Places samples on slots so that the heaviest slot of the language model is light, and so is an encoder's heaviest pass.

    Every slot gets a sample while there are enough. Packed, samples are shared out to microbatches by all kinds of work at
    once, and inside each to lanes by that of the language model alone: encoder work is not tied to lanes. Padded, similar
    lengths meet in a slot, few rows of long ones, many of short ones; that is done inside each microbatch, or inside groups
    of several where samples of one microbatch are too few to be alike.
    Slots that cannot be even, because a sample is heavier than a slot should be, meet in a microbatch where encoders allow it;
    and in each microbatch the heaviest slot goes to the lane that has carried least so far.

    Args:
        tokens: length of each sample.
        encoders: what each sample costs each encoder; `span` is the microbatches of one pass.

    Raises `LayoutError` where the samples do not fit into the token budget of the slots.
    """
    costs = [packing.cost(length) for length in tokens]
    step = _Step(tokens, costs, tuple(encoders), microbatches, lanes, packing)
    return _even_lanes(_packed(step) if packing.packed else _padded(step), step)


@dataclass(frozen=True)
class _Step:
    """What is to be placed, and where."""

    tokens: Sequence[int]
    costs: Sequence[float]
    """Of each sample's sequence alone."""
    encoders: tuple[Work, ...]
    microbatches: int
    lanes: int
    packing: Packing

    @property
    def count(self) -> int:
        """Slots."""
        return self.microbatches * self.lanes

    def most(self, slots: int) -> int | None:
        """Samples that so many slots take: no second one while others have none."""
        return slots if len(self.tokens) <= self.count else None

    @property
    def lopsided(self) -> bool:
        """Whether a sample is heavier than an even slot."""
        return max(self.costs, default=0.0) * self.count > fsum(self.costs)

    def load(self, slot: Sequence[int]) -> float:
        costs = [self.costs[s] for s in slot]
        return fsum(costs) if self.packing.packed else len(costs) * max(costs, default=0.0)

    def sizes(self, samples: Sequence[int]) -> list[int] | None:
        return None if self.packing.budget is None else [self.tokens[s] for s in samples]

    def unevenness(self, slots: Slots) -> float:
        """The language model's heaviest slot over an even one, and its heaviest lanes of microbatches over even ones, by half;
        and of each encoder the heaviest pass."""
        loads = [[self.load(slot) for slot in part] for part in slots]
        language = (_over_mean([max(part) for part in loads], self.costs) * self.count + _waits(loads, self.costs)) / 2
        return language + fsum(work.weight * _heaviest_pass(work, slots) for work in self.encoders)


def _packed(step: _Step) -> Slots:
    ways = (_packed_by_microbatch, _packed_by_slot, _packed_by_level)
    candidates = [found for way in ways if (found := way(step)) is not None]
    if candidates:
        return min(candidates, key=step.unevenness) if len(candidates) > 1 else candidates[0]
    total, count, budget = sum(step.tokens), step.count, step.packing.budget or 0
    of_room = f"{total / (count * budget):.1%} of what they hold; no packing was found" if total <= count * budget else "too many"
    raise LayoutError(
        f"train.max_tokens={step.packing.max_tokens}: a step of {len(step.tokens):,} samples has {total:,} tokens, for {count:,} "
        f"slots ({step.microbatches} microbatches × {step.lanes} language lanes) of {budget:,} tokens: {of_room}. Raise "
        "train.microbatches or train.max_tokens, or lower train.batch_size"
    )


def _packed_by_microbatch(step: _Step) -> Slots | None:
    """To microbatches by all kinds of work, then to lanes; None if that finds no room."""
    budget, every = step.packing.budget, range(len(step.tokens))
    works = [Work(np.array(step.costs, np.float64)), *step.encoders]
    capacity = None if budget is None else step.lanes * budget
    most = step.most(step.lanes)
    parts = share(works, step.microbatches, least=step.lanes, most=most, sizes=step.sizes(every), capacity=capacity)
    slots: Slots = []
    for part in parts or ():
        found = spread([step.costs[s] for s in part], step.lanes, step.sizes(part), budget)
        if found is None:
            return None
        slots.append([[part[number] for number in slot] for slot in found])
    return slots or None


def _packed_by_slot(step: _Step) -> Slots | None:
    """To slots, then slots to microbatches: for steps of few heavy samples, and for tight budgets. None without need or room."""
    budget, every = step.packing.budget, range(len(step.tokens))
    crowded = budget is not None and sum(step.tokens) > _CROWDED * step.count * budget
    if not crowded and not step.lopsided:
        return None
    flat = spread(step.costs, step.count, step.sizes(every), budget)
    if flat is None and budget is not None:
        lengths = [float(length) for length in step.tokens]
        flat = spread(lengths, step.count, step.tokens, budget) or best_fit(step.tokens, step.count, budget)
    return None if flat is None else _grouped(step, flat, step.microbatches)


def _packed_by_level(step: _Step) -> Slots | None:
    """As long as a sample is heavier than an even slot, a microbatch is filled in all lanes up to where that one reaches; the
    rest is even. Nobody waits for heavy samples then, but encoder passes are uneven. No slot gets more tokens by that than the
    longest sample or an even slot has. None without need or room."""
    if not step.lopsided:
        return None
    budget, rest = step.packing.budget, list(range(len(step.tokens)))
    slots: Slots = []
    while len(slots) < step.microbatches:
        left = step.microbatches - len(slots)
        costs = [step.costs[s] for s in rest]
        even, heaviest = fsum(costs) / (left * step.lanes), max(costs, default=0.0)
        if left == 1 or heaviest <= even:
            flat = spread(costs, left * step.lanes, step.sizes(rest), budget)
            return None if flat is None else slots + _grouped(step, [[rest[n] for n in slot] for slot in flat], left)
        lengths = [step.tokens[s] for s in rest]
        room = budget or max(max(step.tokens), -(-sum(step.tokens) // step.count))
        leave = max(0, min((left - 1) * step.lanes, len(rest) - step.lanes))
        found = fill_level(costs, step.lanes, heaviest, leave, lengths, room)
        slots.append([[rest[n] for n in slot] for slot in found])
        taken = {n for slot in found for n in slot}
        rest = [s for n, s in enumerate(rest) if n not in taken]
    return slots


def _padded(step: _Step) -> Slots:
    ordered = sorted(range(len(step.costs)), key=lambda s: -step.costs[s])
    halved, singles = cut([step.costs[s] for s in ordered], step.count)
    over_all = [[ordered[begin:end] for begin, end in runs] for runs in ([halved] if halved == singles else [halved, singles])]
    bound = min(_unbound(step).unevenness(_clustered(runs, step)) for runs in over_all)
    candidates = [_grouped(step, runs, step.microbatches) for runs in over_all[1:]]
    for size in (size for size in range(1, step.microbatches + 1) if step.microbatches % size == 0):
        candidates.append(_padded_in_groups(step, size))
        if size * step.lanes >= _MANY or step.unevenness(candidates[-1]) <= _CLOSE * bound:
            break
    return min(candidates, key=step.unevenness)


def _padded_in_groups(step: _Step, size: int) -> Slots:
    """Samples to groups of `size` microbatches, to slots of similar lengths there, and slots to its microbatches."""
    works = [Work(np.array(step.costs, np.float64)), *(replace(w, span=max(1, w.span // size)) for w in step.encoders)]
    parts = share(works, step.microbatches // size, least=size * step.lanes, most=step.most(size * step.lanes))
    assert parts is not None, "no bound was given"
    slots: Slots = []
    for part in parts:
        ordered = sorted(part, key=lambda s: -step.costs[s])
        runs, _ = cut([step.costs[s] for s in ordered], size * step.lanes)
        slots += _grouped(step, [ordered[begin:end] for begin, end in runs], size)
    return slots


def _grouped(step: _Step, flat: list[list[int]], microbatches: int) -> Slots:
    """Whole slots to microbatches: so that all kinds of work are even, or the heaviest together, whichever is better."""
    loads = [step.load(slot) for slot in flat]
    part_of = replace(step, encoders=tuple(replace(w, span=min(w.span, microbatches)) for w in step.encoders))
    part_of = replace(part_of, microbatches=microbatches)
    together = _clustered(sorted(flat, key=lambda slot: -step.load(slot)), part_of)
    works = [Work(np.array(loads, np.float64)), *(replace(w, units=_sums(w.units, flat)) for w in part_of.encoders)]
    if not flat or all(work.span >= microbatches for work in part_of.encoders):
        return together
    parts = share(works, microbatches, least=step.lanes, most=step.lanes)
    assert parts is not None, "as many slots as places"
    evenly = [_filled([flat[number] for number in part], step.lanes) for part in parts]
    return min(evenly, together, key=part_of.unevenness)


def _clustered(flat: Sequence[list[int]], step: _Step) -> Slots:
    """Slots to microbatches in their order."""
    return [_filled(flat[first : first + step.lanes], step.lanes) for first in range(0, step.count, step.lanes)]


def _filled(slots: Sequence[list[int]], lanes: int) -> list[list[int]]:
    return [*slots, *([] for _ in range(lanes - len(slots)))]


def _unbound(step: _Step) -> _Step:
    """The same for the language model, with passes of encoders that are even whatever a plan does."""
    return replace(step, encoders=tuple(replace(work, span=step.microbatches) for work in step.encoders))


def _sums(units: Numbers, slots: Sequence[Sequence[int]]) -> Numbers:
    values = units.tolist()
    return np.array([fsum(values[s] for s in slot) for slot in slots], np.float64)


def _over_mean(loads: Sequence[float], costs: Sequence[float]) -> float:
    total = fsum(costs)
    return max(loads) / total if total else 0.0


def _waits(loads: Sequence[Sequence[float]], costs: Sequence[float]) -> float:
    total = fsum(costs)
    return fsum(len(part) * max(part) for part in loads) / total if total else 0.0


def _heaviest_pass(work: Work, slots: Slots) -> float:
    """Over the mean one, by microbatch that it serves."""
    values = work.units.tolist()
    parts = [fsum(values[s] for slot in part for s in slot) for part in slots]
    passes = [parts[first : first + work.span] for first in range(0, len(parts), work.span)]
    total = fsum(parts)
    return len(parts) * max(fsum(served) / len(served) for served in passes) / total if total else 1.0


def _even_lanes(slots: Slots, step: _Step) -> Slots:
    """In each microbatch, the heaviest slot to the lane that has carried least so far; samples of a slot in ascending order."""
    carried = [0.0] * step.lanes
    placed: Slots = []
    for part in slots:
        loads = [step.load(slot) for slot in part]
        heaviest = sorted(range(len(part)), key=lambda number: -loads[number])
        lightest = sorted(range(len(part)), key=lambda lane: carried[lane])
        here: list[list[int]] = [[] for _ in part]
        for number, lane in zip(heaviest, lightest, strict=True):
            here[lane] = sorted(part[number])
            carried[lane] += loads[number]
        placed.append(here)
    return placed
