"""`meshweave train`: how is a run trained?"""

import os
import shlex
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from meshweave.cli.common import Overrides, RunFile, load_run, run_command

NEWEST = "newest"
"""What `--resume` means without a folder."""


class TrainCommand(TyperCommand):
    """Lets `--resume` stand alone: typer knows no options with an optional value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Fills in what is left out."""
        filled = []
        for number, word in enumerate(args):
            filled.append(word)
            after = args[number + 1 : number + 2]
            if word == "--resume" and (not after or after[0].startswith("-") or Path(after[0]).suffix in (".yaml", ".yml")):
                filled.append(NEWEST)
        return super().parse_args(ctx, filled)


def train_command(
    run_file: RunFile,
    overrides: Overrides = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Clock one step on all ranks: timeline as PNG and for Perfetto.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over the run that `output` holds.")] = False,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume", metavar="[DIR]", help="Go on from the newest checkpoint in `output`, or from the one that is named."
        ),
    ] = None,
    allow_changed: Annotated[
        list[str] | None,
        typer.Option("--allow-changed", metavar="KEY", help="Go on although this key of the run file has changed, e.g. data."),
    ] = None,
) -> None:
    """Train. Starts one local process per rank; under torchrun or Slurm it joins the world that is there."""
    from meshweave.checkpoint.manifest import newest_whole
    from meshweave.cli.ahead import plan_ahead
    from meshweave.data.build import build_datasets
    from meshweave.errors import RankError, StoppedError
    from meshweave.model.blueprint import read_model_config
    from meshweave.model.check import check_executable, check_model
    from meshweave.report.summary import render_summary
    from meshweave.train.output import Start, check_output
    from meshweave.train.trainer import train
    from meshweave.world import launch

    def work() -> None:
        run = load_run(run_file, overrides, "weights")
        start = Start(
            overwrite,
            resume=resume == NEWEST,
            checkpoint=Path(resume) if resume not in (None, NEWEST) else None,
            allow_changed=tuple(allow_changed or ()),
        )
        config = read_model_config(run.model)
        check_model(run, config)
        check_executable(run, config)
        if "RANK" not in os.environ:
            check_output(run, start)
        # What is wrong with the data, or with the schedule, shall show before processes start.
        training, _ = build_datasets(run, config)
        plan_ahead(run, config, training)
        try:
            summary = launch(run, partial(train, config=config, trace=trace, start=start))
        except (RankError, StoppedError) as error:
            newest, _ = newest_whole(run.output)
            if newest is not None:
                changes = [word for override in overrides or () for word in ("--set", override)]
                words = shlex.join(["meshweave", "train", str(run_file), *changes, "--resume"])
                error.add_note(f"`{words}` goes on from {newest}")
            raise
        if summary is not None:
            Console().print(render_summary(summary))

    run_command(work)
