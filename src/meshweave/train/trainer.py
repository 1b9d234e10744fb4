"""The loop: load, step, update, log, save; then evaluate, export and sum up."""

import logging
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedConfig

from meshweave.batch.plan import StepPlan
from meshweave.checkpoint.export import export_model
from meshweave.checkpoint.load import load_state, require_same_run
from meshweave.checkpoint.manifest import read_manifest
from meshweave.checkpoint.save import Saver
from meshweave.checkpoint.state import held_state, state_bytes
from meshweave.config import LANGUAGE, RunConfig
from meshweave.data.build import build_datasets
from meshweave.errors import ConfigError, DataError
from meshweave.model.blueprint import STORED, TRAVELS_AS, blueprint_of
from meshweave.model.flops import TRAINING_FACTOR, ModuleFlops, count_flops
from meshweave.model.modules import graph_of, media_widths
from meshweave.parallel.build import build_model
from meshweave.report.curves import draw_loss_curve
from meshweave.report.summary import Crossing, Summary
from meshweave.schedule.simulate import Timeline
from meshweave.schedule.waits import Waits
from meshweave.step.loading import build_loader
from meshweave.step.run import finish_gradients, run_step, stopped
from meshweave.step.schedules import agreed_schedule
from meshweave.step.trace import MEASURED_PICTURE, TRACED_STEP, measured_timeline, start_clock, write_measured
from meshweave.step.worker import Travel
from meshweave.train.diverged import ended_by, unfinite_step
from meshweave.train.evaluation import Evaluation, evaluate
from meshweave.train.metrics import METRICS, TENSORBOARD, MetricsLog
from meshweave.train.optimizer import build_optimizer, build_schedule, peak_rate, rate_factor
from meshweave.train.output import CURVE, MODEL, START, Start, claimed
from meshweave.train.stragglers import Pace, Stragglers
from meshweave.train.tally import Tally
from meshweave.world import World

logger = logging.getLogger(__name__)


