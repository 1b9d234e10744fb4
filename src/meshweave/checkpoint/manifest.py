"""Which checkpoints does a run folder hold, and are they whole? Decided by looking at files; no ranks or torch needed."""

import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash
from pydantic import ConfigDict, ValidationError

from meshweave.config.fields import Strict
from meshweave.errors import CheckpointError, cause

CHECKPOINTS = "checkpoints"
"""The folder in a run folder that holds them, one folder each."""
MANIFEST = "manifest.json"
"""Written last: a folder without it is a save that did not end."""
FORMAT = 1
"""Of what `checkpoint/` writes; another number is read by another version of meshweave."""

_PREFIX = "step-"
_READ_BYTES = 1 << 22


class StoredFile(Strict):
    """What a file has to be."""

    bytes: int
    xxh3: str
    """Hexadecimal xxHash (XXH3, 64 bits) of its content."""


class Manifest(Strict):
    """What a checkpoint says of itself."""

    # The loss of a step may be no number, and has to come back as that, not as none.
    model_config = ConfigDict(ser_json_inf_nan="constants")

    format: int
    step: int
    """Steps that were done."""
    saved: str
    """When: ISO 8601, UTC."""
    versions: dict[str, str]
    """Of meshweave, torch and transformers."""
    samples: int
    """Of the training data."""
    run: dict[str, Any]
    """The run file, defaults written out."""
    progress: dict[str, Any]
    """Of the trainer: what the steps so far have added up to."""
    files: dict[str, StoredFile]
    """Every other file of the folder, by name."""

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files.values())


def checkpoint_folder(output: Path, step: int) -> Path:
    """Where a run keeps the state after so many steps."""
    return output / CHECKPOINTS / f"{_PREFIX}{step}"


def checkpoint_folders(output: Path) -> list[Path]:
    """All of a run's, whole or not, in the order of their steps."""
    found = (output / CHECKPOINTS).glob(f"{_PREFIX}*")
    return sorted((folder for folder in found if folder.name.removeprefix(_PREFIX).isdigit()), key=step_of)


def step_of(folder: Path) -> int:
    """The number of steps that a checkpoint's name says."""
    return int(folder.name.removeprefix(_PREFIX))


def read_manifest(folder: Path) -> Manifest:
    """What the checkpoint says of itself; its files are not looked at.

    Raises:
        CheckpointError: it is none, its save did not end, or another version wrote it.
    """
    file = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: there is no such checkpoint") from error
        raise CheckpointError(f"{folder}: no {MANIFEST}: its save did not end, or it is no checkpoint of meshweave") from error
    except OSError as error:
        raise CheckpointError(f"{file}: not readable ({error.strerror})") from error
    except ValidationError as error:
        raise CheckpointError(f"{file}: not a manifest of this version, or damaged ({cause(error)[:200]})") from error
    if manifest.format != FORMAT:
        raise CheckpointError(
            f"{file}: format {manifest.format} of meshweave {manifest.versions.get('meshweave', '?')}; this version reads "
            f"format {FORMAT}"
        )
    return manifest


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raises CheckpointError naming every file that is missing or has another size."""
    _named(folder, manifest.files, lambda name: _size_fault(folder / name, manifest.files[name].bytes))


def check_sums(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Reads the named files whole. Raises CheckpointError naming every one whose content is another than was written."""
    _named(folder, names, lambda name: _sum_fault(folder / name, manifest.files[name].xxh3))


def newest_whole(output: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint whose files are all there in full length, and what is wrong with those that are newer."""
    faults: dict[Path, str] = {}
    for folder in reversed(checkpoint_folders(output)):
        try:
            check_sizes(folder, read_manifest(folder))
            return folder, faults
        except CheckpointError as error:
            faults[folder] = str(error)
    return None, faults


def prune(output: Path, keep: int | None) -> None:
    """Removes all but the newest `keep` whole checkpoints, and unfinished ones that are older than the newest whole one."""
    newest, _ = newest_whole(output)
    folders = checkpoint_folders(output)
    if newest is None:
        return
    older = folders[: folders.index(newest)]
    whole = [folder for folder in older if (folder / MANIFEST).exists()]
    kept = whole if keep is None else whole[max(0, len(whole) - (keep - 1)) :]
    for folder in older:
        if folder not in kept:
            remove(folder)


def remove(folder: Path) -> None:
    """Removes a checkpoint as far as the disk lets it; what is left where that is cut short counts as unfinished."""
    with suppress(OSError):
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def checksum(data: bytes) -> str:
    """As a manifest lists it."""
    return xxhash.xxh3_64_hexdigest(data)


def file_checksum(file: Path) -> str:
    """Of a file's content."""
    digest = xxhash.xxh3_64()
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _named(folder: Path, names: Iterable[str] | Mapping[str, Any], fault: Callable[[str], str | None]) -> None:
    faults = [f"{name} {found}" for name in names if (found := fault(name)) is not None]
    if faults:
        raise CheckpointError(f"{folder}: damaged: {', '.join(faults[:5])}{', …' if len(faults) > 5 else ''}")


def _size_fault(file: Path, wanted: int) -> str | None:
    try:
        found = file.stat().st_size
    except OSError as error:
        return f"is missing ({error.strerror})"
    return None if found == wanted else f"has {found} bytes instead of {wanted}"


def _sum_fault(file: Path, wanted: str) -> str | None:
    try:
        found = file_checksum(file)
    except OSError as error:
        return f"is not readable ({error.strerror})"
    return None if found == wanted else "is not what was written (its checksum differs)"
