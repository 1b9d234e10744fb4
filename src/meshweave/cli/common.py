"""What do all commands share? Their common arguments, and how an error becomes one message."""

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.control import Control
from rich.logging import RichHandler
from rich.segment import ControlType

from meshweave.config import RunConfig, load_config
from meshweave.errors import MeshweaveError, RankError, StoppedError

if TYPE_CHECKING:
    from meshweave.model.hub import Need

RunFile = Annotated[Path, typer.Argument(metavar="RUN.YAML", help="Run file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the run file, e.g. modules.vision.dp=2; repeatable."),
]


def load_run(run_file: Path, overrides: list[str] | None, need: "Need") -> RunConfig:
    """The run file with overrides, and its model as a local folder, of which there is what `need` says."""
    from meshweave.model.hub import with_local_model

    run = load_config(run_file, overrides or ())
    found = with_local_model(run, "processor" if need == "weights" and run.weights == "seeded" else need)
    if found.model != run.model and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        Console(stderr=True).print(f"model: {run.model} is {found.model}", style="dim", highlight=False, soft_wrap=True)
    return found


def run_command(work: Callable[[], None]) -> None:
    """Runs a command; an error of ours becomes one message and exit code 2, a signal one line and 128 + its number."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False, show_time=False)])
    speaks = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    try:
        work()
    except StoppedError as end:
        if speaks:
            _leave_progress()
            Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(_whole(end))
        raise typer.Exit(128 + end.signal) from None
    except KeyboardInterrupt:
        if speaks:
            typer.echo("stopped by SIGINT", err=True)
        raise typer.Exit(128 + signal.SIGINT) from None
    except MeshweaveError as error:
        # In a launched world every process comes here; what only one of them knows says so.
        if speaks or isinstance(error, RankError):
            _leave_progress()
            Console(stderr=True).print("[bold red]error:[/]", end=" ")
            Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(_whole(error))
        raise typer.Exit(2) from None


def _whole(error: MeshweaveError) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def _leave_progress() -> None:
    """A rank that was killed left its progress on the terminal: half a line, and no cursor."""
    Console().control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2), ControlType.SHOW_CURSOR))
