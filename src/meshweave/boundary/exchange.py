"""How do the tokens get there? `exchange` runs a transfer plan under autograd, `transfer` runs it without.

Shapes follow from the plan: no handshakes, one message per pair of ranks and stage, nothing for an idle rank.
All ranks of the plan must start the same transfers in the same order. On NCCL the group must be initialised
(`device_id=...`, or any collective before), because the first exchange need not involve all of its ranks.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from meshweave.boundary.transfer import RankPlan, TransferPlan, row_indices
from meshweave.errors import LayoutError


def exchange(tensors: Sequence[Tensor], plan: TransferPlan, rank: int, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Carry media tokens from the source's layout to the destination's, and their gradients back.

    Args:
        tensors: one or more [rows_in, width_i], one dtype and device: this rank's tokens in the row order of
            its source share ([0, width_i] on a rank without one). They travel as one message.
        plan: the forward plan; backward runs `plan.transpose()`.
        rank: this process' global rank; `group` (default: all ranks) contains every rank of the plan.

    Returns one [rows_out, width_i] for each tensor, in the row order of this rank's destination share. The
    replicas of a destination share must end up with equal gradients (see `TransferPlan.transpose`).

    Backward is communication, too: the ranks must agree on whether the tensors require gradients (also empty
    ones), and each must run backward through its outputs (also empty ones: put their sum into the loss).
    Raises `LayoutError` if a tensor's rows are not the plan's, or the dtypes differ.
    """
    for tensor in tensors:
        _check_rows(tensor, plan.for_rank(rank))
    if len({tensor.dtype for tensor in tensors}) != 1:
        dtypes = ", ".join(str(tensor.dtype) for tensor in tensors) or "none"
        raise LayoutError(f"rank {rank} must give boundary tensors of one dtype, as one message: got {dtypes}")
    widths = [tensor.shape[1] for tensor in tensors]
    joined = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=1)
    moved: Tensor = _Exchange.apply(joined, plan, rank, group)
    return [moved] if len(widths) == 1 else list(moved.split(widths, dim=1))


def transfer(plan: TransferPlan, tensor: Tensor, rank: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Run `plan` once, without autograd: this rank's [rows_in, width] in, its [rows_out, width] out.

    Raises `LayoutError` if the tensor's rows are not the plan's.
    """
    return start_transfer(plan, tensor, rank, group).result()


def start_transfer(plan: TransferPlan, tensor: Tensor, rank: int, group: dist.ProcessGroup | None = None) -> "PendingTransfer":
    """`transfer` in two halves: the first stage is on its way when this returns, `result()` ends it."""
    part = plan.for_rank(rank)
    _check_rows(tensor, part)
    return PendingTransfer(part, tensor.detach(), group)


class PendingTransfer:
    """A transfer under way. State: its messages in flight, which `result` awaits (call it once).

    On a GPU, packing, sending and unpacking run on a stream of their own, which starts after the work queued
    so far; in `result` the current stream waits for it.
    """

    def __init__(self, part: RankPlan, tensor: Tensor, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._stream = torch.cuda.Stream(tensor.device) if tensor.is_cuda else None
        wiring = _wiring(part, tensor.device)  # memory of the current stream, which outlives its use on ours
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
            tensor.record_stream(self._stream)
        with self._on_stream():
            tensor = tensor.contiguous()
            self._out = tensor.new_empty(part.rows_out, tensor.shape[1])
            self._first = _Flight(wiring.stages[0], tensor, self._out, group)
            self._later = wiring.stages[1:]
            _write(self._out, wiring.copy_to, _read(tensor, wiring.copy_from))

    def result(self) -> Tensor:
        """[rows_out, width] of this rank's destination share."""
        with self._on_stream():
            self._first.land()
            for stage in self._later:
                _Flight(stage, self._out, self._out, self._group).land()
        if self._stream is not None:
            current = torch.cuda.current_stream(self._out.device)
            current.wait_stream(self._stream)
            self._out.record_stream(current)
        return self._out

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class _Flight:
    """The messages of one stage, all posted before any is awaited, so that no order of ranks can deadlock."""

    def __init__(self, stage: "_Stage", tensor: Tensor, out: Tensor, group: dist.ProcessGroup | None) -> None:
        self._out = out
        self._buffers: list[tuple[Rows, Tensor]] = []
        posts = [dist.P2POp(dist.isend, _read(tensor, rows), peer, group) for peer, rows in stage.sends]
        for peer, rows in stage.receives:
            if isinstance(rows, slice):
                buffer = out[rows]  # adjacent rows are received in place
            else:
                buffer = out.new_empty(len(rows), out.shape[1])
                self._buffers.append((rows, buffer))
            posts.append(dist.P2POp(dist.irecv, buffer, peer, group))
        self._posts = posts  # keeps what is being sent alive
        self._works = dist.batch_isend_irecv(posts) if posts else []

    def land(self) -> None:
        """Wait for every message and write what was received to its rows."""
        for work in self._works:
            work.wait()
        for rows, buffer in self._buffers:
            _write(self._out, rows, buffer)


Rows: TypeAlias = slice | Tensor
"""Rows of a tensor: adjacent ones as a slice, others as an index tensor on the tensor's device."""


class _Stage(NamedTuple):
    sends: list[tuple[int, Rows]]
    receives: list[tuple[int, Rows]]


class _Wiring(NamedTuple):
    """A rank's plan with its rows ready for one device."""

    copy_from: Rows
    copy_to: Rows
    stages: list[_Stage]


def _wiring(part: RankPlan, device: torch.device) -> _Wiring:
    """The plan's rows on `device`, kept on the plan; all index tensors are made in one upload."""
    if device not in part.cache:
        messages = [message for stage in part.stages for message in (*stage.sends, *stage.receives)]
        intervals = [part.copy_from, part.copy_to, *(message.rows for message in messages)]
        indices = [row_indices(rows) for rows in intervals if len(rows) != 1]
        joined = torch.from_numpy(np.concatenate([*indices, np.zeros(0, dtype=np.int64)])).to(device)
        scattered = iter(joined.split([len(index) for index in indices] + [0]))
        ready = iter([slice(*rows[0].tolist()) if len(rows) == 1 else next(scattered) for rows in intervals])
        copy_from, copy_to = next(ready), next(ready)
        stages = [
            _Stage(*([(message.peer, next(ready)) for message in way] for way in (stage.sends, stage.receives)))
            for stage in part.stages
        ]
        part.cache[device] = _Wiring(copy_from, copy_to, stages)
    wiring: _Wiring = part.cache[device]
    return wiring


def _check_rows(tensor: Tensor, part: RankPlan) -> None:
    if tensor.dim() != 2 or len(tensor) != part.rows_in:
        raise LayoutError(
            f"rank {part.rank} gave a boundary tensor of shape {list(tensor.shape)}, "
            f"but its source share in the plan has {part.rows_in} tokens: expected [{part.rows_in}, width]"
        )


def _read(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def _write(tensor: Tensor, rows: Rows, values: Tensor) -> None:
    if isinstance(rows, slice):
        tensor[rows] = values
    else:
        tensor.index_copy_(0, rows, values)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        tensor: Tensor,
        plan: TransferPlan,
        rank: int,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.call = plan, rank, group  # type: ignore[attr-defined]
        return transfer(plan, tensor, rank, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        plan, rank, group = ctx.call  # type: ignore[attr-defined]
        return transfer(plan.transpose(), gradient, rank, group), None, None, None
