"""`meshweave data`: what is in the data of a run?"""

import json
import os
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from meshweave.cli.common import Overrides, RunFile, load_run, run_command

data_app = typer.Typer(no_args_is_help=True, help="Look at the data of a run before it is trained on.")


@data_app.command("check")
def check_command(
    run_file: RunFile,
    overrides: Overrides = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Check the first so many samples; left out, all.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; left out, one a core.")] = None,
    decode: Annotated[
        bool, typer.Option("--decode/--no-decode", help="Decode every picture, too, or read headers alone.")
    ] = True,
    show: Annotated[int, typer.Option(min=0, help="Print so many samples as the model sees them, targets marked.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Go through all data of a run: faults by kind, tokens, targets, pictures, what limits leave out; histograms as PNG. Exit
    code 1 where a run would stop."""
    from meshweave.data.build import data_to_check
    from meshweave.model.blueprint import read_model_config
    from meshweave.preview.check_data import check_samples
    from meshweave.preview.show_data import first_readable
    from meshweave.report.data import draw_data, render_data, summed
    from meshweave.report.sample import render_sample

    def work() -> None:
        run = load_run(run_file, overrides, "processor")
        dataset, name = data_to_check(run, read_model_config(run.model))
        count = min(len(dataset), samples or len(dataset))
        console = Console()
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("reading", total=count)
            found = check_samples(
                dataset, count, workers or len(os.sched_getaffinity(0)), decode, lambda n: progress.advance(task, n)
            )
            assert run.data is not None
            report = summed(found, name, decode, run.data.max_skipped, run.data.max_length)
        picture = run.output / "data.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw_data(report, picture)
        if as_json:
            typer.echo(json.dumps(report.as_dict(), indent=2))
        else:
            for index, pieces in first_readable(dataset, show, count):
                console.print(render_sample(f"sample {index}", pieces, console.color_system is not None))
            console.print(render_data(report))
            console.print(f"picture: {picture}", highlight=False)
        if not report.passed:
            raise typer.Exit(1)

    run_command(work)
