"""Where? Layouts, placements, and the geometry of ranks; for any rank, without a process group.

"axis" names a dimension of a layout or mesh, "dim" a dimension of a tensor.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from math import prod

from meshweave.config import RunConfig
from meshweave.errors import LayoutError

AXES = ("pp", "dp", "replicas", "cp", "tp")
"""Axes of the dense view, outermost first."""

EXPERT_AXES = ("pp", "edp", "ep", "etp")
"""Axes of the expert view of the same ranks, outermost first; `edp` is the data parallelism left to the experts."""


@dataclass(frozen=True)
class Layout:
    """How one module is split over its ranks.

    Raises:
        LayoutError: a size is below 1, or the expert sizes do not divide the ranks of a pipeline stage.
    """

    pp: int = 1
    """Pipeline stages."""
    dp: int = 1
    """Lanes: data-parallel replicas, each working on its own samples or media items."""
    cp: int = 1
    """Ranks that share one lane's sequence."""
    tp: int = 1
    """Ranks that share one layer's matrices."""
    ep: int = 1
    """Ranks that share one layer's experts."""
    etp: int = 1
    """Ranks that share one expert's matrices."""
    replicas: int = 1
    """Ranks that repeat the same work, as a homogeneous run does for an encoder under context parallelism."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) < 1:
                raise LayoutError(f"{field.name}={value}: every size of a layout is at least 1")
        if self.stage_size % (self.ep * self.etp):
            raise LayoutError(
                f"ep={self.ep} × etp={self.etp} does not divide the {self.stage_size} ranks of a pipeline stage "
                f"(dp={self.dp} × replicas={self.replicas} × cp={self.cp} × tp={self.tp})"
            )

    @property
    def size(self) -> int:
        """Ranks the layout needs."""
        return self.pp * self.stage_size

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.dp * self.replicas * self.cp * self.tp

    @property
    def lane_size(self) -> int:
        """Ranks of one lane of one pipeline stage."""
        return self.replicas * self.cp * self.tp

    def sizes(self, axes: tuple[str, ...] = AXES) -> tuple[int, ...]:
        """Size of each of `axes` (dense or expert view)."""
        edp = self.stage_size // (self.ep * self.etp)
        return tuple(edp if axis == "edp" else getattr(self, axis) for axis in axes)

    def __str__(self) -> str:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return " ".join(f"{name}{size}" for name, size in named.items() if size > 1) or "dp1"


@dataclass(frozen=True)
class Placement:
    """A layout on its ranks: `ranks[i]` is the i-th position of the layout, `tp` innermost, then `cp`, `replicas`, `dp`, `pp`.

    Raises:
        LayoutError: a rank appears twice, is negative, or the number of ranks is not the layout's size.
    """

    layout: Layout
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(set(self.ranks)) != len(self.ranks):
            twice = sorted({rank for rank in self.ranks if self.ranks.count(rank) > 1})
            raise LayoutError(f"ranks {format_ranks(twice)} appear twice in one module")
        if any(rank < 0 for rank in self.ranks):
            raise LayoutError(f"ranks are counted from 0, got {min(self.ranks)}")
        if len(self.ranks) != self.layout.size:
            raise LayoutError(
                f"layout {self.layout} needs {self.layout.size} ranks, but {len(self.ranks)} are given: "
                f"{format_ranks(self.ranks)}"
            )

    @cached_property
    def _position(self) -> dict[int, int]:
        return {rank: position for position, rank in enumerate(self.ranks)}

    def __contains__(self, rank: int) -> bool:
        return rank in self._position

    def coordinate(self, rank: int, axes: tuple[str, ...] = AXES) -> dict[str, int] | None:
        """Index of `rank` along each of `axes` (dense or expert view); None outside the placement."""
        position = self._position.get(rank)
        if position is None:
            return None
        coordinate = {}
        for axis, size in zip(reversed(axes), reversed(self.layout.sizes(axes)), strict=True):
            position, coordinate[axis] = divmod(position, size)
        return {axis: coordinate[axis] for axis in axes}

    def group(self, rank: int, axis: str, axes: tuple[str, ...] = AXES) -> tuple[int, ...]:
        """Ranks that differ from `rank` along `axis` only, in order; empty outside the placement."""
        coordinate = self.coordinate(rank, axes)
        if coordinate is None:
            return ()
        sizes = self.layout.sizes(axes)
        stride = prod(sizes[axes.index(axis) + 1 :])
        first = self._position[rank] - coordinate[axis] * stride
        return tuple(self.ranks[first + index * stride] for index in range(sizes[axes.index(axis)]))

    def lane(self, rank: int) -> int | None:
        """Lane (index `dp`) of `rank`; None outside the placement."""
        coordinate = self.coordinate(rank)
        return None if coordinate is None else coordinate["dp"]

    def lanes(self, stage: int = 0) -> tuple[tuple[int, ...], ...]:
        """Ranks of every lane of one pipeline stage, in layout order."""
        first, width = stage * self.layout.stage_size, self.layout.lane_size
        starts = range(first, first + self.layout.stage_size, width)
        return tuple(self.ranks[start : start + width] for start in starts)

    def grid(self) -> list:
        """Ranks as a nested list of shape `layout.sizes()`."""
        nested: list = list(self.ranks)
        for size in reversed(self.layout.sizes()[1:]):
            nested = [nested[start : start + size] for start in range(0, len(nested), size)]
        return nested

    def __str__(self) -> str:
        return f"{self.layout} on ranks {format_ranks(self.ranks)}"


def relation(first: Placement, second: Placement) -> str:
    """Says "colocated" (same ranks), "non-colocated" (disjoint) or "overlapping"."""
    a, b = set(first.ranks), set(second.ranks)
    return "colocated" if a == b else "overlapping" if a & b else "non-colocated"


def placements(config: RunConfig) -> dict[str, Placement]:
    """Placement of every module of a run, in the run file's order.

    Raises:
        LayoutError: the sizes of a module are inconsistent.
    """
    found = {}
    for name, module in config.modules.items():
        sizes = {field.name: getattr(module, field.name) for field in fields(Layout)}
        try:
            found[name] = Placement(Layout(**sizes), module.ranks)
        except LayoutError as error:
            raise LayoutError(f"modules.{name}: {error}") from error
    return found


def format_ranks(ranks: tuple[int, ...] | list[int]) -> str:
    """Ranks as a run file writes them, ascending runs shortened: `0-3,8`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
