"""What is in a run's data? Faults by kind, sizes, what limits do: the report that `meshweave data check` prints and draws."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from meshweave.data.faults import FEWEST, Fault, too_many
from meshweave.errors import FaultKind
from meshweave.report.balance import Spread
from meshweave.report.curves import COLOURS, FAINT, INK

MOST_EXAMPLES = 3
"""Faults of a kind that are shown."""


@dataclass(frozen=True)
class SampleFacts:
    """What a check found out about one sample."""

    sample: int
    tokens: int = 0
    targets: int = 0
    media_tokens: int = 0
    sizes: tuple[tuple[int, int], ...] = ()
    """(height, width) of its pictures in pixels, as the model's processor gets them."""
    effects: tuple[str, ...] = ()
    """What limits of the run file did to it."""
    fault: Fault | None = None


@dataclass(frozen=True)
class DataReport:
    """What `meshweave data check` has to say of all samples."""

    data: str
    """Where they are."""
    samples: int
    decoded: bool
    """Whether pictures were decoded, too, or only their headers read."""
    max_skipped: float
    max_length: int | None
    tokens: Sequence[int]
    """Of every sample that is trained; so the next ones."""
    targets: Sequence[int]
    images: Sequence[int]
    pixels: Sequence[int]
    """Of every picture of these samples."""
    media_tokens: int
    faults: Mapping[str, Mapping[FaultKind, int]] = field(default_factory=dict)
    """"unreadable" and "left out", each: kind → samples."""
    examples: Mapping[FaultKind, Sequence[str]] = field(default_factory=dict)
    effects: Mapping[str, int] = field(default_factory=dict)

    @property
    def unreadable(self) -> int:
        """Samples that cannot be read."""
        return sum(self.faults["unreadable"].values())

    @property
    def passed(self) -> bool:
        """Whether a run would go through: something is left, and not more than `data.max_skipped` is unreadable."""
        return bool(len(self.tokens)) and not too_many(self.unreadable, self.samples, self.max_skipped)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        spreads = {"tokens": self.tokens, "targets": self.targets, "images": self.images, "pixels": self.pixels}
        return {
            "data": self.data,
            "samples": self.samples,
            "trained": len(self.tokens),
            "decoded": self.decoded,
            "passed": self.passed,
            **{name.replace(" ", "_"): dict(kinds) for name, kinds in self.faults.items()},
            "examples": {kind: list(messages) for kind, messages in self.examples.items()},
            "effects": dict(self.effects),
            "total": {"tokens": sum(self.tokens), "targets": sum(self.targets), "media_tokens": self.media_tokens},
            **{name: asdict(Spread.of(values)) for name, values in spreads.items()},
        }


def summed(facts: Iterable[SampleFacts], data: str, decoded: bool, max_skipped: float, max_length: int | None) -> DataReport:
    """The report of some samples, in whatever order they come."""
    faults: dict[str, Counter[FaultKind]] = {"unreadable": Counter(), "left out": Counter()}
    messages: dict[FaultKind, list[tuple[int, str]]] = {}
    effects: Counter[str] = Counter()
    numbers: dict[str, list[int]] = {"tokens": [], "targets": [], "images": [], "pixels": []}
    samples = media_tokens = 0
    for each in facts:
        samples += 1
        effects.update(each.effects)
        if each.fault is not None:
            faults["left out" if each.fault.left_out else "unreadable"][each.fault.kind] += 1
            shown = messages.setdefault(each.fault.kind, [])
            shown.append((each.sample, each.fault.message))
            messages[each.fault.kind] = sorted(shown)[:MOST_EXAMPLES]
            continue
        numbers["tokens"].append(each.tokens)
        numbers["targets"].append(each.targets)
        numbers["images"].append(len(each.sizes))
        numbers["pixels"] += [height * width for height, width in each.sizes]
        media_tokens += each.media_tokens
    examples = {kind: [message for _, message in shown] for kind, shown in messages.items()}
    return DataReport(
        data,
        samples,
        decoded,
        max_skipped,
        max_length,
        **numbers,
        media_tokens=media_tokens,
        faults=faults,
        examples=examples,
        effects=effects,
    )


