"""Which pipeline is fastest, and does the simulator know? Schedules and placements measured and simulated, side by side.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/pipelines.py

Pipelines of 2 ranks, then of 4, over a LLaVA-shaped model (CLIP tower, Qwen3 language model) with random weights, and random
samples that are all alike. "step" runs from a barrier to the end of the last computation on any rank; "simulated" clocks the same
schedule with the medians of that step's own computations, and with messages as a ping-pong between two processes finds them;
"full step" adds gradient norms and the optimizer, and is what tokens/s counts. These are the fastest step's, the one least
disturbed by whatever else the machine does; "median" and "errors" are of all counted steps, over rounds in which every case has
its turn. Where there are more ranks than cores, ranks wait for cores, which no schedule shows: 4 ranks need 4 free cores.
"held" are the most microbatches whose encoder activations a rank keeps (of its stage, where the encoder is a pipeline itself).
"""

import os
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Annotated, Any

import torch
import torch.distributed as dist
import transformers
import typer
from rich.console import Console
from rich.table import Table
from step_time import bench_config
from stepping import build_training
from transformers import PreTrainedConfig

from meshweave.config import LANGUAGE, RunConfig, parse_config
from meshweave.data.synthetic import SyntheticDataset
from meshweave.data.synthetic_media import Item
from meshweave.layout import placements
from meshweave.schedule.actions import COMPUTE, Kind
from meshweave.schedule.check import activation_peaks
from meshweave.schedule.durations import Durations, Key
from meshweave.schedule.measured import durations_of
from meshweave.schedule.schedule import Schedule
from meshweave.schedule.simulate import Timeline, simulate
from meshweave.schedule.work import StepWork
from meshweave.step.schedules import Speed, model_durations, run_schedule, typical_step
from meshweave.step.trace import measured_timeline, start_clock
from meshweave.train.trainer import step_tokens
from meshweave.world import World, launch

WARM_UP = 2
"""Steps of a round that do not count."""

PINGS = 30
SMALL, LARGE = 64, 1 << 20
"""Bytes of the two messages from whose times latency and bandwidth follow."""


Modules = Mapping[str, Mapping[str, Any]]
"""As a run file has them."""


@dataclass(frozen=True)
class Case:
    """One row: modules with their layouts, and the schedule asked for."""

    label: str
    modules: Modules
    schedule: Mapping[str, Any]
    pipeline: bool = True
    """Whether the language model is one; otherwise its microbatches only have to fit its lanes."""


def cases(ranks: int) -> list[Case]:
    """What is compared on so many ranks."""
    everyone = f"0-{ranks - 1}"
    apart: Modules = {"vision": {"ranks": 0}, LANGUAGE: {"ranks": f"1-{ranks - 1}", "pp": ranks - 1}}
    colocated: Modules = {"vision": {"ranks": everyone, "dp": ranks}, LANGUAGE: {"ranks": everyone, "pp": ranks}}
    both_pp, both_dp = ({module: {"ranks": everyone, axis: ranks} for module in colocated} for axis in ("pp", "dp"))
    sizes = f"vision dp{ranks}, language pp{ranks}"
    return [
        Case(f"three phases: {sizes}", colocated, {"encoders": "three_phase"}),
        Case("  the same, macro-batch 1", colocated, {"encoders": "three_phase", "macro_batch": 1}),
        Case(f"nested: {sizes}", colocated, {"encoders": "nested"}),
        Case(f"non-colocated: vision 1 rank, language pp{ranks - 1}", apart, {"encoders": "graph_1f1b"}),
        Case(f"homogeneous pp{ranks}", both_pp, {"encoders": "three_phase"}),
        Case(f"homogeneous dp{ranks}", both_dp, {"encoders": "three_phase"}, pipeline=False),
    ]


class AlikeDataset(SyntheticDataset):
    """Random samples of equal shape, so that a median says what every microbatch takes."""

    def _draw(self, index: int) -> tuple[list[int], list[Item]]:
        return super()._draw(4 * index + 3)  # of every four, the last has most images


