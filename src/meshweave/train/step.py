"""How is one step worked? Encoder forward, boundary, language model, boundary back, encoder backward; then one update.

The boundary is crossed between phases, outside autograd: each side runs its own backward, on whichever ranks it lives.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from meshweave.batch import MicrobatchPlan
from meshweave.boundary import TransferPlan, transfer
from meshweave.boundary.crossing import plan_crossing
from meshweave.config import LANGUAGE
from meshweave.data.loader import LanguageBatch, LocalMicrobatch, LocalStep, MediaBatch
from meshweave.parallel.build import LocalModel
from meshweave.parallel.data import synchronize_gradients
from meshweave.train.gradients import scale_gradients, squared_norm, sum_partial_gradients
from meshweave.train.world import World


@dataclass(frozen=True)
class Totals:
    """Sums over all samples of a step, the same on every rank."""

    loss_sum: float
    targets: int
    """Target tokens."""
    exact: int
    """Samples whose every target token was the most likely one; counted in evaluation only."""
    samples: int
    squared_norms: Mapping[str, float]
    """Module to its squared gradient norm, of the summed (not yet divided) gradients; empty without a backward."""
    crossed: Mapping[str, tuple[int, int]]
    """Encoder to the media tokens sent from rank to rank over its boundary, forward and backward."""

    @property
    def loss(self) -> float:
        """Mean loss per target token."""
        return self.loss_sum / max(1, self.targets)

    @property
    def grad_norm(self) -> float:
        """Norm of the gradient of `loss`, over all modules."""
        return math.sqrt(sum(self.squared_norms.values())) / max(1, self.targets)


def run_step(
    model: LocalModel, step: LocalStep, world: World, widths: tuple[int, ...], dtype: torch.dtype, *, backward: bool = True
) -> Totals:
    """Works every microbatch of a step and leaves summed gradients on the parameters; `backward` False only evaluates.

    Args:
        widths: width of every tensor of a media token (`media_widths`).
        dtype: dtype in which media tokens and their gradients travel.
    """
    plans = step.plan.microbatches
    crossed = {name: (0, 0) for name in world.placements if name != LANGUAGE}
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    for number, (plan, local) in enumerate(zip(plans, step.microbatches, strict=True)):
        for name, part in model.modules.items():
            # Reduce once, in the last microbatch in which the module works at all.
            works_later = any(name == LANGUAGE or later.items.get(name) for later in plans[number + 1 :])
            synchronize_gradients(part.module, not works_later)
        crossings = {
            encoder: plan_crossing(plan, encoder, world.placements, world.node_size)
            for encoder, items in plan.items.items()
            if items
        }
        for encoder, crossing in crossings.items():
            there, back = crossed[encoder]
            crossed[encoder] = (there + crossing.tokens_moved, back + (crossing.transpose().tokens_moved if backward else 0))
        with torch.set_grad_enabled(backward), _named_faults(world, f"microbatch {number}"):
            sums += _run_microbatch(model, plan, local, crossings, world, widths, dtype, backward)
    norms = torch.zeros(len(world.placements), dtype=torch.float64, device=world.device)
    if backward:
        for index, name in enumerate(world.placements):
            if name in model.modules:
                sum_partial_gradients(model.modules[name], world.meshes[name])
                norms[index] = squared_norm(model.modules[name], world.placements[name], world.rank)
    totals = torch.cat([sums, norms])
    if world.size > 1:
        dist.all_reduce(totals)
    loss_sum, targets, exact, samples, *squares = totals.tolist()
    squared_norms = dict(zip(world.placements, squares, strict=True)) if backward else {}
    return Totals(loss_sum, int(targets), int(exact), int(samples), squared_norms, crossed)


def finish_gradients(model: LocalModel, totals: Totals, max_grad_norm: float | None) -> bool:
    """Divides gradients by the step's number of target tokens and clips them by the one global norm.

    Returns False, on all ranks alike, where loss or norm is not finite: the update must then be skipped.
    """
    norm = totals.grad_norm
    if not (math.isfinite(norm) and math.isfinite(totals.loss_sum)):
        return False
    clip = min(1.0, max_grad_norm / (norm + 1e-6)) if max_grad_norm is not None else 1.0
    scale_gradients(model.modules, clip / max(1, totals.targets))
    return True


@contextmanager
def _named_faults(world: World, action: str) -> Iterator[None]:
    """Adds to any exception where it happened; inner actions first."""
    try:
        yield
    except Exception as error:
        error.add_note(f"on rank {world.rank}: {action}")
        raise


def _run_microbatch(
    model: LocalModel,
    plan: MicrobatchPlan,
    local: LocalMicrobatch,
    crossings: Mapping[str, TransferPlan],
    world: World,
    widths: tuple[int, ...],
    dtype: torch.dtype,
    backward: bool,
) -> Tensor:
    encoded: dict[str, tuple[Tensor, MediaBatch]] = {}
    received: dict[str, Tensor] = {}
    nothing = torch.zeros(0, sum(widths), dtype=dtype, device=world.device)
    for encoder, crossing in crossings.items():
        batch = local.media.get(encoder)
        if batch is not None:
            inputs = {name: _to_device(value, world.device, dtype) for name, value in batch.inputs.items()}
            with _named_faults(world, f"{encoder} forward"):
                encoded[encoder] = torch.cat(model.modules[encoder].module(**inputs), dim=1), batch
        tokens = nothing if batch is None or batch.dummy else encoded[encoder][0].detach()
        with _named_faults(world, f"{encoder} → {LANGUAGE}"):
            received[encoder] = transfer(crossing, tokens, world.rank)
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    if local.language is not None:
        for tokens in received.values():
            tokens.requires_grad_(backward)
        with _named_faults(world, f"{LANGUAGE} forward"):
            loss, counts = _language_forward(model, plan, local.language, received, widths, world)
        if backward:
            with _named_faults(world, f"{LANGUAGE} backward"):
                loss.backward()
        if world.leads_lane:
            sums = torch.stack([loss.detach().double(), *counts.unbind()])
    if backward:
        for encoder, crossing in crossings.items():
            gradient = received[encoder].grad
            # A lane without media, or a rank outside the language model, has no rows to send.
            with _named_faults(world, f"{LANGUAGE} → {encoder}"):
                gradient = transfer(crossing.transpose(), nothing if gradient is None else gradient, world.rank)
            if encoder in encoded:
                output, batch = encoded[encoder]
                with _named_faults(world, f"{encoder} backward"):
                    output.backward(torch.zeros_like(output) if batch.dummy else gradient)
    return sums


def _language_forward(
    model: LocalModel,
    plan: MicrobatchPlan,
    batch: LanguageBatch,
    received: Mapping[str, Tensor],
    widths: tuple[int, ...],
    world: World,
) -> tuple[Tensor, Tensor]:
    """Loss sum of this lane, and its numbers of targets, exact samples and samples (float64 `[3]`)."""
    lane = world.placements[LANGUAGE].lane(world.rank)
    assert lane is not None
    media: tuple[Tensor, ...] = ()
    grids = None
    for encoder, tokens in received.items():  # `graph_of` lets models with one encoder pass
        if len(tokens):
            media = tokens.split(widths, dim=1)
            found = [plan.items[encoder][number].meta.grid for number in plan.language_items(encoder)[lane]]
            grids = torch.tensor(found, device=world.device) if all(found) else None
    labels = batch.labels.to(world.device)
    loss, exact = model.modules[LANGUAGE].module(
        input_ids=batch.input_ids.to(world.device), labels=labels, media=media, grids=grids
    )
    samples = len(plan.lanes[lane])
    targets = (labels[:, 1:] != -100).sum()
    counts = torch.zeros(3, dtype=torch.float64, device=world.device)
    counts[0] = targets
    counts[1] = exact[:samples].sum() if exact is not None else 0
    counts[2] = samples
    return loss, counts


def _to_device(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)
