"""How do queries attend to keys that other ranks hold? In as many steps as there are participants, one's keys a step.

At step s a participant works on the keys of the participant s before it, which sends it those rows that its tiles need, and no
others; the keys of the next step travel meanwhile. So no rank ever has more than its own keys and those of two others. The
backward pass fetches the keys again, and sends their gradients back to where they came from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from meshweave.parallel.context.kernels import Bias, attend, attend_backward


@dataclass(frozen=True)
class ReadyTile:
    """A tile as the kernels want it."""

    query: slice
    keys: slice
    causal: bool
    bias: Bias | None


@dataclass(frozen=True)
class Ring:
    """One participant's part in a ring, ready for one device and dtype."""

    group: dist.ProcessGroup | None
    """None for a ring of one."""
    participant: int
    """This rank's number in the group."""
    tiles: Sequence[Sequence[ReadyTile]]
    """By participant whose keys they are of."""
    fetched: Sequence[int]
    """By participant: rows of keys that it lends to this one."""
    lent: Sequence[Tensor]
    """By participant: own rows that it needs, `[rows]`."""


def ring_attention(q: Tensor, k: Tensor, v: Tensor, ring: Ring, scale: float) -> Tensor:
    """Attention of this participant's queries to the keys of all.

    Args:
        q, k, v: `[1, heads, rows, dim]`, `[1, kv heads, rows, dim]` twice; rows in the order of the positions held.

    Returns `[1, heads, rows, dim of v]`. Every participant must call it, and run backward through what it returned.
    """
    out: Tensor = _RingAttention.apply(q, k, v, ring, scale)
    return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring, scale: float) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        total = q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=wide)
        lse = q.new_full(q.shape[:-1], float("-inf"), dtype=wide)
        for owner, keys, values in _Keys(ring, k, v):
            for tile in ring.tiles[owner]:
                key, value = keys[:, :, tile.keys], values[:, :, tile.keys]
                part = attend(q[:, :, tile.query], key, value, scale, tile.causal, tile.bias)
                _merge(total[:, :, tile.query], lse[:, :, tile.query], *part)
        out = total.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring, ctx.scale = ring, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        ring: Ring = ctx.ring
        if gradient.stride(-1) != 1:
            gradient = gradient.contiguous()  # the kernels mind strides within a head only
        dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
        home = _Gradients(ring, dk, dv)
        for owner, keys, values in _Keys(ring, k, v):
            message = dk.new_zeros(0 if owner == ring.participant else ring.fetched[owner] * _width(k, v))
            its = (dk, dv) if owner == ring.participant else _unpacked(message, ring.fetched[owner], k, v)
            for tile in ring.tiles[owner]:
                rows = tile.query
                parts = attend_backward(
                    gradient[:, :, rows],
                    q[:, :, rows],
                    keys[:, :, tile.keys],
                    values[:, :, tile.keys],
                    out[:, :, rows],
                    lse[:, :, rows],
                    ctx.scale,
                    tile.causal,
                    tile.bias,
                )
                for into, place, part in zip((dq, *its), (rows, tile.keys, tile.keys), parts, strict=True):
                    into[:, :, place] += part
                del parts, part
            if owner != ring.participant:
                home.send(owner, message)
        home.finish()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _merge(total: Tensor, lse: Tensor, out: Tensor, out_lse: Tensor) -> None:
    """Takes a tile's output into what its queries have so far, in place; -inf is a query that has seen nothing."""
    both = torch.logaddexp(lse, out_lse)
    reference = both.masked_fill(both == float("-inf"), 0.0)
    total.mul_((lse - reference).exp_().unsqueeze(-1)).add_(out * (out_lse - reference).exp_().unsqueeze(-1))
    lse.copy_(both)


class _Keys:
    """Iterates over (participant, its keys, its values), this participant first; the next ones are on their way meanwhile."""

    def __init__(self, ring: Ring, k: Tensor, v: Tensor) -> None:
        self._ring, self._k, self._v = ring, k, v

    def __iter__(self) -> Any:
        ring, size = self._ring, len(self._ring.tiles)
        arriving = self._exchange(1) if size > 1 else None
        yield ring.participant, self._k, self._v
        for step in range(1, size):
            assert arriving is not None
            works, message, sent = arriving
            for work in works:
                work.wait()
            del sent
            arriving = self._exchange(step + 1) if step + 1 < size else None
            owner = (ring.participant - step) % size
            yield owner, *_unpacked(message, ring.fetched[owner], self._k, self._v)

    def _exchange(self, step: int) -> tuple[list[dist.Work], Tensor, Tensor]:
        """Posts the messages of a step: (what to wait for, what arrives, what is sent and must stay)."""
        ring, size = self._ring, len(self._ring.tiles)
        reader, owner = (ring.participant + step) % size, (ring.participant - step) % size
        rows = ring.lent[reader]
        sent = self._k.new_empty(len(rows) * _width(self._k, self._v))
        for x, part in zip((self._k, self._v), _unpacked(sent, len(rows), self._k, self._v), strict=True):
            torch.index_select(x, 2, rows, out=part)
        got = self._k.new_empty(ring.fetched[owner] * _width(self._k, self._v))
        return _post(ring.group, (reader, sent), (owner, got)), got, sent


class _Gradients:
    """Gradients of keys and values on their way to their owners.

    State: the message under way, and the owner's sums `dk` and `dv`, to which arriving ones are added.
    """

    def __init__(self, ring: Ring, dk: Tensor, dv: Tensor) -> None:
        self._ring, self._dk, self._dv = ring, dk, dv
        self._under_way: tuple[list[dist.Work], Tensor, Tensor, int] | None = None

    def send(self, owner: int, sent: Tensor) -> None:
        """Sends what this participant computed for `owner`, packed; as much arrives for own keys, from the other side."""
        self.finish()
        ring, size = self._ring, len(self._ring.tiles)
        reader = (2 * ring.participant - owner) % size
        got = self._dk.new_empty(len(ring.lent[reader]) * _width(self._dk, self._dv))
        self._under_way = _post(ring.group, (owner, sent), (reader, got)), got, sent, reader

    def finish(self) -> None:
        """Waits for the message under way and adds it."""
        if self._under_way is None:
            return
        works, got, _, reader = self._under_way
        for work in works:
            work.wait()
        rows = self._ring.lent[reader]
        for into, part in zip((self._dk, self._dv), _unpacked(got, len(rows), self._dk, self._dv), strict=True):
            into.index_add_(2, rows, part)
        self._under_way = None


def _post(group: dist.ProcessGroup | None, send: tuple[int, Tensor], receive: tuple[int, Tensor]) -> list[dist.Work]:
    """Starts one message each way, none where it would be empty."""
    ways = ((dist.isend, *send), (dist.irecv, *receive))
    posts = [dist.P2POp(way, message, group=group, group_peer=peer) for way, peer, message in ways if len(message)]
    return dist.batch_isend_irecv(posts) if posts else []


def _width(k: Tensor, v: Tensor) -> int:
    """Numbers a row of keys and values has."""
    return k.shape[1] * (k.shape[3] + v.shape[3])


def _unpacked(message: Tensor, rows: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A message as keys and values of `rows` rows, shaped as `k` and `v` are otherwise."""
    keys, values = message.split([rows * x.shape[1] * x.shape[3] for x in (k, v)])
    return keys.view(1, k.shape[1], rows, k.shape[3]), values.view(1, v.shape[1], rows, v.shape[3])
