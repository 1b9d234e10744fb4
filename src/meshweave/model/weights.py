"""Where do parameters come from? Seeded initialisation identical under every layout, or streamed safetensors."""

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed.sharding_utils import DtensorShardOperation

from meshweave.errors import CheckpointError
from meshweave.model.names import StoredModel, Tensors, stored_model

_ROWS = 4096
"""Of a matrix, read at a time."""

Read = Callable[[Tensor], Tensor]
"""Given a target, returns the values of its local part."""


def materialise(module: nn.Module, device: torch.device) -> None:
    """Replaces meta parameters and buffers by empty ones on `device`, keeping tied parameters tied."""
    made: dict[int, Any] = {}
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, value in table.items():
                if value is None or not value.is_meta:
                    continue
                if id(value) not in made:
                    empty: Tensor = torch.empty_like(value, device=device)
                    made[id(value)] = (
                        nn.Parameter(empty, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else empty
                    )
                table[name] = made[id(value)]
    # FSDP notices new parameters when its module is moved, even to where it already is.
    module.to(device)


def fill_seeded(targets: Mapping[str, Tensor], blueprint: PreTrainedModel, seed: int) -> None:
    """Fills parameters and buffers as transformers would initialise them, unit by unit, each from its own seed.

    A unit is a transformer block or another part without blocks. Its seed follows from `seed` and its name, so every
    parameter has the same value under every layout, and no more than one unit is ever whole in memory.

    Args:
        targets: full name to (sharded, materialised) parameter or buffer; a tied one under its first name.
        blueprint: the whole model on the meta device, not sharded.
    """
    for name, unit in _units(blueprint, ""):
        if any(key.startswith(f"{name}.") for key in targets):
            for key, value in _initialised(blueprint, unit, name, seed).items():
                if key in targets:
                    _fill(targets[key], partial(local_part, full=value))


def fill_pretrained(targets: Mapping[str, Tensor], blueprint: PreTrainedModel, folder: Path) -> None:
    """Fills parameters, and buffers that are stored, from a model folder's safetensors, reading only this rank's slices; other
    buffers as transformers builds them.

    Arguments as for `fill_seeded`.

    Raises:
        CheckpointError: as `stored_model`; a parameter is missing, or has another shape.
    """
    stored = stored_model(blueprint, folder)
    for name, unit in _units(blueprint, ""):
        if not any(key.startswith(f"{name}.") for key in targets):
            continue
        for key, value in _initialised(blueprint, unit, name, None).items():
            if key in targets:
                _fill(targets[key], partial(local_part, full=value))
    buffers = [(key, buffer) for key, buffer in blueprint.named_buffers() if key in stored.forms]
    for key, value in (*blueprint.named_parameters(), *buffers):
        if key in targets:
            _fill(targets[key], _reader(stored, key, tuple(value.shape)))


def check_weights(blueprint: PreTrainedModel, folder: Path) -> None:
    """Checks names and shapes of a model folder's safetensors against the model, reading headers only, and that tensors which the
    config ties are the same where the folder holds both.

    Raises:
        CheckpointError: as `fill_pretrained`; tied tensors differ.
    """
    stored = stored_model(blueprint, folder)
    for key, parameter in blueprint.named_parameters():
        with _Files(stored.tensors) as files:
            _opened(files, stored, key, tuple(parameter.shape))
    for key, first in stored.first.items():
        if key != first and {key, first} <= stored.forms.keys() and not _same(stored, key, first):
            raise CheckpointError(
                f"{folder}: its config.json ties {key} to {first}, but the two differ in its safetensors; set "
                "tie_word_embeddings: false there"
            )


def _same(stored: StoredModel, *names: str) -> bool:
    """Whether two tensors that lie as the model holds them are the same, some rows at a time."""
    with _Files(stored.tensors) as files:
        one, other = (files.slice_of(stored.forms[name].keys[0]) for name in names)
        rows = range(0, one.get_shape()[0], _ROWS)
        return one.get_shape() == other.get_shape() and all(
            torch.equal(one[row : row + _ROWS], other[row : row + _ROWS]) for row in rows
        )


def local_part(target: Tensor, full: Any) -> Tensor:
    """This rank's part of `full` (a tensor or a safetensors slice), for a target sharded in any way."""
    if isinstance(target, DTensor):
        part = DtensorShardOperation(target).shard_tensor(full)
        assert part is not None
        return part
    return full[...]


@torch.no_grad()
def _fill(target: Tensor, read: Read) -> None:
    local = target.to_local() if isinstance(target, DTensor) else target
    if local.numel():
        local.copy_(read(target))


def _units(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The largest parts without a ModuleList, the elements of ModuleLists, and what else owns a parameter or a buffer."""
    if not any(isinstance(part, nn.ModuleList) for part in module.modules()):
        yield name, module
        return
    if module._parameters or module._buffers:
        # What it owns beside its blocks.
        alone = copy.copy(module)
        alone._modules = {}
        yield name, alone
    for key, child in module.named_children():
        if isinstance(module, nn.ModuleList):
            yield f"{name}.{key}", child
        else:
            yield from _units(child, f"{name}.{key}".lstrip("."))


def _initialised(blueprint: PreTrainedModel, unit: nn.Module, name: str, seed: int | None) -> dict[str, Tensor]:
    """Full values of the unit's parameters and buffers, by full name; of its buffers only, where `seed` is None."""
    real = copy.deepcopy(unit).to_empty(device="cpu")
    for buffer in real.buffers():
        buffer.fill_(float("nan") if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min)
    for parameter in real.parameters():
        # transformers' initialisers skip what carries this mark.
        parameter._is_hf_initialized = seed is None  # type: ignore[attr-defined]
    owner = _owner(blueprint, name)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        # Children first, as transformers does: a block may overwrite what its layers chose.
        for part in reversed(list(real.modules())):
            owner._init_weights(part)
    for key, buffer in real.named_buffers():
        unset = buffer.isnan() if buffer.is_floating_point() else buffer == torch.iinfo(buffer.dtype).min
        if unset.any():
            raise CheckpointError(f"{name}.{key}: transformers does not say how to rebuild this buffer")
    named = (
        real.named_buffers(prefix=name)
        if seed is None
        else [*real.named_parameters(prefix=name), *real.named_buffers(prefix=name)]
    )
    return {key: value.detach() for key, value in named}


def _owner(blueprint: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost transformers model around a sub-module: it knows how to initialise it."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        candidate = blueprint.get_submodule(".".join(parts[:depth]))
        if isinstance(candidate, PreTrainedModel):
            return candidate
    return blueprint


class _Files(ExitStack):
    """Files that are open until it is left. State: their handles."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.tensors = tensors
        self.handles: dict[Path, Any] = {}

    def slice_of(self, key: str) -> Any:
        """A slice of safetensors, of which nothing is read yet."""
        file = self.tensors.files[key]
        if file not in self.handles:
            self.handles[file] = self.enter_context(safe_open(file, framework="pt"))
        return self.handles[file].get_slice(key)


def _opened(files: _Files, stored: StoredModel, name: str, shape: tuple[int, ...]) -> Any:
    """A slice of the whole parameter."""
    form = stored.form_of(name, shape)
    file = stored.tensors.files[form.keys[0]]
    try:
        found = form.opened(files.slice_of, shape)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if tuple(found.get_shape()) != shape:
        raise CheckpointError(f"{file}: {form.keys[0]} has shape {tuple(found.get_shape())}, the model's config says {shape}")
    return found


def _reader(stored: StoredModel, name: str, shape: tuple[int, ...]) -> Read:
    def read(target: Tensor) -> Tensor:
        with _Files(stored.tensors) as files:
            return local_part(target, _opened(files, stored, name, shape))

    return read
