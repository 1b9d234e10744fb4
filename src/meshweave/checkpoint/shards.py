"""How do tensors come into a safetensors file one at a time? Its header first, then each to its place."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors calls the dtypes."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * self.dtype.itemsize


def write_shard(file: Path, entries: Sequence[Entry], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes the tensors as they come, in any order, as the dtypes that `entries` say; no more than one is held.

    Raises:
        OSError: the disk is full, or another fault of it.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    # Widest first: every tensor then lies at a multiple of its element, which readers rely on.
    places: dict[str, tuple[int, Entry]] = {}
    for entry in sorted(entries, key=lambda entry: -entry.dtype.itemsize):
        places[entry.key] = (place, entry)
        header[entry.key] = {
            "dtype": NAMES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [place, place + entry.size],
        }
        place += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for key, tensor in tensors:
            offset, entry = places.pop(key)
            if tuple(tensor.shape) != entry.shape:
                raise ValueError(f"{key} has shape {tuple(tensor.shape)}, not {entry.shape}")
            out.seek(8 + len(text) + offset)
            out.write(tensor.to(entry.dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
            # Else it would still be here while the next one comes.
            del tensor
        if places:
            raise ValueError(f"{file}: no tensor came for {next(iter(places))}")