def train(world: World, run: RunConfig, config: PreTrainedConfig, *, trace: bool = False, start: Start = START) -> Summary:
    """Trains as the run file says; rank 0 logs, draws and writes the model. Returns the same summary on every rank, speeds apart.

    With `trace`, one step is clocked on all ranks, and rank 0 draws and writes its timeline.

    A step without a target makes no update and has no loss; learning rates go by the step's number all the same.

    Raises:
        ConfigError: the run folder holds a run, or is another's, or the run is not the one that wrote the checkpoint.
        DataError: data cannot be read (`data.on_error: stop`, `data.max_skipped`), is smaller than a step, or no step had
            anything to learn from.
        CheckpointError: the model folder's weights do not fit; there is no checkpoint to go on from, or it is damaged; too many
            saves have failed.
        DivergedError: too many steps in a row had no finite loss or gradient; on all ranks alike.
        StoppedError: some rank was asked to stop, and the step at whose end all do is done and saved; on all ranks alike.
    """
    training, held_out = build_datasets(run, config)
    schedule = agreed_schedule(world, run, config, training)
    graph = graph_of(blueprint_of(config, STORED[run.dtype]))
    flops = {name: count_flops(graph, name) for name in run.modules}
    model = build_model(run, config, world.placements, world.meshes, world.rank, world.device, world.expert_meshes)
    loader = build_loader(run, training, world, schedule, model.part.rule, flops=flops[LANGUAGE])
    optimizer = build_optimizer(run, {name: part.parameters for name, part in model.modules.items()})
    travel = Travel(media_widths(config), config.get_text_config().hidden_size, TRAVELS_AS[run.dtype])
    token_bytes = {name: sum(widths) * travel.dtype.itemsize for name, widths in travel.widths.items()}
    tally = Tally()
    measured: Timeline | None = None
    diverged: list[dict[str, Any]] = []
    stragglers = Stragglers(world)
    said = logger.warning if world.rank == 0 else logger.debug
    with ExitStack() as stack:
        needed = state_bytes(run, graph) if run.train.checkpoint is not None else 0
        checkpoint = stack.enter_context(claimed(world, run, start, needed))
        if checkpoint is not None:
            shapes = {key: tuple(value.shape) for name in run.modules for key, value in graph.parameters(name).items()}
            tally = _checked(world, run, checkpoint, start, len(training))
            load_state(world, checkpoint, model, optimizer, shapes)
            loader.log.go_on(tally.met.state())
        done, last = tally.steps, run.train.steps
        rates = build_schedule(run, optimizer, done)
        # Closed on any way out: its thread must not outlive a run that failed.
        log = stack.enter_context(closing(MetricsLog(run.output, done))) if world.rank == 0 else None
        saver = stack.enter_context(Saver(world, run, len(training))) if run.train.checkpoint is not None else None
        progress = stack.enter_context(_progress(world, last))
        task = progress.add_task("training", total=last, completed=done, shown="")
        started = asked = time.perf_counter()
        world.stop.reached(done)
        steps = loader.steps(done, last)
        for number, step in enumerate(steps, done):
            began, waits = time.perf_counter(), Waits(world.device.type == "cuda")
            clock = start_clock(world) if trace and number == min(done + TRACED_STEP, last - 1) else None
            overdue = saver is not None and saver.is_overdue()
            totals = run_step(model, step, world, schedule, travel, clock.spans if clock else None, save_due=overdue, waits=waits)
            if clock is not None:
                measured = measured_timeline(world, clock)
            updated = finish_gradients(model, totals, run.train.max_grad_norm)
            if updated:
                optimizer.step()
                diverged.clear()
            elif not totals.targets:
                said(f"step {number}: no sample of it has anything to learn from; there is no update, on any rank")
            else:
                diverged.append(unfinite_step(number, totals, loader.sample_ids(number)))
                said(f"step {number}: {diverged[-1]['what']}; there is no update, on any rank")
            with warnings.catch_warnings():
                # A first step without an update is no mistake: rates go by the step's number.
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                rates.step()
            optimizer.zero_grad()
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            waited = waits.seconds()
            stragglers.add(Pace(now - began - waited, step.seconds, began - asked, waited))
            record = {
                "step": number,
                "loss": totals.loss,
                "grad_norm": totals.grad_norm,
                "lr": {name: peak_rate(run, name) * rate_factor(run.train, number) for name in run.modules},
                "seconds": now - started,
                "tokens": step_tokens(step.plan),
                "tokens_per_second": step_tokens(step.plan) / (now - started),
                "flops": step_flops(step.plan, flops),
                "boundary_forward_bytes": {name: there * token_bytes[name] for name, (there, _) in totals.crossed.items()},
                "boundary_backward_bytes": {name: back * token_bytes[name] for name, (_, back) in totals.crossed.items()},
                "skipped_samples": step.skipped,
                "left_out_samples": step.left_out,
                "faults": dict(Counter(fault.kind for fault in step.faults.values())),
                "updated": int(updated),
            }
            if totals.load:
                record |= {"router_aux_loss": totals.router_aux_loss, "expert_imbalance": totals.imbalance}
            if (number + 1) % run.train.log_every == 0:
                record |= stragglers.gathered()
            tally.add(record, step.faults, run.train.batch_size)
            if log is not None:
                log.add(record)
            loss = "no loss" if totals.loss is None else f"loss {totals.loss:.4f}"
            shown = f"{loss} · grad norm {totals.grad_norm:.3f} · {record['tokens_per_second']:,.0f} tokens/s"
            progress.update(task, advance=1, shown=shown)
            if world.rank == 0 and not progress.console.is_terminal and (number + 1) % run.train.log_every == 0:
                progress.console.print(f"step {number + 1:>6}/{last}  {shown}")
            world.stop.reached(number + 1)
            if len(diverged) == run.train.max_skipped_steps:
                steps.close()
                raise ended_by(diverged, run, writes=world.rank == 0)
            # After the last step there is a model to write, which takes no longer than to stop.
            stops = bool(totals.asked) and number + 1 < last
            # After the clock was read: what a save takes is a step's that waits for it.
            started = now
            if saver is not None and (stops or totals.save_due or saver.is_due(number + 1)):
                saver.save(number + 1, held_state(model, optimizer, world), tally.state())
            if stops:
                steps.close()
                if saver is not None:
                    saver.wait()
                raise stopped(world)
            asked = time.perf_counter()
        if not tally.updated:
            counted = ", ".join(f"{count} × {kind}" for kind, count in tally.faults.most_common()) or "no sample has a target"
            raise DataError(f"nothing was trained, so no model is written: no step had anything to learn from ({counted})")
        # Before the evaluation: whatever happens there, the model is written.
        export_model(world, model, config, run, run.output / MODEL)
        evaluation = evaluate(world, run, config, model, held_out, travel) if held_out is not None else None
        if log is not None:
            draw_loss_curve(log.records(), run.output / CURVE)
            if measured is not None:
                write_measured(measured, run.output)
    return _summary(run, tally, evaluation, measured is not None)


