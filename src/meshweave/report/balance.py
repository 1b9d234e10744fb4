"""How evenly would the data of a run be worked? The report that `meshweave balance` prints."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshweave.errors import FaultKind
from meshweave.report.imbalance import Imbalance, Uneven
from meshweave.report.text import count_text


@dataclass(frozen=True)
class Spread:
    """Of a number that every sample has."""

    median: int
    p90: int
    """Nine samples of ten have at most this."""
    most: int

    @classmethod
    def of(cls, values: Sequence[int]) -> "Spread":
        ordered = sorted(values) or [0]
        median, p90 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.9))
        return cls(median, p90, ordered[-1])


@dataclass(frozen=True)
class Variant:
    """One way of laying out the steps."""

    name: str
    chosen: bool
    """Whether it is the run file's."""
    steps: tuple[Imbalance, ...]
    work: float
    """What the busiest rank works in all steps, waiting included: model FLOPs."""

    @property
    def padding(self) -> float:
        """Share of the positions that hold no token, over all steps."""
        positions = sum(step.positions for step in self.steps)
        return 1 - sum(step.tokens for step in self.steps) / positions if positions else 0.0

    @property
    def fullest(self) -> int:
        """Positions of the fullest slot of all steps."""
        return max(step.fullest for step in self.steps)

    def mean(self, what: Callable[[Imbalance], Uneven]) -> Uneven:
        """The mean of a ratio, and of its bound, over the steps."""
        found = [what(step) for step in self.steps]
        return Uneven(*(sum(values) / len(found) for values in zip(*((u.ratio, u.at_least) for u in found), strict=True)))


@dataclass(frozen=True)
class BalanceReport:
    """What `meshweave balance` has to say."""

    samples: int
    skipped: int
    """Samples that cannot be read, or are longer than the budget."""
    tokens: Spread
    """Per sample."""
    media: Mapping[str, Spread]
    """Encoder → items per sample."""
    items: Mapping[str, int]
    microbatches: int
    lanes: Mapping[str, int]
    """Module → its lanes."""
    passes: Mapping[str, int]
    """Encoder → its passes in a step."""
    max_tokens: int | None
    variants: tuple[Variant, ...]
    """The first is what the others are measured by."""
    faults: Mapping[FaultKind, int] = field(default_factory=dict)
    """Samples that are skipped or left out, by kind."""
    effects: Mapping[str, int] = field(default_factory=dict)
    """What limits of the run file did to the others, how often."""

    @property
    def total_tokens(self) -> int:
        """Over all steps, without padding."""
        return sum(step.tokens for step in self.variants[0].steps)

    def gain(self, variant: Variant) -> float:
        """How many times as fast as the first variant the steps would be."""
        return self.variants[0].work / variant.work if variant.work else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "steps": len(self.variants[0].steps),
            "samples": self.samples,
            "skipped": self.skipped,
            "faults": dict(self.faults),
            "effects": dict(self.effects),
            "tokens": self.total_tokens,
            "items": dict(self.items),
            "tokens_per_sample": asdict(self.tokens),
            "items_per_sample": {name: asdict(spread) for name, spread in self.media.items()},
            "microbatches": self.microbatches,
            "lanes": dict(self.lanes),
            "passes": dict(self.passes),
            "max_tokens": self.max_tokens,
            "variants": [
                {
                    "name": variant.name,
                    "chosen": variant.chosen,
                    "padding": variant.padding,
                    "fullest_slot": variant.fullest,
                    "imbalance": {what: asdict(variant.mean(of)) for what, of in self._ratios().items()},
                    "times_as_fast": self.gain(variant),
                }
                for variant in self.variants
            ],
        }

    def _ratios(self) -> dict[str, Callable[[Imbalance], Uneven]]:
        """What is uneven, by the words of the table."""
        ratios: dict[str, Callable[[Imbalance], Uneven]] = {}
        for name in self.items:
            ratios[f"{name} lanes, per pass"] = lambda step, name=name: step.encoder_lanes[name]  # type: ignore[misc]
            if self.passes[name] > 1:
                ratios[f"{name} passes"] = lambda step, name=name: step.encoder_passes[name]  # type: ignore[misc]
        ratios["language lanes, per microbatch"] = lambda step: step.microbatch_lanes
        if self.microbatches > 1:
            ratios["language lanes, per step"] = lambda step: step.language_lanes
            ratios["language microbatches"] = lambda step: step.microbatches
            ratios["language slots"] = lambda step: step.slots
        return ratios


