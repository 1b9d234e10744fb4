"""How much of the language model's bubbles can encoders use? Nested passes against three phases, both against the lower bound.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/nested.py

Simulates a colocated encoder, a lane on every rank, and 1F1B with equal stages (forward 1, backward 2, no links): M microbatches,
PP stages. "cost" is an encoder pass, shared evenly, relative to a stage of the language model; "plain bound" the critical path or
the mean work, whichever is longer; "bound" what `lower_bound` proves; "held" the most microbatches whose encoder activations one
rank holds. Three phases take all microbatches as one macro-batch. Nothing is measured on a device.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from meshweave.config import LANGUAGE
from meshweave.layout import Layout, Placement
from meshweave.report.timeline import draw_timelines
from meshweave.schedule.actions import Kind
from meshweave.schedule.bound import lower_bound
from meshweave.schedule.check import check
from meshweave.schedule.durations import Durations
from meshweave.schedule.generators.nested import nested
from meshweave.schedule.generators.three_phase import three_phase
from meshweave.schedule.lower import lower
from meshweave.schedule.schedule import Schedule
from meshweave.schedule.simulate import simulate
from meshweave.schedule.work import ModuleWork, StepWork, plan_work

COSTS = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
PIPELINES = (2, 4, 8)
ROUNDS = (1, 2, 4, 8)
"""Microbatches, in multiples of the stages."""
FORWARD, BACKWARD = 1.0, 2.0
"""Seconds of a stage of the language model for a microbatch."""


@dataclass(frozen=True)
class Result:
    """One row: simulated seconds, and microbatches whose encoder activations a rank holds."""

    plain_bound: float
    bound: float
    three_phase: float
    three_phase_held: int
    nested: float
    nested_held: int
    search_seconds: float


def bench_work(pipeline: int, microbatches: int) -> StepWork:
    """As many ranks as stages."""
    ranks = tuple(range(pipeline))
    placements = {"vision": Placement(Layout(dp=pipeline), ranks), LANGUAGE: Placement(Layout(pp=pipeline), ranks)}
    return plan_work(placements, {"vision": ModuleWork("vision"), LANGUAGE: ModuleWork(LANGUAGE, pipeline)}, microbatches)


def bench_durations(pipeline: int, cost: float) -> Durations:
    """Equal stages, and an encoder of this cost."""
    table = {(kind, "vision", 0): cost * seconds for kind, seconds in ((Kind.FORWARD, FORWARD), (Kind.BACKWARD, BACKWARD))}
    for stage in range(pipeline):
        table |= {(Kind.FORWARD, LANGUAGE, stage): FORWARD, (Kind.BACKWARD, LANGUAGE, stage): BACKWARD}
    return Durations(table)


def clocked(schedule: Schedule, durations: Durations) -> tuple[float, int]:
    """Seconds of a schedule that has passed the checker, and the most microbatches that a rank holds of the encoder."""
    held = max(peaks["vision"] for peaks in check(schedule))
    return simulate(schedule, durations).seconds, held


def measure(pipeline: int, microbatches: int, cost: float) -> Result:
    """Both schedules of one case."""
    work, durations = bench_work(pipeline, microbatches), bench_durations(pipeline, cost)
    phases = lower(work, [[order] for order in three_phase(work, pipeline, microbatches)], durations)
    started = time.perf_counter()
    queues, shares = nested(work, pipeline, durations)
    search_seconds = time.perf_counter() - started
    both = FORWARD + BACKWARD
    path, total = (microbatches + pipeline - 1 + cost) * both, microbatches * (1 + cost) * both
    return Result(
        max(path, total),
        lower_bound(work, pipeline, durations),
        *clocked(phases, durations),
        *clocked(lower(work, queues, durations, shares), durations),
        search_seconds,
    )


def draw(path: Path) -> None:
    """Both timelines of one case: 4 stages, 8 microbatches, an encoder pass half as long as a stage."""
    work, durations = bench_work(4, 8), bench_durations(4, 0.5)
    queues, shares = nested(work, 4, durations)
    draw_timelines(
        {
            "three_phase": simulate(lower(work, [[order] for order in three_phase(work, 4, 8)], durations), durations),
            "nested": simulate(lower(work, queues, durations, shares), durations),
        },
        path,
    )


def main(
    most: Annotated[int, typer.Option(help="Most microbatches of a case.")] = 64,
    picture: Annotated[Path | None, typer.Option(help="Only draw one case's timelines here (docs/timeline.png).")] = None,
) -> None:
    """Measures the sweep and prints it."""
    if picture is not None:
        draw(picture)
        return
    table = Table(
        "PP",
        "M",
        "cost",
        "bound/\nplain bound",
        "three phases\n/ bound",
        "held",
        "nested\n/ bound",
        "nested\n/ plain",
        "held",
        "speed-up",
        "search",
    )
    for column in table.columns:
        column.justify = "right"
    results = []
    for pipeline in PIPELINES:
        for microbatches in (pipeline * rounds for rounds in ROUNDS if pipeline * rounds <= most):
            for cost in COSTS:
                its = measure(pipeline, microbatches, cost)
                results.append(its)
                table.add_row(
                    str(pipeline),
                    str(microbatches),
                    f"{cost:g}",
                    f"{its.bound / its.plain_bound:.3f}",
                    f"{its.three_phase / its.bound:.3f}",
                    str(its.three_phase_held),
                    f"{its.nested / its.bound:.3f}",
                    f"{its.nested / its.plain_bound:.3f}",
                    str(its.nested_held),
                    f"{its.three_phase / its.nested:.2f}×",
                    f"{its.search_seconds:.1f} s",
                )
            table.add_section()
    console = Console()
    console.print(table)
    near = sum(its.nested <= 1.05 * its.bound for its in results)
    plain = sum(its.nested <= 1.05 * its.plain_bound for its in results)
    worst = max(its.nested / its.bound for its in results)
    best = max(its.three_phase / its.nested for its in results)
    console.print(f"nested: within 5 % of the bound in {near} of {len(results)} cases (of the plain bound: {plain})")
    console.print(f"nested: at worst {worst - 1:.1%} over the bound")
    console.print(f"speed-up over three phases: up to {best:.2f}×")


if __name__ == "__main__":
    typer.run(main)
