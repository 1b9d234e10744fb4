"""Which rank do the others wait for? Each rank's own pace, gathered at every log line, without what it waits for others."""

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import astuple, dataclass
from statistics import fmean, median, median_low
from typing import Any

import torch
import torch.distributed as dist

from meshweave.layout import Placement
from meshweave.schedule.runtime import lost_ranks_named
from meshweave.world import World

logger = logging.getLogger(__name__)

FACTOR = 1.5
"""A rank whose own time exceeds the median of those with the same work by so much is named."""

STEPS_IN_A_ROW = 5
"""For so long, at least."""


@dataclass(frozen=True)
class Pace:
    """Of one rank, in seconds a step."""

    working: float
    """Its own part of the step, without waits; those of ranks that share a layer lie inside it, and are not told apart."""
    loading: float
    """Its own part of preparing a step's data, in the loader's thread, without waits."""
    data_wait: float
    """Waiting for its loader."""
    boundary_wait: float
    """Waiting for other ranks: for their messages, and in the sums over ranks that a schedule lists or that end a step."""

    @property
    def busy(self) -> float:
        """What a step would take if nobody else were slower: the next one is loaded meanwhile."""
        return max(self.working, self.loading)


def same_work(placements: Mapping[str, Placement], size: int) -> list[Hashable]:
    """Rank to what it does; ranks with the same stages of the same modules are alike."""
    coordinates = [{name: its.coordinate(rank) for name, its in placements.items()} for rank in range(size)]
    return [tuple((name, where["pp"]) for name, where in its.items() if where is not None) for its in coordinates]


def slowest(busy: Sequence[float], works: Sequence[Hashable]) -> tuple[int, float]:
    """The rank that is slowest, compared with those that have the same work, and its time by their (lower) median."""
    alike: dict[Hashable, list[float]] = {}
    for seconds, work in zip(busy, works, strict=True):
        alike.setdefault(work, []).append(seconds)
    usual = {work: median_low(its) for work, its in alike.items()}
    factors = [seconds / usual[work] if usual[work] else 1.0 for seconds, work in zip(busy, works, strict=True)]
    rank = max(range(len(busy)), key=factors.__getitem__)
    return rank, factors[rank]


class Stragglers:
    """State: this rank's steps since they were last gathered; the rank that is too slow, for how many steps, and whether it was
    named."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._works = same_work(world.placements, world.size)
        self._steps: list[Pace] = []
        self._slow: tuple[int | None, int] = None, 0

    def add(self, pace: Pace) -> None:
        """Notes a step of this rank."""
        self._steps.append(pace)

    def gathered(self) -> dict[str, Any]:
        """What metrics show of the steps since the last call; rank 0 names a rank that has become too slow. A collective.

        Of each rank the median counts: a hiccup is none.
        """
        steps, self._steps = self._steps, []
        mine = torch.tensor([median(each) for each in zip(*map(astuple, steps), strict=True)], device=self._world.device)
        everyone = mine.new_empty(self._world.size * len(mine))
        if self._world.size > 1:
            with lost_ranks_named(self._world.rank, self._world.timeout_seconds, "gathering how fast ranks are"):
                dist.all_gather_single(everyone, mine)
        else:
            everyone = mine
        paces = [Pace(*its) for its in everyone.view(self._world.size, -1).tolist()]
        rank, factor = slowest([pace.busy for pace in paces], self._works)
        if (line := self._named(rank, factor, paces[rank], len(steps))) and self._world.rank == 0:
            logger.warning(line)
        shown = {name: [getattr(pace, name) for pace in paces] for name in ("busy", "data_wait", "boundary_wait")}
        return {"slowest_rank": rank} | {name: {"mean": fmean(its), "max": max(its)} for name, its in shown.items()}

    def _named(self, rank: int, factor: float, pace: Pace, steps: int) -> str | None:
        """The line that names the rank, once for as long as it goes on."""
        if factor <= FACTOR:
            self._slow = None, 0
            return None
        before = self._slow[1] if self._slow[0] == rank else 0
        self._slow = rank, before + steps
        if before >= STEPS_IN_A_ROW or before + steps < STEPS_IN_A_ROW:
            return None
        what = "loading its data" if pace.loading > pace.working else "its own work, waits left out,"
        return (
            f"rank {rank} is slow: {what} takes {pace.busy:.3f} s a step, {factor:.1f} × the median of the ranks with the same "
            "work; others wait for it"
        )
