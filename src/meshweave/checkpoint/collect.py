"""How do parameters, spread over modules, stages and shards, come together on rank 0?"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meshweave.checkpoint.pieces import Piece
from meshweave.parallel.build import LocalModel
from meshweave.parallel.gather import whole
from meshweave.world import World

_PIECES, _PIECE_BYTES = 64, 2 * 2**20
"""A parameter comes to rank 0 in at most so many pieces, and in none that are smaller than this."""


def led_parameters(model: LocalModel, world: World) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters for which this rank speaks: every parameter of the model is led by exactly one rank."""
    for name, part in model.modules.items():
        coordinate = world.placements[name].coordinate(world.rank)
        assert coordinate is not None
        if all(index == 0 for axis, index in coordinate.items() if axis != "pp"):
            yield from ((key, parameter) for key, parameter in part.parameters.items() if key not in part.copies)


def held_parameters(model: LocalModel) -> dict[str, nn.Parameter]:
    """Full name to this rank's part of every parameter that it holds, a second copy of a tied one included."""
    return {name: parameter for part in model.modules.values() for name, parameter in part.parameters.items()}


def held_gradients(model: LocalModel) -> dict[str, Tensor]:
    """The same, of their gradients, where there are any."""
    return {name: parameter.grad for name, parameter in held_parameters(model).items() if parameter.grad is not None}


@dataclass(frozen=True)
class Gathered:
    """Whole tensors, put together from the parts of all ranks."""

    values: Mapping[str, Tensor]
    """On the CPU."""
    drift: Mapping[tuple[str, int], float]
    """(name, rank) → norm of the difference between what that rank has and what a rank before it has of the same elements."""


def gather(world: World, held: Mapping[str, Tensor]) -> Gathered:
    """Every tensor whole, on rank 0, and nothing elsewhere: for models that fit there several times. A collective over all ranks.

    Args:
        held: this rank's parts (DTensors where sharded); of what several ranks hold, the first one's value is taken.
    """
    pieces = {name: Piece.of(value) for name, value in held.items()}
    mine = {name: Piece(piece.shape, piece.runs, piece.part.cpu().clone()) for name, piece in pieces.items()}
    everyone: list[Any] = [mine]
    if world.size > 1:
        everyone = [None] * world.size
        dist.gather_object(mine, everyone if world.rank == 0 else None, dst=0, group=world.data_group)
    values: dict[str, Tensor] = {}
    there: dict[str, Tensor] = {}
    drift: dict[tuple[str, int], float] = {}
    for rank, theirs in enumerate(everyone if world.rank == 0 else ()):
        for name, piece in theirs.items():
            whole_value = values.setdefault(name, torch.zeros(piece.shape, dtype=piece.part.dtype))
            known = there.setdefault(name, torch.zeros(piece.shape, dtype=torch.bool))
            apart = 0.0
            for offsets, (_, sizes) in piece.boxes.items():
                box = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
                value = piece.box(offsets)
                apart += float(((value - whole_value[box]).double().square() * known[box]).sum())
                whole_value[box] = torch.where(known[box], whole_value[box], value)
                known[box] = True
            drift[name, rank] = apart**0.5
    return Gathered(values, drift)


def parameter_reader(model: LocalModel, world: World) -> Callable[[str], Tensor | None]:
    """Reads parameters whole, on the CPU of rank 0, one at a time; of one with a dim that is not split, other ranks hold pieces.

    This and every call of what it returns are collectives over all ranks, which ask for the same names in the same order. The
    value, which is there until the next call, is None on other ranks, and for what no rank holds.
    """
    held = {
        name: parameter.detach()
        for part in model.modules.values()
        for name, parameter in part.parameters.items()
        if name not in part.copies
    }
    mine = {name: _led(world.rank, parameter) for name, parameter in led_parameters(model, world)}
    everyone: list[Any] = [mine]
    if world.size > 1:
        everyone = [None] * world.size
        dist.all_gather_object(everyone, mine, group=world.data_group)
    led: dict[str, _Led] = {name: found for theirs in everyone for name, found in theirs.items()}
    # One for all: values of all sizes, one after the other, would leave the heap in pieces.
    largest = max((found.bytes for found in led.values()), default=0)
    buffer = torch.empty(largest if world.rank == 0 else 0, dtype=torch.uint8)

    def read(name: str) -> Tensor | None:
        if name not in led:
            return None
        found = led[name]
        here = held.get(name)
        if here is not None and not isinstance(here, DTensor):
            if world.rank == found.rank == 0:
                return here.cpu()
            if world.rank != found.rank:
                here = None
        value = buffer[: found.bytes].view(found.dtype).view(found.shape) if world.rank == 0 else None
        for start, length in found.pieces():
            piece = None if here is None else whole(_narrowed(here, found.dim, start, length)).cpu()
            if found.rank and world.rank == found.rank:
                assert piece is not None
                dist.send(piece.contiguous(), dst=0, group=world.data_group)
            if value is not None:
                place = value if found.dim is None else value.narrow(found.dim, start, length)
                if found.rank:
                    piece = torch.empty(place.shape, dtype=found.dtype)
                    dist.recv(piece, src=found.rank, group=world.data_group)
                assert piece is not None
                place.copy_(piece)
        return value

    return read


@dataclass(frozen=True)
class _Led:
    """A parameter, for those who do not hold it."""

    rank: int
    """Who speaks for it."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    dim: int | None
    """A dim that no rank shares with another, along which it can be gathered in pieces; None if there is none."""

    @property
    def bytes(self) -> int:
        """Of the whole value."""
        return prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> list[tuple[int, int]]:
        """Start and length along `dim`."""
        if self.dim is None:
            return [(0, 0)]
        size = self.shape[self.dim]
        piece = max(_PIECE_BYTES, self.bytes // _PIECES)
        length = max(1, size * piece // max(1, self.bytes))
        return [(start, min(length, size - start)) for start in range(0, size, length)]


def _led(rank: int, parameter: Tensor) -> _Led:
    placements = parameter.placements if isinstance(parameter, DTensor) else ()
    shared = {placement.dim for placement in placements if hasattr(placement, "dim")}
    free = [dim for dim in range(parameter.ndim) if dim not in shared]
    return _Led(rank, tuple(parameter.shape), parameter.dtype, free[0] if free else None)


def _narrowed(parameter: Tensor, dim: int | None, start: int, length: int) -> Tensor:
    """A part along a dim that is whole on every rank."""
    if dim is None:
        return parameter
    if not isinstance(parameter, DTensor):
        return parameter.narrow(dim, start, length)
    shape = torch.Size([*parameter.shape[:dim], length, *parameter.shape[dim + 1 :]])
    stride = torch.empty(shape, device="meta").stride()
    local = parameter.to_local().narrow(dim, start, length).contiguous()
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride)
