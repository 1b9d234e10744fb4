"""How does one stage of a module run inside the stock model? In a shallow copy in which the sub-modules of other stages are
replaced by stand-ins.

The copy runs the model's own forward on every stage, so indices of blocks, masks and position ids are those of the whole model.
Stand-ins for earlier sub-modules return what the stage received; the stand-in for the first later block ends the forward.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from meshweave.model.modules import ModelGraph
from meshweave.model.parts import parts_of


class Cut(Exception):  # noqa: N818 - no error: how a forward ends early
    """Ends the forward of a stage that is not the last."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__("the forward of a stage ended")
        self.hidden = hidden


@dataclass
class Wire:
    """What crosses the ends of a stage, in the forward that is running."""

    received: tuple[Tensor, ...] = ()
    """The hidden state, then the features that earlier stages made."""
    made: list[Tensor] = field(default_factory=list)
    """The features that this stage made so far."""


def stage_model(graph: ModelGraph, name: str, blocks: range, wire: Wire) -> PreTrainedModel:
    """The model as one stage of one module sees it: the stage's own sub-modules of the module, and stand-ins for its others.

    What the stage holds is shared with `graph.model`, which stays as it is. A stage of all blocks is `graph.model` itself.

    Raises:
        LayoutError: it is not known where the module may be cut.
    """
    if len(blocks) == len(graph.blocks(name)):
        return graph.model
    parts = parts_of(graph, name)
    owners = parts.owners()

    def absent(path: str, forward: Callable[..., Any]) -> None:
        if owners[path] not in blocks:
            replaced[path] = _stand_in(graph.model.get_submodule(path), forward)

    replaced: dict[str, nn.Module] = {}
    for path in parts.before:
        # Detached: what the model computes from it in passing is not used, only the stand-ins for blocks return it for good.
        absent(path, lambda *_, **__: wire.received[0].detach())
    for path in parts.added:
        absent(path, lambda *_, **__: wire.received[0].new_zeros(()))
    for path in parts.shaped:
        absent(path, _shape_of(graph.model.get_submodule(path)))
    for number, path in enumerate(parts.blocks):
        absent(path, _end if number >= blocks.stop else (lambda *_, **__: wire.received if parts.tupled else wire.received[0]))
    for number, path in enumerate(parts.taps):
        absent(path, lambda *_, number=number, **__: wire.received[1 + number])
        if path not in replaced:
            replaced[path] = _recorded(graph.model.get_submodule(path), wire)
    for path in parts.after:
        absent(path, _end)
    return _with(graph.model, replaced)


def _end(hidden: Tensor, *_: Any, **__: Any) -> None:
    raise Cut(hidden)


def _shape_of(module: nn.Module) -> Callable[..., Tensor]:
    """Zeros of the shape that a module's output would have."""
    shapes = copy.deepcopy(module).to("meta")
    dtype = next(shapes.parameters()).dtype
    return lambda given, *_, **__: given.new_zeros(shapes(given.to(device="meta", dtype=dtype)).shape)


def _stand_in(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """A module of the same class, so that transformers counts its hidden states as before, without parameters."""
    found = _shallow(module)
    found._modules = {}
    found._parameters, found._buffers = dict.fromkeys(module._parameters), dict.fromkeys(module._buffers)
    if (weight := module._parameters.get("weight")) is not None:
        # Some models ask for its dtype, or add it themselves.
        del found._parameters["weight"]
        found.weight = torch.zeros((), dtype=weight.dtype)
    found.forward = forward  # type: ignore[method-assign]
    return found


def _recorded(module: nn.Module, wire: Wire) -> nn.Module:
    """The same module, whose outputs also go onto the wire."""
    found = _shallow(module)

    def record(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        wire.made.append(output)

    found.register_forward_hook(record)
    return found


def _with(model: PreTrainedModel, replaced: Mapping[str, nn.Module]) -> PreTrainedModel:
    """A copy with other sub-modules at some full names; whatever does not contain one of them is shared."""
    found = _shallow(model)
    copied: dict[str, nn.Module] = {"": found}
    for path, module in replaced.items():
        parent = ""
        *holders, last = path.split(".")
        for key in holders:
            inner = f"{parent}.{key}".lstrip(".")
            if inner not in copied:
                copied[inner] = copied[parent]._modules[key] = _shallow(copied[parent].get_submodule(key))
            parent = inner
        copied[parent]._modules[last] = module
    assert isinstance(found, PreTrainedModel)
    return found


def _shallow(module: nn.Module) -> nn.Module:
    """A copy that shares children, parameters and buffers, and may be given others and hooks of its own."""
    found = copy.copy(module)
    found._modules = dict(module._modules)
    found._forward_hooks = module._forward_hooks.copy()
    return found
