"""Under which keys, and in which form, does a model folder hold each parameter?

transformers' own conversion mappings say how keys of published files become names of its models. Here they are read forwards, for
what a folder holds, and backwards, for what the files of a family that was published would hold.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_converters,
    apply_renamings,
    rename_source_key,
)

from meshweave.errors import CheckpointError, cause
from meshweave.model.modules import first_names
from meshweave.model.stored import AsIs, Form, OneByOne, Turned, kind_of


@dataclass(frozen=True)
class Tensors:
    """The safetensors of a model folder, by their headers."""

    folder: Path
    files: Mapping[str, Path]
    """Key to the file that holds it."""
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    """Key to dtype, in the words of safetensors ("BF16")."""


@dataclass(frozen=True)
class StoredModel:
    """Where and how a model folder holds the parameters and buffers of a model."""

    tensors: Tensors
    forms: Mapping[str, Form]
    """Name of a parameter or stored buffer to how it is stored. A tied parameter has an entry for each of its names that has a
    tensor of its own."""
    first: Mapping[str, str]
    """Every name of every parameter to its first name: only tied ones have several."""

    def form_of(self, name: str, shape: tuple[int, ...]) -> Form:
        """How the parameter of this first name is stored. Raises CheckpointError: it is not."""
        if name in self.forms:
            return self.forms[name]
        for alias, first in self.first.items():
            if first == name and alias in self.forms:
                return self.forms[alias]
        raise CheckpointError(f"{self.tensors.folder}: no tensor for {name} (shape {shape}) in its safetensors")


def read_headers(folder: Path) -> Tensors:
    """Keys, shapes and dtypes of the safetensors that are a folder's model, as transformers chooses them.

    Raises:
        CheckpointError: there are none, or one is missing or broken.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        files = [single]
    elif index.exists():
        try:
            files = sorted({folder / file for file in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index}: not readable as an index of safetensors ({cause(error)})") from error
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no *.safetensors file; use `weights: seeded` to start from random weights")
    found: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{file}: named in {index.name}, but missing")
        try:
            with safe_open(file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118 - no mapping
                    header = handle.get_slice(key)
                    found[key], shapes[key], dtypes[key] = file, tuple(header.get_shape()), header.get_dtype()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not readable as safetensors ({error})") from error
    return Tensors(folder, found, shapes, dtypes)


def stored_model(blueprint: PreTrainedModel, folder: Path) -> StoredModel:
    """What a folder's safetensors hold of a model, reading headers only. Keys that the model has no name for are in no form.

    Raises:
        CheckpointError: as `read_headers`; two keys are of one name; a form is not one of `model/stored.py`; or it cannot be told
            whether experts are stored turned.
    """
    tensors = read_headers(folder)
    renaming = _Renaming(blueprint)
    forms: dict[str, Form] = {}
    parts: dict[str, list[tuple[str, str]]] = {}
    for key in tensors.files:
        name, pattern = renaming.of(key)
        if name not in renaming.expected:
            continue
        if pattern is not None:
            parts.setdefault(name, []).append((pattern, key))
            continue
        if name in forms:
            raise _doubled(folder, name, forms[name].keys[0], key)
        forms[name] = AsIs(key)
    turned: dict[str, str] = {}
    for name, keys in parts.items():
        (pattern, key), *others = keys
        converter = renaming.converters[pattern]
        kind = kind_of(converter.operations)
        if name in forms:
            raise _doubled(folder, name, forms[name].keys[0], key)
        if kind is OneByOne:
            forms[name] = _one_by_one(converter, keys)
        elif kind is Turned:
            if others:
                raise _doubled(folder, name, key, others[0][1])
            turned[name] = key
        else:
            steps = ", ".join(type(step).__name__ for step in converter.operations)
            raise CheckpointError(
                f"{tensors.files[key]}: {key} needs a conversion that is not built yet ({steps}); "
                "save the model anew in its own form"
            )
    are_turned = _are_turned(tensors, {key: renaming.expected[name] for name, key in turned.items()})
    forms |= {name: Turned(key) if are_turned else AsIs(key) for name, key in turned.items()}
    return StoredModel(tensors, forms, first_names(blueprint))


def published_forms(blueprint: PreTrainedModel) -> dict[str, Form]:
    """How the published files of a family hold every parameter and stored buffer, by name; a tied one under its first name.

    This is transformers' mapping backwards. Some mappings have no way back; then without their changes of prefixes, as
    transformers itself saves a model that was made from a config, and else the model's own names.
    """
    renaming = _Renaming(blueprint)
    entries = get_model_conversion_mapping(blueprint, add_legacy=False)
    for tried in (entries, [entry for entry in entries if not isinstance(entry, PrefixChange)]):
        forms = _backwards(blueprint, tried)
        if forms is not None and all(renaming.of(key)[0] == name for name, form in forms.items() for key in form.keys):
            return forms
    return {name: AsIs(name) for name in _names(blueprint)}


class _Renaming:
    """From keys of files to names of a model. State: none that matters (transformers' entries note that they were used)."""

    def __init__(self, blueprint: PreTrainedModel) -> None:
        mapping = get_model_conversion_mapping(blueprint)
        self.prefix = blueprint.base_model_prefix
        self.expected = {name: tuple(value.shape) for name, value in blueprint.state_dict().items()}
        self.renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self.ordered = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.converters = {pattern: converter for converter in self.ordered for pattern in converter.source_patterns}

    def of(self, key: str) -> tuple[str, str | None]:
        """The name, the model's own if it has one for the key, and the pattern of a converter that the key matched."""
        known: Any = self.expected
        name, pattern = rename_source_key(key, self.renamings, self.ordered, self.prefix, known)
        if name not in known and key in known:
            return rename_source_key(key, [], [], self.prefix, known)
        return name, pattern


def _doubled(folder: Path, name: str, key: str, other: str) -> CheckpointError:
    return CheckpointError(f"{folder}: {key} and {other} are both {name}; take one out")


def _one_by_one(converter: WeightConverter, keys: Iterable[tuple[str, str]]) -> OneByOne:
    pieces: list[dict[int, str]] = [{} for _ in converter.source_patterns]
    for pattern, key in keys:
        number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), key)
        if number is None:
            raise CheckpointError(f"{key} names no expert, though it is stored with those of {converter.target_patterns[0]}")
        pieces[converter.source_patterns.index(pattern)][int(number[1])] = key
    return OneByOne(tuple(pieces))


