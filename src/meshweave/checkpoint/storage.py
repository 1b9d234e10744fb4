"""How do tensors lie in a checkpoint? DCP's planners over safetensors: slices are read without the rest, nothing is unpickled."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from meshweave.checkpoint.disk import require_space, sync, write_durably
from meshweave.checkpoint.manifest import StoredFile, checksum, file_checksum
from meshweave.checkpoint.pieces import Piece
from meshweave.checkpoint.shards import Entry, write_shard
from meshweave.checkpoint.state import parameter_key
from meshweave.errors import CheckpointError, cause

TENSORS = "tensors.json"
"""Which box of which tensor lies in which file."""

_FILE_BYTES = 1 << 30
"""About how long a file gets."""


@dataclass(frozen=True)
class _Stored:
    """Where a box lies."""

    name: str
    file: StoredFile


class SavePieces(DefaultSavePlanner):
    """Plans for a flat mapping of keys to `Piece`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The box that an index means."""
        return _box(self.state_dict, index)


class LoadPieces(DefaultLoadPlanner):
    """As `SavePieces`, for reading into the pieces' memory."""

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Takes the pieces as they are: DCP would look for tensors on the meta device among them."""
        self.flatten_state_dict = False
        self.state_dict, self.original_state_dict = state_dict, state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The box that an index means."""
        return _box(self.state_dict, index)


def _box(pieces: Mapping[str, Piece], index: MetadataIndex) -> Tensor:
    assert index.offset is not None
    return pieces[index.fqn].box(tuple(index.offset))


class Writer(StorageWriter):
    """Writes a rank's boxes into files of its own; the coordinating rank then `closes` the folder.

    Args:
        close: gets every file that all ranks wrote; its last act makes the checkpoint count.
    """

    def __init__(self, folder: Path, rank: int, close: Callable[[dict[str, StoredFile]], None]) -> None:
        self.folder, self.rank, self.close = folder, rank, close

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to do: a writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Makes the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Raises OSError if the disk has no room for all of it: on the coordinating rank, which lets the others know."""
        require_space(self.folder, sum(_bytes(item) for plan in plans for item in plan.items))
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes, durably, file after file."""
        results = []
        for number, items in enumerate(_batches(plan.items)):
            name = f"rank-{self.rank}-{number}.safetensors"
            write_shard(self.folder / name, [_entry(item) for item in items], _boxes(items, planner))
            sync(self.folder / name)
            stored = StoredFile(bytes=(self.folder / name).stat().st_size, xxh3=file_checksum(self.folder / name))
            results += [WriteResult(item.index, _bytes(item), _Stored(name, stored)) for item in items]
        sync(self.folder)
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes what lies where, then closes the folder."""
        where = {result.index: result.storage_data for part in results for result in part}
        tensors = {}
        for key, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            chunks = [
                [list(chunk.offsets), list(chunk.sizes), where[MetadataIndex(key, chunk.offsets)].name] for chunk in tensor.chunks
            ]
            tensors[key] = {
                "dtype": str(tensor.properties.dtype).removeprefix("torch."),
                "shape": list(tensor.size),
                "chunks": chunks,
            }
        listed = json.dumps(tensors).encode()
        write_durably(self.folder / TENSORS, listed)
        files = {stored.name: stored.file for stored in where.values()}
        self.close({TENSORS: StoredFile(bytes=len(listed), xxh3=checksum(listed))} | dict(sorted(files.items())))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Folders of its own choosing only."""
        return False


class Reader(StorageReader):
    """Reads, of a checkpoint, what a plan asks for. State: bytes of tensors read so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._files: dict[MetadataIndex, str] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to do: a reader reads one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Which tensors there are, and in which boxes.

        Raises:
            CheckpointError: not readable.
        """
        file = self.folder / TENSORS
        try:
            listed = json.loads(file.read_bytes())
            self._files = {
                MetadataIndex(key, torch.Size(offsets)): name
                for key, tensor in listed.items()
                for offsets, _, name in tensor["chunks"]
            }
            return Metadata({key: _tensor_metadata(tensor) for key, tensor in listed.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file}: not readable ({cause(error)})") from error

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads file by file, and of each box only the slices that are wanted."""

        def file_of(item: ReadItem) -> str:
            return self._files[item.storage_index]

        for name, items in groupby(sorted(plan.items, key=file_of), key=file_of):
            try:
                with safe_open(self.folder / name, framework="pt") as stored:
                    for item in items:
                        self._read(stored, item, planner)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.folder / name}: not readable as safetensors ({cause(error)})") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def box(self, index: MetadataIndex) -> Tensor:
        """One box, whole.

        Raises:
            CheckpointError: not readable.
        """
        file = self.folder / self._files[index]
        try:
            with safe_open(file, framework="pt") as stored:
                return stored.get_tensor(_key(index))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not readable as safetensors ({cause(error)})") from error

    def _read(self, stored: Any, item: ReadItem, planner: LoadPlanner) -> None:
        key = _key(item.storage_index)
        if item.lengths:
            slices = tuple(slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True))
            found = stored.get_slice(key)[slices]
        else:
            found = stored.get_tensor(key)
        self.bytes_read += found.nbytes
        planner.resolve_tensor(item).copy_(found)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Folders of its own choosing only."""
        return False


def whole_parameters(folder: Path) -> Callable[[str], Tensor | None]:
    """Reads parameters of a checkpoint whole, one at a time, in this process alone; None for what it does not hold."""
    reader = Reader(folder)
    tensors = reader.read_metadata().state_dict_metadata

    def read(name: str) -> Tensor | None:
        key = parameter_key(name)
        if key not in tensors:
            return None
        tensor = tensors[key]
        assert isinstance(tensor, TensorStorageMetadata)
        value = torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for chunk in tensor.chunks:
            place = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
            value[place] = reader.box(MetadataIndex(key, chunk.offsets))
        return value

    return read


def _tensor_metadata(tensor: Mapping[str, Any]) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        TensorProperties(dtype=getattr(torch, tensor["dtype"])),
        torch.Size(tensor["shape"]),
        [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes, _ in tensor["chunks"]],
    )


def _key(index: MetadataIndex) -> str:
    assert index.offset is not None
    return f"{index.fqn}@{','.join(map(str, index.offset))}"


def _bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _entry(item: WriteItem) -> Entry:
    assert item.tensor_data is not None
    return Entry(_key(item.index), item.tensor_data.properties.dtype, tuple(item.tensor_data.chunk.sizes))


def _boxes(items: list[WriteItem], planner: SavePlanner) -> Iterator[tuple[str, Tensor]]:
    for item in items:
        box = planner.resolve_data(item)
        assert isinstance(box, Tensor)
        yield _key(item.index), box.cpu()


def _batches(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    batch: list[WriteItem] = []
    filled = 0
    for item in items:
        if batch and filled + _bytes(item) > _FILE_BYTES:
            yield batch
            batch, filled = [], 0
        batch.append(item)
        filled += _bytes(item)
    if batch:
        yield batch