def render_balance(report: BalanceReport) -> RenderableType:
    """The report, for `rich.console.Console.print`; readable from 80 columns on."""
    parts: list[RenderableType] = [_heading(report), "", _samples(report), "", _variants(report), ""]
    chosen = next((variant for variant in report.variants if variant.chosen), None)
    if chosen is not None and report.max_tokens is not None:
        share = chosen.fullest / report.max_tokens
        parts.append(f"fullest sequence {chosen.fullest:,} of train.max_tokens={report.max_tokens} tokens ({share:.0%})")
    parts.append(Text(_EXPLAINED, style="dim"))
    return Group(*parts)


_EXPLAINED = (
    "◂ as the run file says. In order: samples as they come, equally many a slot, media encoded by the sample's lane. A slot is "
    "a lane's part of a microbatch. Ratios are means over the steps; at best is what undivided samples and items of ◂ allow. "
    "Speed is estimated from model FLOPs of the slowest lanes, without communication."
)


def _heading(report: BalanceReport) -> Text:
    steps = len(report.variants[0].steps)
    items = "".join(f" · {count_text(count)} {name} item{'' if count == 1 else 's'}" for name, count in report.items.items())
    lanes = ", ".join(f"{name} {count}" for name, count in report.lanes.items())
    text = Text.assemble(
        (f"{steps:,} step{'' if steps == 1 else 's'} · {report.samples:,} samples · ", "bold"),
        (f"{count_text(report.total_tokens)} tokens{items}", "bold"),
        f"\n{report.microbatches} microbatch{'' if report.microbatches == 1 else 'es'} a step; lanes: {lanes}",
    )
    if report.skipped:
        kinds = ", ".join(f"{count:,} × {kind}" for kind, count in report.faults.items()) or "unreadable, or too long"
        text.append(f"\n{report.skipped:,} samples left out: {kinds}", style="yellow")
    for effect, count in report.effects.items():
        text.append(f"\n{count:,} × {effect}", style="yellow")
    return text


def _samples(report: BalanceReport) -> Table:
    table = _table("per sample", "median", "p90", "max")
    table.add_row("tokens", *_numbers(report.tokens))
    for name, spread in report.media.items():
        table.add_row(f"{name} items", *_numbers(spread))
    return table


def _variants(report: BalanceReport) -> Table:
    table = _table("", *(variant.name.replace(", ", ",\n") for variant in report.variants), "at best")
    table.columns[0].no_wrap = True
    for column, variant in zip(table.columns[1:], report.variants, strict=False):
        if variant.chosen:
            column.header, column.style = f"{column.header} ◂", "bold"
    table.columns[-1].style = table.columns[-1].header_style = "dim"
    bounded = next((variant for variant in report.variants if variant.chosen), report.variants[-1])
    table.add_row("padding", *(f"{variant.padding:.1%}" for variant in report.variants))
    table.add_row("largest slot, tokens", *(count_text(variant.fullest) for variant in report.variants))
    table.add_section()
    table.add_row(Text("heaviest ÷ mean", style="dim"))
    for what, of in report._ratios().items():
        best = bounded.mean(of).at_least
        table.add_row(what, *(_ratio(variant.mean(of), best) for variant in report.variants), f"{best:.2f}")
    table.add_section()
    table.add_row("step speed", *(f"{report.gain(variant):.2f} ×" for variant in report.variants))
    return table


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    return table


def _numbers(spread: Spread) -> list[str]:
    return [f"{number:,}" for number in (spread.median, spread.p90, spread.most)]


def _ratio(uneven: Uneven, best: float) -> Text:
    style = "green" if uneven.ratio <= 1.05 * best else "yellow" if uneven.ratio < 1.5 * best else "red"
    return Text(f"{uneven.ratio:.2f}", style=style)