@dataclass(frozen=True)
class Step:
    """One measured step."""

    timeline: Timeline
    full_seconds: float
    tokens: int


def time_case(world: World, run: RunConfig, config: PreTrainedConfig, dataset: AlikeDataset) -> list[Step]:
    """Every counted step of a case, in which the step's data is there before it begins."""
    training = build_training(world, run, config, dataset)
    steps = []
    for local in training.loader.steps(0, run.train.steps, prefetch=False):
        clock = start_clock(world)
        training.take(local, clock.spans)
        full_seconds = time.perf_counter() - clock.began
        steps.append(Step(measured_timeline(world, clock), full_seconds, step_tokens(local.plan)))
    return steps[WARM_UP:]


def ping_pong(world: World, run: RunConfig) -> tuple[float, float]:
    """Seconds that any message takes between ranks 0 and 1, and bytes per second."""
    seconds = []
    for size in (SMALL, LARGE):
        buffer = torch.zeros(size, dtype=torch.uint8)
        trips = []
        for _ in range(PINGS):
            dist.barrier()
            started = time.perf_counter()
            for sender in (0, 1):
                dist.send(buffer, 1 - sender) if world.rank == sender else dist.recv(buffer, sender)
            trips.append((time.perf_counter() - started) / 2)
        seconds.append(median(trips))
    return seconds[0], (LARGE - SMALL) / (seconds[1] - seconds[0])


@dataclass
class Results:
    """State: what the rounds have shown of one case so far."""

    case: Case
    run: RunConfig
    schedule: Schedule
    modelled: Mapping[Key, float]
    """Model FLOPs of computations, and seconds of messages."""
    steps: list[Step] = field(default_factory=list)

    def simulated(self, step: Step) -> Timeline:
        """The schedule under what the step shows of computations, and the ping-pong of messages."""
        messages = {key: seconds for key, seconds in self.modelled.items() if key[0] not in COMPUTE}
        return simulate(self.schedule, Durations({**messages, **durations_of(step.timeline, self.schedule).table}))

    def row(self) -> tuple[str, ...]:
        """What the table says of the case."""
        fastest = min(self.steps, key=lambda step: step.timeline.seconds)
        simulated = self.simulated(fastest)
        errors = [self.simulated(step).seconds / step.timeline.seconds - 1 for step in self.steps]
        return (
            self.case.label,
            f"{fastest.timeline.seconds:.3f} s",
            f"{simulated.seconds:.3f} s",
            f"{simulated.seconds / fastest.timeline.seconds - 1:+.1%}",
            f"{simulated.bubble:.1%}",
            str(max(held.get("vision", 0) for held in activation_peaks(self.schedule))),
            f"{fastest.full_seconds:.3f} s",
            f"{fastest.tokens / fastest.full_seconds:,.0f}",
            f"{median(step.timeline.seconds for step in self.steps):.3f} s",
            f"{median(errors):+.1%}",
            f"{min(errors):+.0%} … {max(errors):+.0%}",
        )

    def speeds(self) -> list[str]:
        """What every stage achieves, and how the encoder's cost compares with the language model's, in one line each."""
        tables = [durations_of(step.timeline, self.schedule).table for step in self.steps]
        seconds = {key: median(table[key] for table in tables) for key in tables[0]}
        lines = []
        for name, module in self.schedule.work.modules.items():
            for stage in range(module.stages):
                forward, backward = (Kind.FORWARD, name, stage), (Kind.BACKWARD, name, stage)
                lines.append(
                    f"  {name}, stage {stage}: forward {1e3 * seconds[forward]:.1f} ms, "
                    f"{self.modelled[forward] / seconds[forward] / 1e9:.0f} GFLOP/s; backward {1e3 * seconds[backward]:.1f} ms, "
                    f"{self.modelled[backward] / seconds[backward] / 1e9:.0f} GFLOP/s"
                )
        shares = [_encoder_cost(self.schedule.work, table) for table in (seconds, self.modelled)]
        return [*lines, f"  encoder / language model, forward: {shares[0]:.2f} measured, {shares[1]:.2f} by model FLOPs"]


