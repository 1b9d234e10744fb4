"""`meshweave verify`: is it the same model?"""

import json
from functools import partial
from typing import Annotated, Literal

import typer
from rich.console import Console

from meshweave.cli.common import Overrides, RunFile, load_run, run_command


def verify_command(
    run_file: RunFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to compare.")] = 5,
    dtype: Annotated[Literal["float64", "float32"], typer.Option(help="Tolerance 1e-9 and 1e-4.")] = "float64",
    shrunk: Annotated[
        bool, typer.Option("--shrink", help="Verify a tiny model of the same architecture and head counts, on random samples.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train a few steps in the run's layouts and in the plain Hugging Face model; exit 1 if they differ past the tolerance."""
    from meshweave.cli.ahead import plan_ahead
    from meshweave.data.build import dataset_of
    from meshweave.model.blueprint import read_model_config
    from meshweave.model.check import check_executable, check_model
    from meshweave.model.shrink import shrink_run
    from meshweave.report.verification import render_verification
    from meshweave.verification.compare import verify
    from meshweave.world import launch

    def work() -> None:
        run = load_run(run_file, [*(overrides or ()), f"dtype={dtype}"], "config" if shrunk else "weights")
        config = read_model_config(run.model)
        check_model(run, config)
        if shrunk:
            run, config = shrink_run(run, config)
            run = run.model_copy(update={"weights": "seeded", "data": None})
        check_executable(run, config)
        plan_ahead(run, config, dataset_of(run, config))
        report = launch(run, partial(verify, config=config, steps=steps))
        if report is None:
            return
        if as_json:
            typer.echo(json.dumps(report.as_dict(), indent=2))
        else:
            Console().print(render_verification(report.as_dict()))
        if not report.passed:
            raise typer.Exit(1)

    run_command(work)
