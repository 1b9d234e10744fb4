"""When did every rank do what? A picture: ranks as rows, time to the right, one coloured block per computation."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from meshweave.config import LANGUAGE
from meshweave.report.layout_picture import COLOURS, FAINT, IDLE, INK
from meshweave.report.text import ranks_text, time_text, time_unit
from meshweave.schedule.actions import Kind
from meshweave.schedule.simulate import Span, Timeline

MOST_ROWS = 48
"""More rows than these are not drawn: the middle ones give way."""
LEAST_FONT, MOST_FONT, WANTED_FONT = 4.5, 8.0, 7.0
"""Sizes in points of the numbers in blocks; the axis of time is made long enough for the wanted one, up to a limit."""
DIGIT, ROOM = 0.64, 0.9
"""Width of a digit relative to the size of the font, and of the room around a number, in digits."""
LEAST_ACROSS, MOST_ACROSS = 8.0, 20.0
"""Length of the axis of time in inches."""
COMMUNICATION, HATCH = "#c4c4c4", "//////"
LIGHTNESS = {Kind.FORWARD: 0.6, Kind.BACKWARD: -0.02, Kind.INPUT_GRADIENT: -0.02, Kind.WEIGHT_GRADIENT: -0.48}
"""Computation to how far its module's colour goes towards white or, below 0, towards black."""
PIECES = 0.28
"""Lightness between the first and the last virtual stage of a row."""
NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT_GRADIENT: "input gradient",
    Kind.WEIGHT_GRADIENT: "weight gradient",
}
HEAD, TITLE_LINE, AXIS, LEGEND_LINE, GAP, SIDE, RIGHT = 0.1, 0.42, 0.56, 0.23, 0.16, 0.15, 0.66  # inches


class _Shade(NamedTuple):
    module: str
    kind: Kind
    place: float
    """Among the virtual stages of the row, from 0 to 1."""


@dataclass(frozen=True)
class _Block:
    """A span that takes time, as it is drawn."""

    row: int
    """Among the drawn ones."""
    span: Span
    shade: _Shade

    @property
    def seconds(self) -> float:
        return self.span.stop - self.span.start

    @property
    def computes(self) -> bool:
        return self.shade.kind in LIGHTNESS

    @property
    def digits(self) -> float:
        """Width of its number with the room around it."""
        return len(str(self.span.action.microbatch)) + ROOM


@dataclass(frozen=True)
class _Panel:
    """One timeline with all that its picture needs."""

    title: str
    timeline: Timeline
    rows: tuple[int | None, ...]
    """Row of the timeline of each drawn row; None stands for the rows that are left out."""
    blocks: tuple[_Block, ...]
    row_height: float

    @property
    def height(self) -> float:
        return self.row_height * max(1, len(self.rows))

    @property
    def totals(self) -> str:
        return f"step {time_text(self.timeline.seconds)} · bubble {abs(self.timeline.bubble):.1%}"

    def label(self, row: int | None) -> str:
        if row is None:
            return ""
        ranks = self.timeline.ranks[row]
        return f"rank{'s' if len(ranks) > 1 else ''} {ranks_text(ranks, 16)}"


@dataclass(frozen=True)
class _Scale:
    """What all panels share: the axis of time and the modules' colours."""

    seconds: float
    inches: float
    colours: Mapping[str, str]

    @property
    def unit(self) -> float:
        """Of the axis, in seconds."""
        return time_unit(self.seconds)[0]

    def points(self, block: _Block) -> float:
        """Width of a block."""
        return 72 * self.inches * block.seconds / self.seconds

    def colour(self, shade: _Shade) -> str:
        if shade.kind not in LIGHTNESS:
            return COMMUNICATION
        lightness = LIGHTNESS[shade.kind] - PIECES * shade.place
        towards = 1.0 if lightness > 0 else 0.0
        red, green, blue = (part + abs(lightness) * (towards - part) for part in to_rgb(self.colours[shade.module]))
        return to_hex((red, green, blue))


def draw_timeline(timeline: Timeline, path: Path, title: str = "") -> None:
    """Writes when every row of a timeline, simulated or measured, did what, as a picture in the format that `path` ends in.

    A block is a computation, coloured by module; its number is the microbatch, for an encoder the pass. Numbers are left out
    where they do not fit, and rows where there are very many. Beside each row stands the share of the step in which it idles.
    """
    draw_timelines({title: timeline}, path)


