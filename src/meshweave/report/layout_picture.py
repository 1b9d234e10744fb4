"""What does a layout look like? A picture: ranks as columns, modules as rows, one coloured block per lane."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from meshweave.layout import AXES, Placement

COLOURS = ("#4e79a7", "#e07b26", "#59a14f", "#9d6b98", "#d1495b", "#3f8f8b", "#a98600", "#7a5c4a")
IDLE, INK, FAINT = "#f0f0f0", "#222222", "#777777"
RANKS_A_BAND = 32
"""Columns side by side; more ranks go on in the next band below."""
MOST_BANDS = 6
"""More bands than these are not drawn: the middle ones give way."""

HEAD, RANK_LINE, LANE_LINE, INDEX_LINE, GAP = 0.42, 0.27, 0.36, 0.17, 0.09  # heights in inches


def draw_layout_map(placements: Mapping[str, Placement], world_size: int, path: Path, title: str = "") -> None:
    """Writes the layout map of a run as a picture, in the format that `path` ends in (PNG, SVG, PDF).

    A coloured block is a lane: ranks that work on the same samples or media items. In it, every rank shows
    its index along the other axes (tp, cp, …). A rank that takes no part in a module is grey in its row.
    """
    bands = _bands(world_size)
    columns = max(len(band) for band in bands)
    cell = min(1.1, max(0.36, 8.8 / columns))
    heights = [LANE_LINE + INDEX_LINE * len(_inner_axes(placement)) for placement in placements.values()]
    band_height = RANK_LINE + sum(heights) + GAP * len(heights)
    head = HEAD if title else 0.1
    margin = 0.3 + max(max(0.1 * len(name), 0.076 * len(_sizes(placement))) for name, placement in placements.items())
    width = max(margin + columns * cell + 0.2, 0.3 + 0.105 * len(title))
    height = head + len(bands) * (band_height + 0.14)

    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)  # inches from the top, as one reads
    axes.axis("off")
    axes.text(0.15, 0.24, title, fontsize=12, weight="bold", color=INK, va="center")
    for number, band in enumerate(bands):
        top = head + number * (band_height + 0.14)
        if number and band.start != bands[number - 1].stop:
            left_out = f"… ranks {bands[number - 1].stop} to {band.start - 1} …"
            axes.text(margin, top, left_out, fontsize=9, color=FAINT, va="center", style="italic")
        _draw_ranks(axes, band, margin, top + RANK_LINE / 2, cell)
        top += RANK_LINE
        for (name, placement), row_height in zip(placements.items(), heights, strict=True):
            right, middle = margin - 0.12, top + row_height / 2
            axes.text(right, middle - 0.09, name, **_style(10.5, ha="right", weight="bold"))
            axes.text(right, middle + 0.1, _sizes(placement), **_style(9, ha="right", color=FAINT))
            _draw_row(axes, placement, band, margin, top, cell, row_height)
            top += row_height + GAP
    figure.savefig(path, dpi=160, facecolor="white")


def _bands(world_size: int) -> list[range]:
    """The ranks of each band."""
    bands = [range(first, min(first + RANKS_A_BAND, world_size)) for first in range(0, world_size, RANKS_A_BAND)]
    return bands if len(bands) <= MOST_BANDS else [*bands[: MOST_BANDS - 1], bands[-1]]


def _draw_ranks(axes: Axes, band: range, left: float, middle: float, cell: float) -> None:
    for column, rank in enumerate(band):
        text = f"rank {rank}" if cell > 0.6 else str(rank)
        axes.text(left + (column + 0.5) * cell, middle, text, **_style(9 if cell > 0.6 else 7.5, color=FAINT))


def _draw_row(axes: Axes, placement: Placement, band: range, left: float, top: float, cell: float, height: float) -> None:
    inner = _inner_axes(placement)
    size = 8.5 if cell > 0.6 else 6.5
    for start, stop, lane in _lane_runs(placement, band):
        x, width = left + start * cell, (stop - start) * cell
        _draw_block(axes, x, top, width, height, IDLE if lane is None else COLOURS[lane % len(COLOURS)])
        if lane is None:
            continue
        text = f"lane {lane}" if width > 0.55 else str(lane)
        fitting = min(9.5, 80 * width / len(text))
        axes.text(x + width / 2, top + LANE_LINE / 2, text, **_style(fitting, color="white", weight="bold"))
        for column in range(start, stop) if inner else ():
            at = left + column * cell
            coordinate = placement.coordinate(band[column]) or {}
            if column > start:
                line = [top + LANE_LINE - 0.02, top + height - 0.06]
                axes.plot([at, at], line, color="white", alpha=0.5, linewidth=0.8)
            for line_number, axis in enumerate(inner):
                middle = top + LANE_LINE - 0.03 + (line_number + 0.5) * INDEX_LINE
                axes.text(at + cell / 2, middle, f"{axis} {coordinate[axis]}", **_style(size, color="white"))


def _draw_block(axes: Axes, x: float, top: float, width: float, height: float, colour: str) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x + 0.02, top),
            width - 0.04,
            height,
            boxstyle="round,pad=0,rounding_size=0.05",
            facecolor=colour,
            edgecolor="none",
        )
    )


def _lane_runs(placement: Placement, band: Sequence[int]) -> Iterator[tuple[int, int, int | None]]:
    """(first column, column behind the last, lane) of each run of neighbours in one lane; None: no lane."""
    coordinates = [placement.coordinate(rank) for rank in band]
    places = [None if found is None else (found["pp"], found["dp"]) for found in coordinates]
    starts = [0, *(column for column, (a, b) in enumerate(pairwise(places), 1) if a != b)]
    for start, stop in zip(starts, [*starts[1:], len(places)], strict=True):
        place = places[start]
        yield start, stop, None if place is None else place[1]


def _inner_axes(placement: Placement) -> list[str]:
    """Axes whose index differs inside a lane, or from one pipeline stage to the next."""
    sizes = zip(AXES, placement.layout.sizes(), strict=True)
    return [axis for axis, size in sizes if size > 1 and axis != "dp"]


def _sizes(placement: Placement) -> str:
    """`dp 2 × tp 4`"""
    sizes = zip(AXES, placement.layout.sizes(), strict=True)
    return " × ".join(f"{axis} {size}" for axis, size in sizes if size > 1) or "dp 1"


def _style(size: float, **changes: Any) -> dict[str, Any]:
    return {"fontsize": size, "ha": "center", "va": "center_baseline", "color": INK, **changes}