def _encoder_cost(work: StepWork, table: Mapping[Key, float]) -> float:
    """Of a step's forwards of the encoder, on all ranks, relative to those of the language model."""
    cost = {}
    for name, module in work.modules.items():
        ranks = [
            sum(len(work.programs[program].ranks) for program in work.holders(name, stage)) for stage in range(module.stages)
        ]
        once = sum(count * table[Kind.FORWARD, name, stage] for stage, count in enumerate(ranks))
        cost[name] = module.passes(work.microbatches) * once
    return cost["vision"] / cost[LANGUAGE]


def main(
    worlds: Annotated[list[int], typer.Option("--ranks", help="How many ranks; may be given several times.")] = [2, 4],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="How often every case has its turn.")] = 3,
    steps: Annotated[int, typer.Option(help="Counted steps of a turn.")] = 4,
    width: Annotated[int, typer.Option(help="Hidden size of both modules.")] = 192,
    layers: Annotated[int, typer.Option(help="Layers of each module.")] = 6,
    microbatches: Annotated[int, typer.Option(help="Microbatches of a pipeline's step.")] = 8,
    samples: Annotated[int, typer.Option(help="Samples of a microbatch.")] = 8,
    images: Annotated[int, typer.Option(help="Images of a sample, of 64 media tokens each.")] = 1,
    text: Annotated[int, typer.Option(help="Tokens of each text before, between and after images.")] = 24,
) -> None:
    """Measures 2 and 4 ranks and prints both."""
    transformers.utils.logging.set_verbosity_error()
    console = Console(width=160)
    config = bench_config(width, layers)
    batch = microbatches * samples
    dataset = AlikeDataset(config, batch * (WARM_UP + steps), text_tokens=(text, text), most_items=images)
    train = {"steps": WARM_UP + steps, "batch_size": batch}
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        fixed = {"model": folder, "weights": "seeded"}
        pair = {"vision": {"ranks": 0}, LANGUAGE: {"ranks": 1}}
        found = launch(parse_config({**fixed, "modules": pair, "train": train}), ping_pong)
        assert found is not None
        latency, bandwidth = found
        console.print(
            f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores; a message: {1e6 * latency:.0f} µs and "
            f"{bandwidth / 1e9:.2f} GB/s\n{microbatches} microbatches of {samples} samples, {dataset.meta(0).tokens} tokens each",
            highlight=False,
        )
        for ranks in worlds:
            results = []
            for case in cases(ranks):
                parts = microbatches if case.pipeline else max(1, batch // (samples * ranks))
                tree = {**fixed, "modules": case.modules, "schedule": case.schedule, "train": {**train, "microbatches": parts}}
                run = parse_config(tree)
                where = placements(run)
                schedule = run_schedule(run, config, where, dataset)
                seconds = model_durations(run, config, where, typical_step(run, dataset), Speed(1.0, bandwidth, latency))
                results.append(Results(case, run, schedule, seconds(schedule.work).table))
            for number in range(rounds):
                console.print(f"{ranks} ranks, round {number}: load {os.getloadavg()[0]:.1f} before it", style="dim")
                for its in results:
                    measured = launch(its.run, partial(time_case, config=config, dataset=dataset))
                    assert measured is not None
                    its.steps += measured
            table = Table(f"{ranks} ranks", "step", "simulated", "error", "bubble", "held", "full step", "tokens/s")
            for header in ("median", "error", "errors"):
                table.add_column(header)
            for column in table.columns[1:]:
                column.justify = "right"
            for its in results:
                table.add_row(*its.row())
            console.print(table)
            console.print(
                f"stage by stage, {results[0].case.label}, macro-batch 1:", *results[1].speeds(), sep="\n", highlight=False
            )


if __name__ == "__main__":
    typer.run(main)
