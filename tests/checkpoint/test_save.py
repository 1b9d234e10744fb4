"""A save that fails leaves nothing behind, is one line, and the run goes on; too many in a row end it."""

import errno
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.runs import module

from meshweave.checkpoint import save, storage
from meshweave.checkpoint.manifest import checkpoint_folder, checkpoint_folders, newest_whole, read_manifest
from meshweave.checkpoint.pieces import Piece
from meshweave.checkpoint.save import Saver
from meshweave.checkpoint.storage import Reader
from meshweave.config import RunConfig, parse_config
from meshweave.errors import CheckpointError, DivergedError, RankError
from meshweave.world import World, launch


def run_of(output: Path, **checkpoint: Any) -> RunConfig:
    tree = {
        "model": "unused",
        "modules": {"vision": module("0"), "language": module("0-1", dp=2)},
        "train": {"steps": 9, "batch_size": 2, "checkpoint": checkpoint},
        "output": str(output),
        "timeout_seconds": 60,
    }
    return parse_config(tree)


def pieces(world: World, value: float) -> dict[str, Piece]:
    """Rows of one tensor, two on each rank."""
    runs = (((2 * world.rank, 0, 2),), ((0, 0, 3),))
    return {"model.rows": Piece((4, 3), runs, torch.full((2, 3), value))}


def full_disk(patch: pytest.MonkeyPatch, world: World) -> None:
    patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))


def failing_write(patch: pytest.MonkeyPatch, world: World) -> None:
    def failing(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if world.rank == 1:
        patch.setattr(storage, "write_shard", failing)


FAULTS: dict[Callable[[pytest.MonkeyPatch, World], None], str] = {
    full_disk: "rank 0: OSError: 4.8e-08 GB are needed, 1e-08 GB are free",
    failing_write: "rank 1: OSError: [Errno 28] No space left on device",
}


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "at once"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_save_that_fails_is_one_line_and_the_good_one_before_it_stays(
    fault: Callable[[pytest.MonkeyPatch, World], None], asynchronous: bool, tmp_path: Path
) -> None:
    def work(world: World, run: RunConfig) -> list[str]:
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("meshweave").addHandler(handler)
        saver = Saver(world, run, samples=4)
        saver.save(1, pieces(world, 1.0), {})
        saver.wait()
        with pytest.MonkeyPatch.context() as patch:
            fault(patch, world)
            saver.save(2, pieces(world, 2.0), {})
            saver.wait()
        dist.barrier()
        assert [folder.name for folder in checkpoint_folders(run.output)] == ["step-1"]
        dist.barrier()
        saver.save(3, pieces(world, 3.0), {"done": 3})
        saver.wait()
        return said

    run = run_of(tmp_path, **{"async": asynchronous})
    said = launch(run, work)
    assert said is not None
    (line,) = said
    assert line.startswith(f"checkpoint after step 2 could not be saved ({FAULTS[fault]}")
    assert line.endswith(f"the run goes on, the newest good one is {checkpoint_folder(tmp_path, 1)}")
    newest, faults = newest_whole(tmp_path)
    assert newest == checkpoint_folder(tmp_path, 3)
    assert not faults
    assert read_manifest(newest).progress == {"done": 3}
    assert set(Reader(newest).read_metadata().state_dict_metadata) == {"model.rows"}


def test_what_a_failed_save_left_may_be_unremovable(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")

    def work(world: World, run: RunConfig) -> None:
        with Saver(world, run, samples=4) as saver:
            saver.save(1, pieces(world, 1.0), {})

    launch(run_of(tmp_path), work)
    assert (tmp_path / "checkpoints").read_text() == "in the way"


def test_the_names_of_folders_are_on_the_disk_before_a_checkpoint_counts(tmp_path: Path) -> None:
    def work(world: World, run: RunConfig) -> list[tuple[Path, bool]]:
        synced = []
        with pytest.MonkeyPatch.context() as patch, Saver(world, run, samples=4) as saver:
            patch.setattr(save, "sync", lambda folder: synced.append((folder, newest_whole(run.output)[0] is not None)))
            saver.save(1, pieces(world, 1.0), {})
            saver.wait()
        return synced

    assert launch(run_of(tmp_path / "out"), work) == [(tmp_path / "out" / "checkpoints", False), (tmp_path / "out", False)]


def test_saves_that_keep_failing_end_the_run(tmp_path: Path) -> None:
    def work(world: World, run: RunConfig) -> None:
        saver = Saver(world, run, samples=4)
        with pytest.MonkeyPatch.context() as patch:
            failing_write(patch, world)
            for step in range(1, 9):
                saver.save(step, pieces(world, 1.0), {})

    with pytest.raises(CheckpointError, match=r"2 checkpoints in a row could not be saved, the last one: rank 1: .*--resume"):
        launch(run_of(tmp_path, max_failures=2), work)


def test_a_run_that_waited_for_a_rank_in_vain_does_not_wait_for_it_to_save(tmp_path: Path) -> None:
    def work(world: World, run: RunConfig) -> None:
        with Saver(world, run, samples=4) as saver:
            if world.rank == 1:
                time.sleep(60)  # hangs
            saver.save(1, pieces(world, 1.0), {})
            dist.barrier()

    started = time.monotonic()
    with pytest.raises(RankError, match="rank 0: work outside a step"):
        launch(run_of(tmp_path).model_copy(update={"timeout_seconds": 2.0}), work)
    assert time.monotonic() - started < 30


def test_a_run_ends_by_its_own_error_though_its_last_save_fails(tmp_path: Path) -> None:
    def work(world: World, run: RunConfig) -> None:
        with pytest.MonkeyPatch.context() as patch, Saver(world, run, samples=4) as saver:
            failing_write(patch, world)
            saver.save(1, pieces(world, 1.0), {})
            raise DivergedError("as it was")

    with pytest.raises(DivergedError, match="as it was"):
        launch(run_of(tmp_path, max_failures=1), work)


def test_what_changes_while_a_save_goes_on_is_not_in_it(tmp_path: Path) -> None:
    def work(world: World, run: RunConfig) -> None:
        saver = Saver(world, run, samples=4)
        held = pieces(world, 1.0)
        saver.save(1, held, {})
        held["model.rows"].part.fill_(7.0)
        saver.wait()

    launch(run_of(tmp_path), work)
    folder = checkpoint_folder(tmp_path, 1)
    values = [value for file in folder.glob("*.safetensors") for value in load_file(file).values()]
    assert len(values) == 2
    assert all(bool((value == 1.0).all()) for value in values)