def render_data(report: DataReport) -> RenderableType:
    """The report, for `rich.console.Console.print`; readable from 80 columns on."""
    trained = len(report.tokens)
    parts: list[RenderableType] = [Text(f"{report.data}: {report.samples:,} samples, {trained:,} to train on", style="bold")]
    how = "pictures decoded" if report.decoded else "of pictures, headers alone were read (--no-decode)"
    parts.append(Text(how, style="dim"))
    for name, kinds in report.faults.items():
        if kinds:
            parts += ["", _faults(report, name, kinds)]
    if report.effects:
        parts += ["", _effects(report)]
    if trained:
        parts += ["", _spreads(report)]
    parts += ["", _verdict(report)]
    return Group(*parts)


def draw_data(report: DataReport, path: Path) -> None:
    """Writes histograms of tokens, targets, pictures a sample and pixels a picture as a picture, in the format `path` ends in."""
    figure = Figure(figsize=(9.2, 5.8), layout="constrained")
    panels = (
        ("tokens per sample", report.tokens),
        ("target tokens per sample", report.targets),
        ("pictures per sample", report.images),
        ("pixels per picture", report.pixels),
    )
    axes: Axes
    for axes, colour, (name, values) in zip(figure.subplots(2, 2).flat, COLOURS, panels, strict=True):
        _histogram(axes, colour, name, values)
    if report.max_length is not None:
        first = figure.axes[0]
        first.axvline(report.max_length, color=INK, linewidth=1, linestyle="--")
        place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "xytext": (-4, 0), "textcoords": "offset points"}
        first.annotate("max_length", (report.max_length, 1), fontsize=8, va="top", ha="right", **place)
    title = f"{report.data}: {len(report.tokens):,} of {report.samples:,} samples"
    figure.suptitle(title, fontsize=12, weight="bold", color=INK, x=0.01, ha="left")
    figure.savefig(path, dpi=150, facecolor="white")


def _faults(report: DataReport, name: str, kinds: Mapping[FaultKind, int]) -> Table:
    style = "red" if name == "unreadable" else "yellow"
    table = _table(name, "samples", "the first of them")
    table.columns[0].style = style
    for kind, count in sorted(kinds.items(), key=lambda pair: -pair[1]):
        table.add_row(kind, f"{count:,}", escape("\n".join(report.examples[kind])))
    return table


def _effects(report: DataReport) -> Table:
    table = _table("limits", "times")
    for effect, count in sorted(report.effects.items()):
        table.add_row(effect, f"{count:,}")
    return table


def _spreads(report: DataReport) -> Table:
    table = _table("per sample", "median", "p90", "max", "all")
    totals = {"tokens": report.tokens, "targets": report.targets, "pictures": report.images}
    for name, values in totals.items():
        spread = Spread.of(values)
        table.add_row(name, *(f"{number:,}" for number in (spread.median, spread.p90, spread.most, sum(values))))
    if report.pixels:
        spread = Spread.of(report.pixels)
        table.add_row("pixels a picture", *(f"{number:,}" for number in (spread.median, spread.p90, spread.most)), "")
    return table


def _verdict(report: DataReport) -> Text:
    if not len(report.tokens):
        return Text("nothing is left to train on", style="bold red")
    share = report.unreadable / report.samples
    if report.passed and share > report.max_skipped:
        few = f"a run goes on: of fewer than {FEWEST} samples, data.max_skipped={report.max_skipped:g} allows as many as of these"
        return Text(f"{share:.1%} unreadable; {few}", style="yellow")
    if report.passed:
        return Text(f"{share:.1%} unreadable, within data.max_skipped={report.max_skipped:g}", style="green")
    return Text(f"{share:.1%} unreadable, more than data.max_skipped={report.max_skipped:g}: a run would stop", style="bold red")


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if not number or heading.startswith("the first") else "right")
    table.columns[-1].overflow = "fold"
    return table


def _histogram(axes: Axes, colour: str, name: str, values: Sequence[int]) -> None:
    axes.set_title(name, fontsize=10, color=INK, loc="left")
    axes.set_ylabel("pictures" if name.startswith("pixels") else "samples", fontsize=8, color=FAINT)
    if len(values):
        least, most = min(values), max(values)
        # Whole numbers: a bar for each while there are few.
        bins = np.arange(least, most + 2) - 0.5 if most - least <= 40 else np.linspace(least, most, 41)
        axes.hist(values, bins=bins.tolist(), color=colour, rwidth=0.92)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    axes.tick_params(labelsize=8, colors=FAINT)
    axes.spines[["top", "right"]].set_visible(False)
