"""What does a model folder that leaves consist of, and how does it come to be there whole or not at all?

It is like the folder that the run started from: the same keys, turned and tied the same way, of the same dtypes, and the same
other files. Values come one parameter at a time, from whoever has them.
"""

import errno
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from meshweave.checkpoint.disk import sync
from meshweave.checkpoint.shards import DTYPES, Entry, write_shard
from meshweave.errors import CheckpointError
from meshweave.model.blueprint import blueprint_of
from meshweave.model.names import published_forms, stored_model
from meshweave.model.stored import Form
from meshweave.model.weights import fill_seeded

SHARD_BYTES = 5_000_000_000
"""Largest size of a safetensors file, as transformers chooses it; a larger parameter has a file of its own."""

PARTIAL = ".partial"
"""Ends the name of a folder that is being written; one that was killed leaves it behind."""

ReadValue = Callable[[str], Tensor | None]
"""Full name of a parameter to its whole value on the CPU, or None if it leaves as it came."""

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz"}
"""Endings of files that hold weights, which training has changed."""
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


@dataclass(frozen=True)
class Unit:
    """What is written together: all that holds one parameter, or one tensor."""

    name: str | None
    """Of the parameter or buffer; None for a tensor that the model has no name for."""
    forms: tuple[Form, ...]
    """How it is stored: once, or also under another name that it is tied to."""
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(entry.size for entry in self.entries)


Kept = Callable[[Unit], Iterator[tuple[str, Tensor]]]
"""Unit to the keys and tensors of it as the model had them at the start."""


@dataclass(frozen=True)
class FolderPlan:
    """A folder that is to be written."""

    shards: Mapping[str, tuple[Unit, ...]]
    """Name of a safetensors file to what it holds."""
    texts: Mapping[str, str]
    """Other files that are new."""
    source: Path
    copies: tuple[Path, ...]
    """Files that are taken over from `source`, by their path in it."""
    kept: Kept
    """Gives what leaves as it came."""

    @property
    def names(self) -> list[str]:
        """What will be read, in this order."""
        return [unit.name for units in self.shards.values() for unit in units if unit.name is not None]

    @property
    def size(self) -> int:
        """In bytes, without the headers."""
        return sum(unit.size for units in self.shards.values() for unit in units) + sum(
            (self.source / file).stat().st_size for file in self.copies
        )


