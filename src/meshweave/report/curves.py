"""How did a run go? A picture of loss, learning rates and speed over its steps."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
COLOURS = ("#4e79a7", "#e07b26", "#59a14f", "#9d6b98")
INK, FAINT = "#222222", "#777777"
LOG_FROM = 20.0
"""Largest over smallest loss from which the loss is drawn on a logarithmic axis."""
SMOOTH_FROM = 60
"""Number of records from which a moving mean is drawn over the single values."""


def draw_loss_curve(records: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Writes the curves of a run as a picture, in the format that `path` ends in (PNG, SVG, PDF).

    Args:
        records: one mapping a logged step, as in the metrics file: `step`, `loss`, `lr` (module to learning
            rate) and `tokens_per_second`; a value that is not finite leaves a gap. May be empty.
    """
    figure = Figure(figsize=(8.6, 5.4), layout="constrained")
    loss, lr, speed = figure.subplot_mosaic([["loss", "loss"], ["lr", "speed"]], height_ratios=[2.2, 1]).values()
    steps = [record["step"] for record in records]
    _draw_loss(loss, steps, [_finite(record["loss"]) for record in records])
    marker = "o" if len(records) == 1 else None
    for colour, (names, rates) in zip(COLOURS, _learning_rates(records).items(), strict=False):
        lr.plot(steps, rates, color=colour, linewidth=1.6, marker=marker, label=", ".join(names))
    if lr.lines:
        lr.legend(frameon=False, fontsize=8, labelcolor=INK)
    # The first step also pays for start-up; it would squeeze the others into a corner.
    later = [record for record in records if record["step"] > 1] or records
    tokens = [_finite(record["tokens_per_second"]) for record in later]
    speed.plot([record["step"] for record in later], tokens, color=COLOURS[2], linewidth=1.2, marker=marker)
    speed.yaxis.set_major_formatter(EngFormatter(sep=" "))
    speed.set_ylim(bottom=0)
    lr.yaxis.set_major_formatter(PLAIN)
    for axes, name in ((loss, "loss per target token"), (lr, "learning rate"), (speed, "tokens per second")):
        _tidy(axes, name, steps)
    if title:
        figure.suptitle(title, fontsize=12, weight="bold", color=INK, x=0.01, ha="left")
    figure.savefig(path, dpi=150, facecolor="white")


def _draw_loss(axes: Axes, steps: Sequence[int], losses: Sequence[float]) -> None:
    smooth = len(losses) >= SMOOTH_FROM
    single: dict[str, Any] = {"linewidth": 1.0, "alpha": 0.35} if smooth else {"linewidth": 1.8}
    axes.plot(steps, losses, color=COLOURS[0], marker="o" if len(losses) == 1 else None, **single)
    if smooth:
        axes.plot(steps, _moving_mean(losses), color=COLOURS[0], linewidth=1.8)
    known = [(step, loss) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
    if not known:
        return
    least, most = min(loss for _, loss in known), max(loss for _, loss in known)
    if least > 0 and most / least >= LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PLAIN)
    offset: dict[str, Any] = {
        "xytext": (6, 0),
        "textcoords": "offset points",
        "va": "center",
        "annotation_clip": False,
    }
    axes.annotate(f"{known[-1][1]:.3g}", known[-1], fontsize=9, color=INK, **offset)


def _moving_mean(values: Sequence[float]) -> list[float]:
    """Mean over a window around each value; values that are not finite do not count."""
    half = max(1, len(values) // 60)
    means = []
    for index in range(len(values)):
        window = [value for value in values[max(0, index - half) : index + half + 1] if math.isfinite(value)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def _learning_rates(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], list[float]]:
    """Names of the modules that share their learning rates to those rates, step by step."""
    shared: dict[tuple[float, ...], list[str]] = {}
    for name in records[0]["lr"] if records else ():
        shared.setdefault(tuple(record["lr"][name] for record in records), []).append(name)
    return {tuple(names): list(rates) for rates, names in shared.items()}


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan


def _tidy(axes: Axes, name: str, steps: Sequence[int]) -> None:
    axes.set_title(name, fontsize=10, color=INK, loc="left")
    axes.set_xlabel("step", fontsize=9, color=FAINT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if steps:
        room = 0.015 * (steps[-1] - steps[0]) or 0.5
        axes.set_xlim(steps[0] - room, steps[-1] + room)
    axes.tick_params(labelsize=8, colors=FAINT)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