def _checked(world: World, run: RunConfig, checkpoint: Path, start: Start, samples: int) -> Tally:
    """What a checkpoint's steps have added up to, if the run may go on from it; rank 0 says from where, and what has changed."""
    manifest = read_manifest(checkpoint)
    changed = require_same_run(checkpoint, manifest, run, samples, start.allow_changed)
    if manifest.step > run.train.steps:
        raise ConfigError(
            f"train.steps={run.train.steps}: {checkpoint} is {manifest.step} steps old already; name more steps, or an earlier "
            "checkpoint (--resume DIR)"
        )
    if world.rank == 0:
        for line in (f"going on from {checkpoint}, after step {manifest.step}", *(f"changed since: {line}" for line in changed)):
            logger.warning(line)
    return Tally.of(manifest.progress)


def step_tokens(plan: StepPlan) -> int:
    """Tokens of the language model's sequences in a step, padding left out."""
    return sum(sample.tokens for part in plan.microbatches for lane in part.lanes for sample in lane)


def step_flops(plan: StepPlan, flops: Mapping[str, ModuleFlops]) -> dict[str, int]:
    """Model FLOPs of a training step by module: forward and backward."""
    work = dict.fromkeys(flops, 0)
    for part in plan.microbatches:
        work[LANGUAGE] += sum(flops[LANGUAGE].sample(sample.tokens) for lane in part.lanes for sample in lane)
        for encoder, items in part.items.items():
            work[encoder] += sum(flops[encoder].item(item.meta) for item in items)
    return {name: TRAINING_FACTOR * count for name, count in work.items()}


def _progress(world: World, steps: int) -> Progress:
    console = Console()
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
    )
    return Progress(*columns, console=console, disable=world.rank != 0 or not console.is_terminal)


def _summary(run: RunConfig, tally: Tally, evaluation: Evaluation | None, traced: bool) -> Summary:
    assert tally.loss is not None
    return Summary(
        steps=tally.steps,
        seconds=tally.steps * tally.seconds / max(1, tally.timed),
        loss=tally.loss,
        tokens_per_second=tally.tokens / tally.seconds if tally.seconds else 0.0,
        flops={name: tally.flops[name] / tally.steps for name in run.modules},
        crossings={
            name: Crossing(tally.forward_bytes[name] / tally.steps, tally.backward_bytes[name] / tally.steps)
            for name in run.encoders
        },
        skipped=tally.skipped,
        left_out=tally.left_out,
        faults=tally.faults,
        exact=evaluation.exact if evaluation else None,
        evaluated=evaluation.samples if evaluation else None,
        eval_loss=evaluation.loss if evaluation else None,
        loss_curve=run.output / CURVE,
        timeline=run.output / MEASURED_PICTURE if traced else None,
        metrics=run.output / METRICS,
        tensorboard=run.output / TENSORBOARD,
        model=run.output / MODEL,
    )
