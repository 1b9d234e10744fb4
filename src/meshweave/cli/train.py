"""`meshweave train`: how is a run trained?"""

import os
from functools import partial
from typing import Annotated

import typer
from rich.console import Console

from meshweave.cli.common import Overrides, RunFile, load_run, run_command


def train_command(
    run_file: RunFile,
    overrides: Overrides = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Clock one step on all ranks: timeline as PNG and for Perfetto.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over the run that `output` holds.")] = False,
) -> None:
    """Train. Starts one local process per rank; under torchrun or Slurm it joins the world that is there."""
    from meshweave.cli.ahead import plan_ahead
    from meshweave.data.build import build_datasets
    from meshweave.model.blueprint import read_model_config
    from meshweave.model.check import check_executable, check_model
    from meshweave.report.summary import render_summary
    from meshweave.train.output import check_output
    from meshweave.train.trainer import train
    from meshweave.world import launch

    def work() -> None:
        run = load_run(run_file, overrides, "weights")
        config = read_model_config(run.model)
        check_model(run, config)
        check_executable(run, config)
        if "RANK" not in os.environ:
            check_output(run, overwrite)
        # What is wrong with the data, or with the schedule, shall show before processes start.
        training, _ = build_datasets(run, config)
        plan_ahead(run, config, training)
        summary = launch(run, partial(train, config=config, trace=trace, overwrite=overwrite))
        if summary is not None:
            Console().print(render_summary(summary))

    run_command(work)