def draw_timelines(timelines: Mapping[str, Timeline], path: Path) -> None:
    """Like `draw_timeline`, one panel below the other on the same axis of time, to compare them.

    Args:
        timelines: title to timeline, at least one.
    """
    panels = [_panel(title, timeline) for title, timeline in timelines.items()]
    blocks = [block for panel in panels for block in panel.blocks]
    seconds = max(panel.timeline.seconds for panel in panels)
    left = SIDE + 0.12 + 0.068 * max((len(panel.label(row)) for panel in panels for row in panel.rows), default=0)
    titles = max(SIDE + 0.105 * len(panel.title) + 0.075 * len(panel.totals) for panel in panels)
    across = max(_across(blocks, seconds), titles - left)
    scale = _Scale(seconds, across, _module_colours(blocks))
    legend = _legend(blocks, scale)
    columns = _legend_columns(legend, across)
    width = left + across + RIGHT
    foot = AXIS + LEGEND_LINE * -(-len(legend) // columns)
    height = HEAD + sum(TITLE_LINE + panel.height for panel in panels) + GAP * (len(panels) - 1) + foot

    figure = Figure(figsize=(width, height))
    numbered, top = False, HEAD
    for panel in panels:
        middle = 1 - (top + 0.18) / height
        figure.text(SIDE / width, middle, panel.title, fontsize=11, weight="bold", color=INK, va="center")
        figure.text((left + across) / width, middle, panel.totals, **_faint(ha="right", va="center"))
        top += TITLE_LINE
        axes = figure.add_axes((left / width, 1 - (top + panel.height) / height, across / width, panel.height / height))
        numbered |= _draw_panel(axes, panel, scale)
        top += panel.height + GAP
    _label_time(figure.axes[-1], scale, numbered)
    if legend:
        _draw_legend(figure, legend, columns, (left / width, 0.06 / height))
    figure.savefig(path, dpi=150, facecolor="white")


def _panel(title: str, timeline: Timeline) -> _Panel:
    rows: list[int | None] = list(range(len(timeline.ranks)))
    if len(rows) > MOST_ROWS:
        rows = [*rows[: MOST_ROWS // 2], None, *rows[-(MOST_ROWS // 2) :]]
    blocks = [block for at, row in enumerate(rows) if row is not None for block in _blocks(at, timeline.spans[row])]
    return _Panel(title, timeline, tuple(rows), tuple(blocks), 0.3 if len(rows) <= 8 else 0.24 if len(rows) <= 20 else 0.19)


def _blocks(at: int, spans: Sequence[Span]) -> Iterator[_Block]:
    stages: dict[str, set[int]] = defaultdict(set)
    for span in spans:
        stages[span.action.module].add(span.action.stage)
    places = {
        (module, stage): place / max(1, len(its) - 1) for module, its in stages.items() for place, stage in enumerate(sorted(its))
    }
    for span in spans:
        if span.stop > span.start:
            kind, module, stage, _, _ = span.action
            yield _Block(at, span, _Shade(module, kind, places[module, stage]))


def _across(blocks: Iterable[_Block], seconds: float) -> float:
    """Inches of the axis of time: as many as the numbers in most blocks need, within what a screen can hold."""
    needed = sorted(DIGIT * WANTED_FONT / 72 * block.digits / block.seconds for block in blocks if block.computes)
    wanted = seconds * needed[int(0.95 * len(needed))] if needed else 0.0
    return min(MOST_ACROSS, max(LEAST_ACROSS, wanted))


def _module_colours(blocks: Iterable[_Block]) -> dict[str, str]:
    """The language model always has the first colour, encoders the others in the order of their rows."""
    modules = dict.fromkeys(block.shade.module for block in blocks)
    encoders = [module for module in modules if module != LANGUAGE]
    return {LANGUAGE: COLOURS[0]} | {name: COLOURS[1 + at % (len(COLOURS) - 1)] for at, name in enumerate(encoders)}


def _draw_panel(axes: Axes, panel: _Panel, scale: _Scale) -> bool:
    """Whether there are numbers in it."""
    seconds = panel.timeline.seconds
    axes.set_xlim(0, scale.seconds / scale.unit or 1)
    axes.set_ylim(max(1, len(panel.rows)), 0)
    for at, row in enumerate(panel.rows):
        if row is None:
            style = _faint(va="center", style="italic")
            axes.annotate(_left_out(panel), (0, at + 0.5), (5, 0), textcoords="offset points", **style)
        else:
            axes.add_patch(Rectangle((0, at + 0.08), seconds / scale.unit, 0.84, facecolor=IDLE))
    _draw_blocks(axes, panel, scale)
    numbered = _draw_numbers(axes, panel, scale)
    _draw_bubbles(axes, panel)
    axes.set_yticks([at + 0.5 for at in range(len(panel.rows))], [panel.label(row) for row in panel.rows])
    axes.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=INK)
    axes.tick_params(axis="x", length=3, labelsize=8, colors=FAINT, labelbottom=False)
    axes.xaxis.set_major_locator(MaxNLocator(int(scale.inches), steps=[1, 2, 2.5, 5, 10]))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
    return numbered


def _left_out(panel: _Panel) -> str:
    half = MOST_ROWS // 2
    ranks = sorted(rank for its in panel.timeline.ranks[half:-half] for rank in its)
    return f"… {len(panel.timeline.ranks) - 2 * half} rows left out: ranks {ranks_text(ranks, 60)} …"


def _draw_blocks(axes: Axes, panel: _Panel, scale: _Scale) -> None:
    widths = sorted(map(scale.points, panel.blocks))
    # Between very narrow blocks, white lines would only make the colours pale.
    line = min(0.7, max(0.0, 0.12 * (widths[len(widths) // 2] - 3))) if widths else 0.0
    for computes, hatch in ((True, None), (False, HATCH)):
        some = [block for block in panel.blocks if block.computes == computes]
        corners = [_corners(block, scale.unit) for block in some]
        colours = [scale.colour(block.shade) for block in some]
        axes.add_collection(PolyCollection(corners, facecolors=colours, edgecolors="white", linewidths=line, hatch=hatch))


def _corners(block: _Block, unit: float) -> list[tuple[float, float]]:
    start, stop, above, below = block.span.start / unit, block.span.stop / unit, block.row + 0.08, block.row + 0.92
    return [(start, above), (stop, above), (stop, below), (start, below)]


def _draw_numbers(axes: Axes, panel: _Panel, scale: _Scale) -> bool:
    """Whether there are any.

    They have one size, and stand in all blocks of a module and kind or in none: here and there, they would look like a finding.
    """
    groups: dict[tuple[str, Kind], list[_Block]] = defaultdict(list)
    for block in panel.blocks:
        if block.computes:
            groups[block.shade[:2]].append(block)
    fitting = {group: _fitting_font(blocks, scale) for group, blocks in groups.items()}
    numbered = {group: font for group, font in fitting.items() if font >= LEAST_FONT}
    font = min(MOST_FONT, 72 * 0.55 * panel.row_height, min(numbered.values(), default=MOST_FONT))
    for group in numbered:
        colour = INK if LIGHTNESS[group[1]] > 0 else "white"
        for block in groups[group]:
            if scale.points(block) >= DIGIT * block.digits * font:
                middle = (block.span.start + block.span.stop) / 2 / scale.unit
                number = str(block.span.action.microbatch)
                axes.text(middle, block.row + 0.5, number, fontsize=font, color=colour, ha="center", va="center_baseline")
    return bool(numbered)


def _fitting_font(blocks: Iterable[_Block], scale: _Scale) -> float:
    """Largest size in which the numbers fit nearly all of these blocks: a few very short ones do not decide it."""
    fonts = sorted(scale.points(block) / (DIGIT * block.digits) for block in blocks)
    return fonts[len(fonts) // 20]


def _draw_bubbles(axes: Axes, panel: _Panel) -> None:
    beside: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
    bubbles = panel.timeline.bubbles
    for at, row in enumerate(panel.rows):
        if row is not None:
            axes.annotate(f"{abs(bubbles[row]):.0%}", (1, at + 0.5), (40, 0), **beside, **_faint(ha="right", va="center"))
    axes.annotate("bubble", (1, 0), (40, 4), **beside, **_faint(ha="right", va="bottom"))


def _label_time(last: Axes, scale: _Scale, numbered: bool) -> None:
    last.tick_params(axis="x", labelbottom=True)
    last.set_xlabel(f"time ({time_unit(scale.seconds)[1]})", **_faint())
    if numbered:
        text = "numbers: microbatches" + (" (of encoders: passes)" if len(scale.colours) > 1 else "")
        style = _faint(ha="right", va="top")
        last.annotate(text, (1, 0), (0, -19.5), xycoords="axes fraction", textcoords="offset points", **style)


def _legend(blocks: Iterable[_Block], scale: _Scale) -> dict[str, Any]:
    """Text to what it explains: the shades of a module's virtual stages side by side."""
    shades = {block.shade for block in blocks}
    legend: dict[str, Any] = {}
    for module in [*(name for name in scale.colours if name != LANGUAGE), LANGUAGE]:
        for kind, name in NAMES.items():
            its = sorted(shade for shade in shades if shade[:2] == (module, kind))
            if its:
                label = f"{module} {name}" + (", by virtual stage" if len(its) > 1 else "")
                legend[label] = tuple(Patch(facecolor=scale.colour(shade)) for shade in its)
    if any(shade.kind not in LIGHTNESS for shade in shades):
        legend["gather, reduce"] = Patch(facecolor=COMMUNICATION, edgecolor="white", hatch=HATCH)
    return legend


def _legend_columns(legend: Iterable[str], inches: float) -> int:
    """As many as fit."""
    widths = [0.5 + 0.075 * len(text) for text in legend]
    for lines in range(1, len(widths)):
        columns = [widths[at : at + lines] for at in range(0, len(widths), lines)]
        if sum(map(max, columns)) <= inches:
            return len(columns)
    return 1


def _draw_legend(figure: Figure, legend: Mapping[str, Any], columns: int, corner: tuple[float, float]) -> None:
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": corner, "borderaxespad": 0, "borderpad": 0}
    look: dict[str, Any] = {"frameon": False, "labelcolor": INK, "fontsize": 8.5, "handlelength": 1.6, "columnspacing": 1.6}
    handler: dict[Any, Any] = {tuple: HandlerTuple(ndivide=None, pad=0)}
    figure.legend(list(legend.values()), list(legend), ncols=columns, handler_map=handler, **place, **look)


def _faint(**changes: Any) -> dict[str, Any]:
    return {"fontsize": 8.5, "color": FAINT, **changes}
