"""How is one parameter read from safetensors, slice by slice, where the file holds it otherwise than the model does?

Each class here looks like a slice of safetensors: a shape, and an index that reads no more than was asked for.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

from meshweave.errors import CheckpointError

Place = tuple[Path, str]
"""A file, and a key in it."""

Open = Callable[[Place], Any]
"""To a slice of the tensor at a place."""


@dataclass(frozen=True)
class OneByOne:
    """Experts stored matrix by matrix, of which the model makes one parameter `[experts, pieces · rows, columns]`."""

    pieces: tuple[Mapping[int, Place], ...]
    """Piece (a gate, a projection up) to expert to its matrix."""

    def opened(self, open_place: Open, shape: tuple[int, ...]) -> "_Stacked":
        """Raises CheckpointError: an expert is missing, or a matrix has another shape than the model's."""
        experts = range(shape[0])
        first = next(iter(self.pieces[0].values()))
        for number, piece in enumerate(self.pieces):
            lost = sorted(set(experts) - set(piece))
            if lost or len(piece) > len(experts):
                raise CheckpointError(
                    f"{first[0]}: of the {shape[0]} experts around {first[1]}, piece {number} is there for {len(piece)}, "
                    f"{'without number ' + str(lost[0]) if lost else 'which is too many'}"
                )
        return _Stacked([[open_place(piece[expert]) for piece in self.pieces] for expert in experts])

    def places(self) -> list[Place]:
        """Every matrix."""
        return [place for piece in self.pieces for place in piece.values()]


@dataclass(frozen=True)
class Turned:
    """A parameter of three dims, stored with the last two exchanged, unless the stored shape is the model's already."""

    place: Place

    def opened(self, open_place: Open, shape: tuple[int, ...]) -> Any:
        """A slice in the model's order of dims."""
        found = open_place(self.place)
        return found if tuple(found.get_shape()) == shape else _Transposed(found)

    def places(self) -> list[Place]:
        """The one tensor."""
        return [self.place]


Converted = OneByOne | Turned

_MERGED = (MergeModulelist, {"dim": 0})
_ONE_BY_ONE = ([_MERGED], [_MERGED, (Concatenate, {"dim": 1, "num_shards_attribute": None})])
_TURNED = [(Transpose, {"dim0": 1, "dim1": 2, "check_dims": True})]
"""What transformers does to the two forms above: classes of its steps, and their options."""


def converted(converters: Sequence[WeightConverter], found: Mapping[str, list[tuple[str, Place]]]) -> dict[str, Converted]:
    """Parameter name to how it is read, for those that a checkpoint stores in another form.

    Args:
        converters: transformers' own, for the model.
        found: parameter name to (source pattern of the converter, place) of each of its tensors.

    Raises:
        CheckpointError: a conversion of another kind.
    """
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    made: dict[str, Converted] = {}
    for name, parts in found.items():
        (_, (file, key)), converter = parts[0], by_pattern[parts[0][0]]
        steps = [(type(operation), vars(operation)) for operation in converter.operations]
        if steps in _ONE_BY_ONE:
            pieces: list[dict[int, Place]] = [{} for _ in converter.source_patterns]
            for pattern, place in parts:
                number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), place[1])
                if number is None:
                    raise CheckpointError(f"{file}: {place[1]} names no expert, though it is one of {name}")
                pieces[converter.source_patterns.index(pattern)][int(number[1])] = place
            made[name] = OneByOne(tuple(pieces))
        elif steps == _TURNED:
            made[name] = Turned((file, key))
        else:
            names = ", ".join(kind.__name__ for kind, _ in steps)
            raise CheckpointError(
                f"{file}: {key} needs a conversion that is not built yet ({names}); save the model anew in its own form"
            )
    return made


class _Stacked:
    """State: none; `matrices[expert][piece]` are slices `[rows, columns]`."""

    def __init__(self, matrices: Sequence[Sequence[Any]]) -> None:
        self.matrices = matrices

    def get_shape(self) -> list[int]:
        """Of the whole parameter; a matrix of another shape than the first makes it one that fits no model."""
        rows = [sum(piece.get_shape()[0] for piece in expert) for expert in self.matrices]
        columns = {piece.get_shape()[1] for expert in self.matrices for piece in expert}
        return [len(self.matrices), *sorted(set(rows)), *sorted(columns)]

    def __getitem__(self, index: Any) -> Tensor:
        _, length, _ = self.get_shape()
        experts, rows, columns = index if isinstance(index, tuple) else (slice(None),) * 3
        first, last, _ = rows.indices(length)
        read = []
        for expert in self.matrices[experts]:
            parts, start = [], 0
            for piece in expert:
                stop = start + piece.get_shape()[0]
                if max(first, start) < min(last, stop):
                    parts.append(piece[max(first, start) - start : min(last, stop) - start, columns])
                start = stop
            read.append(torch.cat(parts))
        return torch.stack(read)


class _Transposed:
    """State: none."""

    def __init__(self, stored: Any) -> None:
        self.stored = stored

    def get_shape(self) -> list[int]:
        """In the model's order of dims."""
        first, second, third = self.stored.get_shape()
        return [first, third, second]

    def __getitem__(self, index: Any) -> Tensor:
        first, second, third = index if isinstance(index, tuple) else (slice(None),) * 3
        found: Tensor = self.stored[first, third, second]
        return found.transpose(1, 2)
