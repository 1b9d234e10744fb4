"""How do the tokens get there? `exchange` runs a transfer plan under autograd, `transfer` runs it without.

Shapes follow from the plan: no handshakes, one message per pair of ranks and stage, nothing for an idle rank.
All ranks of the plan must start the same transfers in the same order. On NCCL the group must be initialised
(`device_id=...`, or any collective before), because the first exchange need not involve all of its ranks.
"""

from collections.abc import Container, Sequence
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
    part = plan.for_rank(rank)
    _check_rows(tensor, part)
    tensor = tensor.detach()
    arrival = Arrival(part, tensor.new_empty(0, tensor.shape[1]))
    posts = [dist.P2POp(dist.isend, values, peer, group) for peer, values in outgoing(part, tensor)]
    posts += [dist.P2POp(dist.irecv, buffer, peer, group) for peer, buffer in arrival.expect()]
    # All are posted before any is awaited, so that no order of ranks can deadlock.
    works = dist.batch_isend_irecv(posts) if posts else []
    arrival.copy(tensor)
    for work in works:
        work.wait()
    return arrival.result(group)


def outgoing(part: RankPlan, tensor: Tensor, peers: Container[int] | None = None) -> list[tuple[int, Tensor]]:
    """What a rank sends of its [rows_in, width] in the first stage of its plan: (receiver, values), to `peers` only if given."""
    _check_rows(tensor, part)
    sends = _wiring(part, tensor.device).stages[0].sends
    return [(peer, _read(tensor, rows).contiguous()) for peer, rows in sends if peers is None or peer in peers]


class Arrival:
    """A rank's tokens on their way in, for a caller that posts the messages itself.

    State: the [rows_out, width] tensor that fills, and messages whose rows are scattered in it.
    """

    def __init__(self, part: RankPlan, like: Tensor) -> None:
        """`like`: any [rows, width] of the right width, dtype and device."""
        self._wiring = _wiring(part, like.device)
        self._out = like.new_empty(part.rows_out, like.shape[1])
        self._buffers: list[tuple[Rows, Tensor]] = []

    def expect(self, peers: Container[int] | None = None) -> list[tuple[int, Tensor]]:
        """Buffers of the first stage: (sender, where its message goes), from `peers` only if given."""
        found = []
        for peer, rows in self._wiring.stages[0].receives:
            if peers is not None and peer not in peers:
                continue
            if isinstance(rows, slice):
                buffer = self._out[rows]  # adjacent rows are received in place
            else:
                buffer = self._out.new_empty(len(rows), self._out.shape[1])
                self._buffers.append((rows, buffer))
            found.append((peer, buffer))
        return found

    def copy(self, tensor: Tensor) -> None:
        """Takes over the tokens that this rank needs and holds itself, in its [rows_in, width]."""
        _write(self._out, self._wiring.copy_to, _read(tensor, self._wiring.copy_from))

    def result(self, group: dist.ProcessGroup | None = None) -> Tensor:
        """[rows_out, width], once every message of the first stage is there; runs the later stages, if any."""
        for rows, buffer in self._buffers:
            _write(self._out, rows, buffer)
        # Tags of their own: between the same two ranks, messages of a later transfer's first stage may be under way already.
        for tag, stage in enumerate(self._wiring.stages[1:], start=1):
            posts = [dist.P2POp(dist.isend, _read(self._out, rows), peer, group, tag) for peer, rows in stage.sends]
            landing = [(rows, self._out.new_empty(_length(rows), self._out.shape[1]), peer) for peer, rows in stage.receives]
            posts += [dist.P2POp(dist.irecv, buffer, peer, group, tag) for _, buffer, peer in landing]
            for work in dist.batch_isend_irecv(posts) if posts else []:
                work.wait()
            for rows, buffer, _ in landing:
                _write(self._out, rows, buffer)
        return self._out


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


def _length(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


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