def plan_folder(
    source: Path,
    config: PreTrainedConfig,
    *,
    seed: int | None = None,
    seeded_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> FolderPlan:
    """How a model that started from the folder `source`, whose config is `config`, is written.

    Args:
        seed: of the weights that the model started from; None if they are those in `source`. A seeded model leaves under the
            keys of the published models of its family.
        seeded_dtype: of a seeded model's tensors, if its config names none.
        dtype: of all floating-point tensors, in place of those of `source`.
        shard_bytes: largest size of a safetensors file.

    Raises:
        CheckpointError: what `source` holds does not fit the model.
    """
    blueprint = blueprint_of(config, seeded_dtype)
    if seed is None:
        units, kept = _stored_units(blueprint, source)
    else:
        units, kept = _seeded_units(blueprint, seed)
        named: Any = config.dtype or config.get_text_config().dtype
        dtype = dtype or named or seeded_dtype
    if dtype is not None:
        units = [Unit(unit.name, unit.forms, tuple(_cast(entry, dtype) for entry in unit.entries)) for unit in units]
    shards = _packed(units, shard_bytes)
    texts = {}
    if len(shards) > 1:
        keys = {entry.key: name for name, held in shards.items() for unit in held for entry in unit.entries}
        total = {"total_size": sum(unit.size for unit in units)}
        texts["model.safetensors.index.json"] = _json({"metadata": total, "weight_map": dict(sorted(keys.items()))})
    if dtype is not None:
        tree = _with_dtype(json.loads((source / "config.json").read_text()), str(dtype).removeprefix("torch."))
        texts["config.json"] = _json(tree if seed is None else _described(tree, blueprint))
    return FolderPlan(shards, texts, source, tuple(_others(source, texts)), kept)


def write_folder(plan: FolderPlan, read: ReadValue, folder: Path, *, replace: bool = False) -> None:
    """Writes a folder, beside its place and into it when everything is on the disk.

    `read` is asked for `plan.names`, in that order, one at a time; no more than one value is held. With `replace`, a folder that
    is there already is so until then.

    Raises:
        CheckpointError: there is a folder already, the disk is full, or another fault of a disk; then nothing is left behind.
    """
    partial, earlier = (folder.with_name(f"{folder.name}{end}") for end in (PARTIAL, ".earlier"))
    try:
        if not replace and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder}: is there already; name another folder, or take it away")
        # What a run that was killed left behind.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < plan.size:
            raise CheckpointError(
                f"{folder}: the model takes {_gigabytes(plan.size)} and the disk has {_gigabytes(free)} free; make room, or name "
                "a folder on another disk"
            )
        for file, units in plan.shards.items():
            entries = [entry for unit in units for entry in unit.entries]
            write_shard(partial / file, entries, chain.from_iterable(_tensors(plan, unit, read) for unit in units))
        for name, text in plan.texts.items():
            (partial / name).write_text(text)
        for place in plan.copies:
            (partial / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(plan.source / place, partial / place)
        for path in (*partial.rglob("*"), partial):
            sync(path)
        if folder.exists():
            shutil.rmtree(earlier, ignore_errors=True)
            folder.rename(earlier)
        partial.rename(folder)
        shutil.rmtree(earlier, ignore_errors=True)
        sync(folder.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"{folder}: the disk is full ({error.strerror}); make room for {_gigabytes(plan.size)}, or name a folder on "
                "another disk"
            ) from error
        raise CheckpointError(f"{folder}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _stored_units(blueprint: PreTrainedModel, source: Path) -> tuple[list[Unit], Kept]:
    stored = stored_model(blueprint, source)
    tensors = stored.tensors

    def entry(key: str) -> Entry:
        if tensors.dtypes[key] not in DTYPES:
            raise CheckpointError(f"{tensors.files[key]}: {key} is of a dtype that is not known here ({tensors.dtypes[key]})")
        return Entry(key, DTYPES[tensors.dtypes[key]], tensors.shapes[key])

    def kept(unit: Unit) -> Iterator[tuple[str, Tensor]]:
        for key in (entry.key for entry in unit.entries):
            try:
                with safe_open(tensors.files[key], framework="pt") as file:
                    yield key, file.get_tensor(key)
            except SafetensorError as error:
                raise CheckpointError(f"{tensors.files[key]}: {key} is not readable ({error})") from error

    together: dict[str, list[Form]] = {}
    for name, form in stored.forms.items():
        together.setdefault(stored.first.get(name, name), []).append(form)
    units = [
        Unit(name, tuple(forms), tuple(entry(key) for form in forms for key in form.keys)) for name, forms in together.items()
    ]
    named = {entry.key for unit in units for entry in unit.entries}
    units += [Unit(None, (), (entry(key),)) for key in tensors.files if key not in named]
    return units, kept


def _seeded_units(blueprint: PreTrainedModel, seed: int) -> tuple[list[Unit], Kept]:
    values = blueprint.state_dict()

    def kept(unit: Unit) -> Iterator[tuple[str, Tensor]]:
        assert unit.name is not None
        value = torch.empty_like(values[unit.name], device="cpu")
        fill_seeded({unit.name: value}, blueprint, seed)
        return chain.from_iterable(form.apart(value) for form in unit.forms)

    units = []
    for name, form in published_forms(blueprint).items():
        entries = [Entry(key, piece.dtype, tuple(piece.shape)) for key, piece in form.apart(values[name])]
        units.append(Unit(name, (form,), tuple(entries)))
    return units, kept


def _tensors(plan: FolderPlan, unit: Unit, read: ReadValue) -> Iterable[tuple[str, Tensor]]:
    value = read(unit.name) if unit.name is not None else None
    if value is None:
        return plan.kept(unit)
    return chain.from_iterable(form.apart(value) for form in unit.forms)


def _cast(entry: Entry, dtype: torch.dtype) -> Entry:
    return Entry(entry.key, dtype if entry.dtype in _FLOATS else entry.dtype, entry.shape)


def _packed(units: Sequence[Unit], limit: int) -> dict[str, tuple[Unit, ...]]:
    files: list[list[Unit]] = [[]]
    filled = 0
    for unit in units:
        if files[-1] and filled + unit.size > limit:
            files.append([])
            filled = 0
        files[-1].append(unit)
        filled += unit.size
    if len(files) == 1:
        return {"model.safetensors": tuple(files[0])}
    return {f"model-{number:05}-of-{len(files):05}.safetensors": tuple(held) for number, held in enumerate(files, 1)}


def _with_dtype(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """A config.json that names another dtype, at the top and wherever else it names one."""

    def changed(level: dict[str, Any]) -> dict[str, Any]:
        inner = {key: changed(value) for key, value in level.items() if key.endswith("_config") and isinstance(value, dict)}
        return level | {key: name for key in ("dtype", "torch_dtype") if key in level} | inner

    kept = {key: tree[key] for key in ("quantization_config",) if key in tree}
    return changed(tree if "torch_dtype" in tree else tree | {"dtype": name}) | kept


def _described(tree: dict[str, Any], blueprint: PreTrainedModel) -> dict[str, Any]:
    """A config.json that also says what readers want to know of a published model: its class, and on both levels, of which
    transformers 4 and 5 look at different ones, whether its embeddings are tied."""
    head = blueprint.get_output_embeddings()
    tied = {"tie_word_embeddings": head is not None and head.weight is blueprint.get_input_embeddings().weight}
    text = {"text_config": tree["text_config"] | tied} if "text_config" in tree else {}
    return tree | tied | text | {"architectures": tree.get("architectures") or [type(blueprint).__name__]}


def _others(source: Path, written: Iterable[str]) -> Iterator[Path]:
    """Tokenizer, processor and template files, licence, code: whatever else the input folder holds, as it is."""
    for file in sorted(source.rglob("*")):
        place = file.relative_to(source)
        hidden = any(part.startswith(".") for part in place.parts)
        weights = file.suffix in _WEIGHTS or file.name.endswith(".index.json")
        if file.is_file() and not hidden and not weights and str(place) not in written:
            yield place


def _json(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
