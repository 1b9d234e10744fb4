"""`meshweave balance`: how evenly would the data be worked?"""

import json
from typing import Annotated

import typer
from rich.console import Console

from meshweave.cli.common import Overrides, RunFile, load_run, run_command


def balance_command(
    run_file: RunFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to plan.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Plan some steps from the data's metadata: padding, imbalance of lanes and microbatches, and what balancing gains."""
    from meshweave.preview.balance import balance_run
    from meshweave.report.balance import render_balance

    def work() -> None:
        report = balance_run(load_run(run_file, overrides, "processor"), steps)
        if as_json:
            typer.echo(json.dumps(report.as_dict(), indent=2))
        else:
            Console().print(render_balance(report))

    run_command(work)
