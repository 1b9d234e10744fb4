"""What does a rank put into a checkpoint, and take from one? Parameters, optimizer state and random numbers, by name."""

from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from meshweave.checkpoint.collect import held_parameters
from meshweave.checkpoint.pieces import Piece
from meshweave.config import RunConfig
from meshweave.errors import CheckpointError
from meshweave.model.frozen import frozen_names
from meshweave.model.modules import ModelGraph
from meshweave.parallel.build import LocalModel
from meshweave.world import World

_MODEL, _OPTIMIZER, _RANDOM = "model", "optimizer", "random"
_KINDS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter."""


def parameter_key(name: str) -> str:
    """Of a parameter, in a checkpoint."""
    return f"{_MODEL}.{name}"


def state_bytes(run: RunConfig, graph: ModelGraph) -> int:
    """About what a checkpoint of the run takes on the disk: parameters, and AdamW's two moments of those that are trained."""
    total = 0
    for name, module in run.modules.items():
        named = graph.parameters(name)
        still = frozen_names(module, named)
        total += sum(value.nbytes * (1 if key in still else 3) for key, value in named.items())
    return total


def held_state(model: LocalModel, optimizer: Optimizer, world: World) -> dict[str, Piece]:
    """Key to this rank's piece of all that a checkpoint holds; the pieces' memory is the model's and the optimizer's own.

    Parameters go by their full transformers names, each once; optimizer state is there for those that have been updated. Random
    numbers differ from rank to rank, so each rank has a key of its own: of equal keys DCP keeps one rank's value, any rank's.
    """
    state = {}
    copies = {name for part in model.modules.values() for name in part.copies}
    for name, parameter in held_parameters(model).items():
        if name in copies:
            continue
        state[parameter_key(name)] = Piece.of(parameter)
        for kind, value in optimizer.state.get(parameter, {}).items():
            state[f"{_OPTIMIZER}.{kind}.{name}"] = Piece.of(value)
    return state | {f"{_RANDOM}.{key}": Piece.of(value) for key, value in _random_state(world).items()}


def wanted_state(model: LocalModel, optimizer: Optimizer, world: World, stored: Container[str]) -> dict[str, Piece]:
    """Key to the piece that this rank reads from a checkpoint, into the model's and the optimizer's memory, or into new memory.

    A parameter without optimizer state among the `stored` keys has none here either: it was never updated. Nothing asks the
    optimizer for its state, which would count as a step of it. Random numbers go on where as many ranks wrote them.
    """
    wanted = {}
    for name, parameter in held_parameters(model).items():
        wanted[parameter_key(name)] = Piece.of(parameter)
        kinds = [kind for kind in _KINDS if f"{_OPTIMIZER}.{kind}.{name}" in stored]
        if kinds and parameter.requires_grad:
            optimizer.state[parameter] = {kind: _empty(kind, parameter) for kind in kinds}
            wanted |= {f"{_OPTIMIZER}.{kind}.{name}": Piece.of(value) for kind, value in optimizer.state[parameter].items()}
    random = {f"{_RANDOM}.{key}": value for key, value in _random_state(world).items()}
    as_many = f"{_RANDOM}.{world.size - 1}.cpu" in stored and f"{_RANDOM}.{world.size}.cpu" not in stored
    if as_many and all(key in stored for key in random):
        wanted |= {key: Piece.of(value) for key, value in random.items()}
    return wanted


def restore_random(world: World, wanted: Mapping[str, Piece]) -> None:
    """Makes this rank's random numbers those that were read, if any were."""
    if (found := wanted.get(f"{_RANDOM}.{world.rank}.cpu")) is not None:
        torch.set_rng_state(found.part)
    if (found := wanted.get(f"{_RANDOM}.{world.rank}.cuda")) is not None:
        torch.cuda.set_rng_state(found.part, world.device)


def check_parameters(stored: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compares the whole shapes of all parameters, by key in a checkpoint and by name in the model.

    Raises:
        CheckpointError: one is missing, too many, or has another shape.
    """
    there = {key.removeprefix(f"{_MODEL}."): shape for key, shape in stored.items() if key.startswith(f"{_MODEL}.")}
    for name in sorted(there.keys() | shapes.keys()):
        if there.get(name) != shapes.get(name):
            theirs, ours = (f"has shape {found[name]}" if name in found else "is missing" for found in (there, shapes))
            raise CheckpointError(f"it is of another model: {name} {theirs} in it and {ours} in the model")


def _empty(kind: str, parameter: nn.Parameter) -> Tensor:
    if kind == "step":
        return torch.zeros((), dtype=torch.float32, device=parameter.device)
    return torch.zeros_like(parameter, requires_grad=False)


def _random_state(world: World) -> dict[str, Tensor]:
    states = {f"{world.rank}.cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states[f"{world.rank}.cuda"] = torch.cuda.get_rng_state(world.device)
    return states
