"""How are things shared out so that every group gets the same work, of several kinds at once? Greedily, then by exchanges."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]
Runs = list[tuple[int, int]]
"""[begin, end) of neighbouring items, ascending."""

# Sums are taken in a fixed order and never by a vectorised reduction: every machine must round, and so decide, alike.

_GOOD_ENOUGH = 1.004
"""Heaviest over mean from which on exchanges are not worth their time."""
_MOST_COMPARED = 96
"""Items of a group that an exchange looks at; of a larger one, an even selection from heavy to light."""
_PARTNERS = 3
"""Groups that the heaviest one tries to exchange with: the lightest."""


@dataclass(frozen=True)
class Work:
    """One kind of work that items bring, to be even over groups."""

    units: Numbers
    """[items] float64, at least 0; only ratios matter."""
    span: int = 1
    """Consecutive groups that are worked together: only their sum has to be even."""
    weight: float = 1.0
    """How much this kind counts where not all can be even."""


def share(
    works: Sequence[Work],
    groups: int,
    *,
    least: int = 0,
    most: int | None = None,
    sizes: Sequence[int] | None = None,
    capacity: int | None = None,
) -> list[list[int]] | None:
    """Item numbers of each group, ascending, with every kind of work as even as it gets; None if no room was found.

    The heaviest first, each to the group where it adds least to the sum of squares of all loads; then the heaviest group
    exchanges items with the lightest, as long as that helps.

    Args:
        least: items that each group gets, if there are enough.
        most: items that a group takes.
        sizes, capacity: the sizes of a group's items add up to at most `capacity`.
    """
    count = len(works[0].units)
    if most is not None and count > most * groups:
        return None
    room = np.full(groups, capacity if capacity is not None else 0, np.int64)
    if groups == 1:
        return None if sizes is not None and capacity is not None and sum(sizes) > capacity else [list(range(count))]
    loads = _Loads.of(works, groups)
    least = min(least, count // groups)
    counts, missing = np.zeros(groups, np.int64), least * groups
    members: list[list[int]] = [[] for _ in range(groups)]
    for done, item in enumerate(loads.heaviest_first()):
        score = loads.growth(item)
        # Not `else`: an item may find several doors closed.
        if missing == count - done:
            score = np.where(counts < least, score, np.inf)
        if most is not None:
            score = np.where(counts < most, score, np.inf)
        if sizes is not None and capacity is not None:
            score = np.where(room >= sizes[item], score, np.inf)
            if score.min() == np.inf:
                return None
            room[group := int(score.argmin())] -= sizes[item]
        else:
            group = int(score.argmin())
        missing -= counts[group] < least
        counts[group] += 1
        members[group].append(item)
        loads.add(item, group, 1)
    exchange_items(members, loads, 4 * groups, least=least, most=most, sizes=sizes, room=room if sizes is not None else None)
    return [sorted(group) for group in members]


def spread(costs: Sequence[float], groups: int, sizes: Sequence[int] | None = None, capacity: int | None = None) -> Any:
    """Item numbers of each group, ascending, with one kind of work even over very many groups; None if no room was found.

    The most expensive first onto the lightest group (that has room), one item each before any gets a second; then exchanges.
    """
    members: list[list[int]] = [[] for _ in range(groups)]
    room = np.full(groups, capacity if capacity is not None else 0, np.int64)
    heap = [(0.0, 0, group) for group in range(groups)]  # load, whether it has any, group
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        passed_over = []
        while sizes is not None and heap and room[heap[0][2]] < sizes[item]:
            passed_over.append(heapq.heappop(heap))
            if len(passed_over) == _MOST_COMPARED:
                return None
        if not heap:
            return None
        load, _, group = heap[0]
        heapq.heapreplace(heap, (load + costs[item], 1, group))
        for each in passed_over:
            heapq.heappush(heap, each)
        members[group].append(item)
        if sizes is not None:
            room[group] -= sizes[item]
    if groups > 1 and costs:
        loads = _Loads.of([Work(np.array(costs, np.float64))], groups)
        for group, items in enumerate(members):
            for item in items:
                loads.add(item, group, 1)
        rounds = min(2 * groups, 32)
        exchange_items(members, loads, rounds, least=1, sizes=sizes, room=room if sizes is not None else None)
    return [sorted(group) for group in members]


def fill_level(
    costs: Sequence[float], groups: int, level: float, leave: int, sizes: Sequence[int], capacity: int
) -> list[list[int]]:
    """Item numbers of each group, filled up to `level` and not beyond: the most expensive first, each onto the lightest group if
    that can take it. `leave` items, at least, are left over; so is what finds no room."""
    members: list[list[int]] = [[] for _ in range(groups)]
    room = [capacity] * groups
    heap = [(0.0, group) for group in range(groups)]
    left = len(costs)
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        load, group = heap[0]
        if left == leave:
            break
        if load + costs[item] > level * (1 + 1e-9) or sizes[item] > room[group]:
            continue
        members[group].append(item)
        left -= 1
        room[group] -= sizes[item]
        heapq.heapreplace(heap, (load + costs[item], group))
    return members


def best_fit(sizes: Sequence[int], groups: int, capacity: int) -> list[list[int]] | None:
    """Item numbers of each group, ascending: the largest first, each where the least room is left; then one item at least
    in every group. None where that finds no room (it needs at most 11/9 of the groups that the best packing does, and 6/9 of
    one: Dósa 2007, of first-fit decreasing)."""
    members: list[list[int]] = [[] for _ in range(groups)]
    rooms = [(capacity, group) for group in range(groups)]
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        at = bisect_left(rooms, (sizes[item], -1))
        if at == len(rooms):
            return None
        room, group = rooms.pop(at)
        members[group].append(item)
        insort(rooms, (room - sizes[item], group))
    # The last item of a group is its smallest.
    fullest = [(-len(items), group) for group, items in enumerate(members) if len(items) > 1]
    heapq.heapify(fullest)
    for group, items in enumerate(members):
        if not items and fullest:
            negative, giver = heapq.heappop(fullest)
            items.append(members[giver].pop())
            if negative < -2:
                heapq.heappush(fullest, (negative + 1, giver))
            members[group] = items
    return [sorted(group) for group in members]


def cut(costs: Sequence[float], parts: int) -> tuple[Runs, Runs]:
    """Cuts a list of descending costs into `parts` runs whose length × first cost is at most little more than it must be; fewer
    runs where there are fewer items.

    Rows of a batch are padded to the longest, so this is the cost of a run. Neighbours are best: in the run of the longest row,
    any other row can give way to the next longest without cost.
    Where fewer runs would do, because the first item alone costs that much, there are two ways to make more of them: the
    costliest are halved, or all are left as they are and the last items become runs by themselves.
    """
    parts = min(parts, len(costs))
    if not parts:
        return [], []
    least = max(costs[0], fsum(costs) / parts)
    enough = costs[0] * -(-len(costs) // parts)
    while enough > least * 1.001:
        middle = (least + enough) / 2
        if _runs(costs, middle, parts) is None:
            least = middle
        else:
            enough = middle
    runs = _runs(costs, enough, parts)
    assert runs is not None, "runs of equal length cost no more than the first bound"
    return _halved(costs, runs, parts), _with_singles(runs, len(costs), parts)


def _halved(costs: Sequence[float], runs: Runs, parts: int) -> Runs:
    heap = [((begin - end) * costs[begin], begin, end) for begin, end in runs if end - begin > 1]
    heapq.heapify(heap)
    kept = [run for run in runs if run[1] - run[0] == 1]
    while len(kept) + len(heap) < parts:
        _, begin, end = heapq.heappop(heap)
        for first, last in ((begin, (begin + end) // 2), ((begin + end) // 2, end)):
            if last - first > 1:
                heapq.heappush(heap, ((first - last) * costs[first], first, last))
            else:
                kept.append((first, last))
    return sorted(kept + [(begin, end) for _, begin, end in heap])


def _with_singles(runs: Runs, count: int, parts: int) -> Runs:
    begins = [begin for begin, _ in runs]
    last = count
    while bisect_left(begins, last) + count - last < parts:
        last -= 1
    return [(begin, min(end, last)) for begin, end in runs if begin < last] + [(n, n + 1) for n in range(last, count)]


def _runs(costs: Sequence[float], bound: float, parts: int) -> Runs | None:
    """The longest runs whose length × first cost is within the bound; None if they are more than `parts`."""
    runs: Runs = []
    begin, bound = 0, bound * (1 + 1e-12)
    while begin < len(costs):
        if len(runs) == parts:
            return None
        end = min(len(costs), begin + max(1, int(bound // costs[begin]))) if costs[begin] else len(costs)
        runs.append((begin, end))
        begin = end
    return runs


@dataclass
class _Loads:
    """What groups carry of each kind of work. State: `density`, changed by `add`."""

    units: Numbers
    """[kinds, items], scaled so that an even load is √weight."""
    density: Numbers
    """[kinds, groups]: the load of a group's span, by group of the span."""
    even: Numbers
    """[kinds]: √weight."""
    spans: list[int]

    @classmethod
    def of(cls, works: Sequence[Work], groups: int) -> "_Loads":
        # By the largest first: sums of numbers near the ends of what a float can say would be none.
        relative = [work.units / (work.units.max(initial=0.0) or 1.0) for work in works]
        totals = [fsum(units) for units in relative]
        kinds = [n for n, work in enumerate(works) if work.weight and totals[n] and work.span < groups] or [0]
        units = np.stack([relative[n] * (sqrt(works[n].weight) * groups / (totals[n] or 1.0)) for n in kinds])
        even = np.array([sqrt(works[n].weight) for n in kinds])
        return cls(units, np.zeros((len(kinds), groups)), even, [works[n].span for n in kinds])

    def heaviest_first(self) -> list[int]:
        order: list[int] = np.argsort(-self.units.max(axis=0), kind="stable").tolist()
        return order

    def growth(self, item: int) -> Numbers:
        """[groups]: how much the sum of squares would grow, less what is the same for all."""
        score = self.density[0] * self.units[0, item]
        for kind in range(1, len(self.spans)):
            score += self.density[kind] * self.units[kind, item]
        return score

    def add(self, item: int, group: int, sign: int) -> None:
        for kind, span in enumerate(self.spans):
            if span == 1:
                self.density[kind, group] += sign * self.units[kind, item]
            else:
                part = self.density[kind, group // span * span : (group // span + 1) * span]
                part += sign * self.units[kind, item] / len(part)

    def heaviest(self) -> tuple[float, int, int]:
        """(heaviest over even, its kind, its group)."""
        relative = self.density / self.even[:, None]
        kind, group = divmod(int(relative.argmax()), relative.shape[1])
        return float(relative[kind, group]), kind, group

    def lightest(self, kind: int, group: int) -> list[int]:
        """The groups of least load, outside of the span of `group`."""
        span, lightest = self.spans[kind], np.argsort(self.density[kind], kind="stable")
        return [int(other) for other in lightest[: _PARTNERS + span] if other // span != group // span][:_PARTNERS]

    def change(self, one: int, other: int, ones: Numbers, others: Numbers) -> Numbers:
        """[ones, others]: what the sum of squares changes by if `one` gives the one item for the other; item -1 is none."""
        total = np.zeros((len(ones), len(others)))
        groups = self.density.shape[1]
        for kind, span in enumerate(self.spans):
            if one // span == other // span:
                continue
            row = np.append(self.units[kind], 0.0)
            moved = row[ones][:, None] - row[others][None, :]
            widths = [min(span, groups - group // span * span) for group in (one, other)]
            total += moved * (moved * (1 / widths[0] + 1 / widths[1]) + 2 * (self.density[kind, other] - self.density[kind, one]))
        return total


def exchange_items(
    members: list[list[int]],
    loads: _Loads,
    rounds: int,
    *,
    least: int = 0,
    most: int | None = None,
    sizes: Sequence[int] | None = None,
    room: Numbers | None = None,
) -> None:
    """Lets the heaviest group give items to lighter ones, or take others for them, in place, while that evens loads."""
    lengths = None if sizes is None else np.append(np.asarray(sizes, np.int64), 0)
    for _ in range(rounds):
        excess, kind, one = loads.heaviest()
        if excess <= _GOOD_ENOUGH:
            return
        for other in loads.lightest(kind, one):
            ones, others = _candidates(members[one]), _candidates(members[other])
            if len(members[one]) > least and (most is None or len(members[other]) < most):
                others = np.append(others, -1)
            if len(members[other]) > least and (most is None or len(members[one]) < most):
                ones = np.append(ones, -1)
            if not len(ones) or not len(others):
                continue
            change = loads.change(one, other, ones, others)
            if lengths is not None and room is not None:
                grows = lengths[others][None, :] - lengths[ones][:, None]
                change = np.where((grows <= room[one]) & (-grows <= room[other]), change, np.inf)
            best = int(change.argmin())
            given, taken = int(ones[best // len(others)]), int(others[best % len(others)])
            if change.flat[best] < -1e-9:
                for item, giver, taker in ((given, one, other), (taken, other, one)):
                    if item >= 0:
                        members[giver].remove(item)
                        members[taker].append(item)
                        loads.add(item, giver, -1)
                        loads.add(item, taker, 1)
                        if lengths is not None and room is not None:
                            room[giver] += lengths[item]
                            room[taker] -= lengths[item]
                break
        else:
            return


def _candidates(items: Sequence[int]) -> Numbers:
    every = -(-len(items) // _MOST_COMPARED) or 1
    return np.array(items[::every], np.int64)
