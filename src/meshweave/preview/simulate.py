"""How would a step of this run go? Clocks its schedule without starting a process."""

from pathlib import Path

from rich.console import Console

from meshweave.config import RunConfig
from meshweave.data.build import data_or_random
from meshweave.layout import placements
from meshweave.model.blueprint import read_model_config
from meshweave.model.check import check_model
from meshweave.report.chrome_trace import read_chrome_trace, write_chrome_trace
from meshweave.report.simulation import render_simulation
from meshweave.report.text import time_text
from meshweave.report.timeline import draw_timelines
from meshweave.schedule.check import activation_peaks
from meshweave.schedule.measured import durations_of
from meshweave.schedule.plan import plan_schedule
from meshweave.schedule.simulate import Timeline, simulate
from meshweave.step.schedules import Speed, model_durations, typical_step


def simulate_run(run: RunConfig, console: Console, speed: Speed, measured: Path | None = None) -> None:
    """Prints step time, bubbles and activations, and writes `timeline.png` and `timeline.json` in the run folder.

    Args:
        speed: what a rank achieves; durations are model FLOPs and bytes over it.
        measured: a trace of `train --trace` of the same run file: durations are its medians, and it is drawn beside.

    Raises:
        ConfigError, CheckpointError, DataError, LayoutError, ScheduleError: whatever would also keep the run from starting.
    """
    config = read_model_config(run.model)
    check_model(run, config)
    where = placements(run)
    data, missing = data_or_random(run, config)
    modelled = model_durations(run, config, where, typical_step(run, data), speed)
    schedule = plan_schedule(run, where, modelled)
    durations = modelled(schedule.work)
    panels: dict[str, Timeline] = {}
    if measured is not None:
        panels["measured"] = read_chrome_trace(measured)
        durations = durations_of(panels["measured"], schedule)
    timeline = panels["simulated"] = simulate(schedule, durations)
    console.print(render_simulation(schedule, timeline, activation_peaks(schedule)))
    if measured is not None:
        took = panels["measured"].seconds
        console.print(
            f"measured step {time_text(took)}; simulated from its medians {time_text(timeline.seconds)} "
            f"({timeline.seconds / took - 1:+.1%})",
            highlight=False,
        )
    else:
        console.print(
            f"durations: model FLOPs at {speed.flops_per_second / 1e12:g} TFLOP/s and messages at "
            f"{speed.bytes_per_second / 1e9:g} GB/s a rank (--tflops, --gbps); --measured takes them from a traced step",
            style="dim",
            highlight=False,
        )
    run.output.mkdir(parents=True, exist_ok=True)
    picture, trace = run.output / "timeline.png", run.output / "timeline.json"
    draw_timelines(panels, picture)
    write_chrome_trace(timeline, trace)
    console.print(f"picture: {picture}\ntrace:   {trace} (ui.perfetto.dev)", highlight=False, soft_wrap=True)
    if missing is not None:
        console.print(missing, style="yellow", highlight=False, markup=False)
