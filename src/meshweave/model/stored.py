"""In which forms does a file hold a parameter? Each is read slice by slice, and taken apart again as it was.

What is opened here looks like a slice of safetensors: a shape, and an index that reads no more than was asked for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, Transpose

from meshweave.errors import CheckpointError

Open = Callable[[str], Any]
"""Key to a slice of its tensor."""


@dataclass(frozen=True)
class AsIs:
    """One tensor, as the model holds it."""

    key: str

    @property
    def keys(self) -> list[str]:
        """Of the tensors it is stored as."""
        return [self.key]

    def opened(self, open_key: Open, shape: tuple[int, ...]) -> Any:
        """A slice of the parameter, whose shape is to be `shape`."""
        return open_key(self.key)

    def apart(self, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Key and tensor of what the whole parameter is stored as."""
        yield self.key, value


@dataclass(frozen=True)
class Turned:
    """One tensor of three dims, the last two exchanged."""

    key: str

    @property
    def keys(self) -> list[str]:
        """Of the tensors it is stored as."""
        return [self.key]

    def opened(self, open_key: Open, shape: tuple[int, ...]) -> Any:
        """A slice in the model's order of dims."""
        return _Transposed(open_key(self.key))

    def apart(self, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Key and tensor of what the whole parameter is stored as."""
        yield self.key, value.transpose(1, 2)


@dataclass(frozen=True)
class OneByOne:
    """Experts stored matrix by matrix, of which the model makes one parameter `[experts, pieces · rows, columns]`."""

    pieces: tuple[Mapping[int, str], ...]
    """Piece (a gate, a projection up) to expert to its matrix."""

    @property
    def keys(self) -> list[str]:
        """Of every matrix."""
        return [key for piece in self.pieces for key in piece.values()]

    def opened(self, open_key: Open, shape: tuple[int, ...]) -> "_Stacked":
        """Raises CheckpointError: an expert is missing, or a matrix has another shape than the model's."""
        experts = range(shape[0])
        for number, piece in enumerate(self.pieces):
            lost = sorted(set(experts) - set(piece))
            if lost or len(piece) > len(experts):
                raise CheckpointError(
                    f"of the {shape[0]} experts around {self.keys[0]}, piece {number} is there for {len(piece)}, "
                    f"{'without number ' + str(lost[0]) if lost else 'which is too many'}"
                )
        return _Stacked([[open_key(piece[expert]) for piece in self.pieces] for expert in experts])

    def apart(self, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Key and tensor of what the whole parameter is stored as."""
        for number, piece in enumerate(self.pieces):
            for expert, key in piece.items():
                yield key, value[expert].chunk(len(self.pieces))[number]


Form = AsIs | Turned | OneByOne

_MERGED = (MergeModulelist, {"dim": 0})
_ONE_BY_ONE = ([_MERGED], [_MERGED, (Concatenate, {"dim": 1, "num_shards_attribute": None})])
_TURNED = [(Transpose, {"dim0": 1, "dim1": 2, "check_dims": True})]
"""What transformers does to the two latter forms: classes of its steps, and their options."""


def kind_of(steps: Sequence[ConversionOps]) -> type[Turned] | type[OneByOne] | None:
    """The form that these steps of transformers make a parameter of; None where it is another one."""
    known = [(type(step), vars(step)) for step in steps]
    return OneByOne if known in _ONE_BY_ONE else Turned if known == _TURNED else None


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
