"""What would this run look like? Prints its layout map; starts no process."""

from rich.console import Console

from meshweave.config import RunConfig
from meshweave.data.build import data_or_random
from meshweave.layout import placements
from meshweave.model.blueprint import STORED, TRAVELS_AS, blueprint_of, read_model_config
from meshweave.model.check import check_model
from meshweave.model.footprint import footprints
from meshweave.model.modules import graph_of, media_widths
from meshweave.model.slicing import sequence_rule
from meshweave.model.stages import stage_cuts
from meshweave.report.layout_map import render_layout_map, title
from meshweave.report.layout_picture import draw_layout_map
from meshweave.report.traffic import boundary_traffic
from meshweave.schedule.plan import encoder_schedule, plan_schedule
from meshweave.schedule.simulate import simulate
from meshweave.step.schedules import model_durations, typical_step


def inspect_run(run: RunConfig, console: Console) -> None:
    """Prints the layout map of a run and draws it as `layout.png` in its run folder.

    The boundary's bytes are those of the first samples of the run's data, or of random samples where that is not here.

    Raises:
        ConfigError, CheckpointError, DataError, LayoutError, ScheduleError: whatever would also keep the run from starting.
    """
    config = read_model_config(run.model)
    check_model(run, config)
    where = placements(run)
    graph = graph_of(blueprint_of(config, STORED[run.dtype]))
    kinds = {name: module.data_parallel for name, module in run.modules.items()}
    data, missing = data_or_random(run, config)
    typical = typical_step(run, data)
    durations = model_durations(run, config, where, typical)
    schedule = plan_schedule(run, where, durations)
    gathered = {name for name in where if not schedule.streams(name)}
    held = footprints(graph, where, kinds, stage_cuts(run, graph), gathered)
    token_bytes = {name: sum(widths) * TRAVELS_AS[run.dtype].itemsize for name, widths in media_widths(config).items()}
    traffic = boundary_traffic(typical, where, token_bytes, sequence_rule(run, config), run.node_size)
    console.print(render_layout_map(run, where, held, traffic))
    timeline = simulate(schedule, durations(schedule.work))
    console.print(
        f"\nSchedule: {encoder_schedule(run, where)}, language model {run.schedule.language}: no deadlock; simulated bubble "
        f"{timeline.bubble:.0%} (meshweave simulate shows more)",
        highlight=False,
        soft_wrap=True,
    )
    picture = run.output / "layout.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_layout_map(where, run.world_size, picture, title(run, where))
    console.print(f"picture: {picture}", highlight=False)
    if missing is not None:
        console.print(missing, style="yellow", highlight=False, markup=False)
