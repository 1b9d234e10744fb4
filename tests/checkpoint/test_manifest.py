"""A checkpoint counts if it is whole, which is decided by looking; what is not is named, never read, and cleaned up."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from meshweave.checkpoint.disk import write_durably
from meshweave.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    Manifest,
    StoredFile,
    check_sizes,
    check_sums,
    checkpoint_folder,
    checkpoint_folders,
    checksum,
    newest_whole,
    prune,
    read_manifest,
)
from meshweave.errors import CheckpointError


def written(output: Path, step: int) -> Path:
    folder = checkpoint_folder(output, step)
    folder.mkdir(parents=True)
    contents = {"tensors.json": b"{}", "rank-0-0.safetensors": bytes(100)}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    manifest = Manifest(
        format=FORMAT,
        step=step,
        saved="2026-01-01T00:00:00+00:00",
        versions={"meshweave": "1"},
        samples=8,
        run={},
        progress={},
        files={name: StoredFile(bytes=len(data), xxh3=checksum(data)) for name, data in contents.items()},
    )
    write_durably(folder / MANIFEST, manifest.model_dump_json().encode())
    return folder


def shortened(folder: Path) -> None:
    file = folder / "rank-0-0.safetensors"
    file.write_bytes(file.read_bytes()[:50])


def lost(folder: Path) -> None:
    (folder / "rank-0-0.safetensors").unlink()


def unmarked(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def garbled(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")


def of_another_version(folder: Path) -> None:
    said = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(said | {"format": FORMAT + 1}))


DAMAGES: dict[Callable[[Path], None], str] = {
    shortened: r"damaged: rank-0-0\.safetensors has 50 bytes instead of 100",
    lost: r"damaged: rank-0-0\.safetensors is missing",
    unmarked: r"no manifest\.json: its save did not end",
    garbled: "not a manifest of this version, or damaged",
    of_another_version: rf"format {FORMAT + 1} of meshweave 1; this version reads format {FORMAT}",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_of_damaged_checkpoints_the_one_before_is_taken_and_each_is_named(damage: Callable[[Path], None], tmp_path: Path) -> None:
    first, second = written(tmp_path, 9), written(tmp_path, 10)
    damage(second)
    found, faults = newest_whole(tmp_path)
    assert found == first
    assert re.search(DAMAGES[damage], faults.pop(second))
    assert not faults


def test_a_loss_that_is_no_number_comes_back_as_that(tmp_path: Path) -> None:
    folder = written(tmp_path, 1)
    manifest = read_manifest(folder).model_copy(update={"progress": {"loss": math.nan, "most": math.inf, "flops": 10**25}})
    write_durably(folder / MANIFEST, manifest.model_dump_json().encode())
    found = read_manifest(folder).progress
    assert math.isnan(found.pop("loss"))
    assert found == {"most": math.inf, "flops": 10**25}


def test_a_flipped_bit_is_found_by_reading(tmp_path: Path) -> None:
    folder = written(tmp_path, 1)
    manifest = read_manifest(folder)
    check_sums(folder, manifest, manifest.files)
    file = folder / "rank-0-0.safetensors"
    data = bytearray(file.read_bytes())
    data[70] ^= 1
    file.write_bytes(data)
    check_sizes(folder, manifest)
    with pytest.raises(CheckpointError, match=r"rank-0-0\.safetensors is not what was written"):
        check_sums(folder, manifest, manifest.files)


def test_steps_are_ordered_by_number_and_other_folders_are_none(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        written(tmp_path, step)
    (tmp_path / "checkpoints" / "step-old").mkdir()
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["step-3", "step-20", "step-100"]
    assert checkpoint_folders(tmp_path / "nothing") == []


def names(output: Path) -> list[str]:
    return [folder.name for folder in checkpoint_folders(output)]


def test_the_newest_are_kept_and_unfinished_ones_before_them_go(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        written(tmp_path, step)
    unmarked(checkpoint_folder(tmp_path, 3))
    prune(tmp_path, 3)
    assert names(tmp_path) == ["step-2", "step-4", "step-5"]
    prune(tmp_path, None)
    assert names(tmp_path) == ["step-2", "step-4", "step-5"]
    prune(tmp_path, 1)
    assert names(tmp_path) == ["step-5"]


def test_the_last_good_one_is_never_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        written(tmp_path, step)
    shortened(checkpoint_folder(tmp_path, 3))
    prune(tmp_path, 1)
    assert names(tmp_path) == ["step-2", "step-3"]
    for step in (2, 3):
        unmarked(checkpoint_folder(tmp_path, step))
    prune(tmp_path, 1)
    assert names(tmp_path) == ["step-2", "step-3"]
