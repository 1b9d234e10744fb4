"""The command line: train, inspect, simulate, balance, verify."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.logging import RichHandler

from meshweave.config import RunConfig, load_config
from meshweave.errors import MeshweaveError, RankError
from meshweave.layout import placements

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from meshweave.data.dataset import Dataset

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Train one multimodal model whose modules each have their own parallel layout and their own ranks.",
)

RunFile = Annotated[Path, typer.Argument(metavar="RUN.YAML", help="Run file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the run file, e.g. modules.vision.dp=2; repeatable."),
]


@app.command("train")
def train_command(
    run_file: RunFile,
    overrides: Overrides = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Clock one step on all ranks: timeline as PNG and for Perfetto.")
    ] = False,
) -> None:
    """Train. Starts one local process per rank; under torchrun or Slurm it joins the world that is there."""
    from meshweave.model.blueprint import read_model_config
    from meshweave.model.check import check_executable, check_model
    from meshweave.report.summary import render_summary
    from meshweave.train.data import build_datasets
    from meshweave.train.trainer import train
    from meshweave.train.world import launch

    def work() -> None:
        run = load_config(run_file, overrides or ())
        config = read_model_config(run.model)
        check_model(run, config)
        check_executable(run, config)
        # What is wrong with the data, or with the schedule, shall show before processes start.
        training, _ = build_datasets(run, config)
        _plan(run, config, training)
        summary = launch(run, partial(train, config=config, trace=trace))
        if summary is not None:
            Console().print(render_summary(summary))

    _run(work)


@app.command("inspect")
def inspect_command(run_file: RunFile, overrides: Overrides = None) -> None:
    """Print which rank holds which part of which module, lanes, groups, boundary bytes, parameters. Starts no process."""
    from meshweave.train.inspect import inspect_run

    def work() -> None:
        inspect_run(load_config(run_file, overrides or ()), Console())

    _run(work)


@app.command("simulate")
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
    from meshweave.train.schedules import usual_speed
    from meshweave.train.simulate import simulate_run

    def work() -> None:
        speed = usual_speed()
        speed = replace(speed, flops_per_second=tflops * 1e12) if tflops else speed
        speed = replace(speed, bytes_per_second=gbps * 1e9) if gbps else speed
        simulate_run(load_config(run_file, overrides or ()), Console(), speed, measured)

    _run(work)


@app.command("balance")
def balance_command(
    run_file: RunFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to plan.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Plan some steps from the data's metadata: padding, imbalance of lanes and microbatches, and what balancing gains."""
    from meshweave.report.balance import render_balance
    from meshweave.train.balance import balance_run

    def work() -> None:
        report = balance_run(load_config(run_file, overrides or ()), steps)
        if as_json:
            typer.echo(json.dumps(report.as_dict(), indent=2))
        else:
            Console().print(render_balance(report))

    _run(work)


@app.command("verify")
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
    from meshweave.model.blueprint import read_model_config
    from meshweave.model.check import check_executable, check_model
    from meshweave.model.shrink import shrink_run
    from meshweave.report.verification import render_verification
    from meshweave.train.data import dataset_of
    from meshweave.train.verify import verify
    from meshweave.train.world import launch

    def work() -> None:
        run = load_config(run_file, [*(overrides or ()), f"dtype={dtype}"])
        config = read_model_config(run.model)
        check_model(run, config)
        if shrunk:
            run, config = shrink_run(run, config)
            run = run.model_copy(update={"weights": "seeded", "data": None})
        check_executable(run, config)
        _plan(run, config, dataset_of(run, config))
        report = launch(run, partial(verify, config=config, steps=steps))
        if report is None:
            return
        if as_json:
            typer.echo(json.dumps(report.as_dict(), indent=2))
        else:
            Console().print(render_verification(report.as_dict()))
        if not report.passed:
            raise typer.Exit(1)

    _run(work)


def _plan(run: RunConfig, config: "PreTrainedConfig", dataset: "Dataset") -> None:
    """Plans the run's schedule, and its first step where that has to fit a budget, for what is wrong with them; in a world that a
    launcher made, its ranks do, later."""
    from meshweave.config import LANGUAGE
    from meshweave.model.blueprint import STORED, blueprint_of
    from meshweave.model.flops import count_flops
    from meshweave.model.modules import graph_of
    from meshweave.train.data import build_planner
    from meshweave.train.schedules import run_schedule

    if "RANK" not in os.environ:
        where = placements(run)
        schedule = run_schedule(run, config, where, dataset)
        if run.train.max_tokens is not None:
            flops = count_flops(graph_of(blueprint_of(config, STORED[run.dtype])), LANGUAGE)
            build_planner(run, dataset, where, schedule, flops).plan(0)


def _run(work: Callable[[], None]) -> None:
    """Runs a command; an error of ours becomes one message and exit code 2."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False, show_time=False)])
    try:
        work()
    except MeshweaveError as error:
        # In a launched world every process comes here; what only one of them knows says so.
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0" or isinstance(error, RankError):
            Console(stderr=True).print("[bold red]error:[/]", end=" ")
            Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(str(error))
        raise typer.Exit(2) from None
