"""`meshweave simulate`: how would a step go?"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from meshweave.cli.common import Overrides, RunFile, load_run, run_command


def simulate_command(
    run_file: RunFile,
    overrides: Overrides = None,
    tflops: Annotated[
        float | None,
        typer.Option(min=1e-6, help="TFLOP/s that a rank achieves; left out: 400 with GPUs here, else 0.05 (a core)."),
    ] = None,
    gbps: Annotated[
        float | None, typer.Option(min=1e-6, help="GB/s between two ranks; left out: 40 with GPUs here, else 1.")
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(metavar="MEASURED.JSON", help="Take durations from this trace of `train --trace`; draw it beside."),
    ] = None,
) -> None:
    """Clock a step's schedule without running it: step time, bubbles, activations; timeline as PNG and for Perfetto."""
    from meshweave.preview.simulate import simulate_run
    from meshweave.step.schedules import usual_speed

    def work() -> None:
        speed = usual_speed()
        speed = replace(speed, flops_per_second=tflops * 1e12) if tflops else speed
        speed = replace(speed, bytes_per_second=gbps * 1e9) if gbps else speed
        simulate_run(load_run(run_file, overrides, "config"), Console(), speed, measured)

    run_command(work)
