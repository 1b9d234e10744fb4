"""How do parameters, spread over modules, stages and shards, come together on rank 0?"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshweave.parallel.build import LocalModel
from meshweave.parallel.gather import whole
from meshweave.world import World


def led_parameters(model: LocalModel, world: World) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters for which this rank speaks: every parameter of the model is led by exactly one rank."""
    for name, part in model.modules.items():
        coordinate = world.placements[name].coordinate(world.rank)
        assert coordinate is not None
        if all(index == 0 for axis, index in coordinate.items() if axis != "pp"):
            yield from ((key, parameter) for key, parameter in part.parameters.items() if key not in part.copies)


def whole_values(model: LocalModel, *, gradients: bool = False) -> dict[str, Tensor]:
    """Full name to the whole value, or gradient where there is one, of every parameter held here; a collective over its ranks."""
    values = {}
    for part in model.modules.values():
        for name, parameter in part.parameters.items():
            value = parameter.grad if gradients else parameter
            if value is not None:
                values[name] = whole(value)
    return values


def gather_led(model: LocalModel, world: World, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every parameter's value on the CPU of rank 0, from the rank that leads it; {} elsewhere. A collective over all ranks."""
    led = {name: values[name] for name, _ in led_parameters(model, world) if name in values}
    gathered = {name: value.cpu() for name, value in led.items()} if world.rank == 0 else {}
    if world.size == 1:
        return gathered
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in led.items()}
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, shapes, group=world.data_group)
    for sender, theirs in enumerate(everyone):
        for name, (shape, dtype) in theirs.items() if sender else ():
            if world.rank == sender:
                dist.send(led[name].cpu().contiguous(), dst=0, group=world.data_group)
            elif world.rank == 0:
                gathered[name] = torch.empty(shape, dtype=dtype)
                dist.recv(gathered[name], src=sender, group=world.data_group)
    return gathered


def parameter_reader(model: LocalModel, world: World) -> Callable[[str], Tensor | None]:
    """Reads parameters whole, on the CPU of rank 0, one at a time.

    This and every call of what it returns are collectives over all ranks, which ask for the same names in the same order. The
    value is None on other ranks, and for what no rank holds.
    """
    held = {
        name: parameter
        for part in model.modules.values()
        for name, parameter in part.parameters.items()
        if name not in part.copies
    }
    mine = {name: (world.rank, tuple(parameter.shape), parameter.dtype) for name, parameter in led_parameters(model, world)}
    everyone: list[Any] = [mine]
    if world.size > 1:
        everyone = [None] * world.size
        dist.all_gather_object(everyone, mine, group=world.data_group)
    leaders = {name: leader for theirs in everyone for name, leader in theirs.items()}

    def read(name: str) -> Tensor | None:
        if name not in leaders:
            return None
        leader, shape, dtype = leaders[name]
        value = whole(held[name]).cpu() if name in held else None
        if leader and world.rank == leader:
            assert value is not None
            dist.send(value.contiguous(), dst=0, group=world.data_group)
        elif leader and world.rank == 0:
            value = torch.empty(shape, dtype=dtype)
            dist.recv(value, src=leader, group=world.data_group)
        return value if world.rank == 0 else None

    return read