def _are_turned(tensors: Tensors, expected: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a folder holds these keys with the last two dims exchanged against the `expected` shapes, all of them or none.

    Published files hold Qwen3-VL-MoE's experts turned, those that transformers 5 saved do not, and nothing in either says so.
    A weight whose two dims are equal does not tell, but its neighbour does: `gate_up_proj` and `down_proj` cannot both be
    square. (transformers looks at each weight alone, and reads a square one unturned.)
    """
    telling = {key: shape for key, shape in expected.items() if shape[1] != shape[2]}
    plain = [key for key, shape in telling.items() if tensors.shapes[key] == shape]
    turned = [key for key, (first, second, third) in telling.items() if tensors.shapes[key] == (first, third, second)]
    if plain and turned:
        raise CheckpointError(
            f"{tensors.folder}: {turned[0]} is stored turned, as published, but {plain[0]} is not; take both from one source"
        )
    if expected and not telling:
        key = next(iter(expected))
        raise CheckpointError(f"{tensors.folder}: {key} is square, and nothing says whether it is stored turned")
    return bool(turned)


def _backwards(blueprint: PreTrainedModel, entries: Sequence[WeightTransform]) -> dict[str, Form] | None:
    """None where a converter has no form of ours."""
    # Later entries act on what earlier ones made, so the way back is the other way round.
    reverse = [(entry, entry.reverse_transform()) for entry in reversed(entries)]
    renamings = [back for _, back in reverse if isinstance(back, WeightRenaming)]
    converters = [
        (entry, back) for entry, back in reverse if isinstance(entry, WeightConverter) and isinstance(back, WeightConverter)
    ]
    forms: dict[str, Form] = {}
    for name, shape in _names(blueprint).items():
        for entry, back in converters:
            made, pattern = apply_converters(name, [back])
            if pattern is not None:
                kind = kind_of(entry.operations)
                if kind is None:
                    return None
                first = back.target_patterns[0]
                pieces = [made.replace(first, target) for target in back.target_patterns]
                forms[name] = (
                    Turned(apply_renamings(made, renamings))
                    if kind is Turned
                    else OneByOne(tuple(_numbered(piece, shape[0], renamings) for piece in pieces))
                )
                break
        else:
            forms[name] = AsIs(apply_renamings(name, renamings))
    return forms


def _numbered(piece: str, experts: int, renamings: list[WeightRenaming]) -> dict[int, str]:
    return {expert: apply_renamings(piece.replace("*", str(expert)), renamings) for expert in range(experts)}


def _names(blueprint: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name to shape of everything that a folder of the model holds: tied parameters once."""
    first = first_names(blueprint)
    return {name: tuple(value.shape) for name, value in blueprint.state_dict().items() if first.get(name, name) == name}
