"""Whose is the run folder, and from where does a run in it start? One run's at a time, and no earlier one's unless told."""

import fcntl
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from meshweave.checkpoint.disk import require_space
from meshweave.checkpoint.folder import PARTIAL
from meshweave.checkpoint.load import check_sums_together
from meshweave.checkpoint.manifest import (
    CHECKPOINTS,
    MANIFEST,
    check_sizes,
    checkpoint_folders,
    newest_whole,
    read_manifest,
    remove,
    step_of,
)
from meshweave.config import RunConfig
from meshweave.errors import CheckpointError, ConfigError, MeshweaveError
from meshweave.step.trace import MEASURED_PICTURE, MEASURED_TRACE
from meshweave.train.metrics import METRICS, TENSORBOARD
from meshweave.world import World

logger = logging.getLogger(__name__)

MODEL, CURVE, DIVERGED = "model", "loss.png", "diverged.jsonl"
"""What a run leaves in its folder, beside its metrics and checkpoints."""
_LOCK = ".running"


@dataclass(frozen=True)
class Start:
    """How a run begins."""

    overwrite: bool = False
    """What an earlier run left in the folder is removed."""
    resume: bool = False
    """Go on from the newest whole checkpoint in the folder."""
    checkpoint: Path | None = None
    """Go on from this one."""
    allow_changed: tuple[str, ...] = ()
    """Keys of the run file that may differ from the checkpoint's (`checkpoint/load.py`)."""


START = Start()
"""From the beginning, in a folder of its own."""


def check_output(run: RunConfig, start: Start) -> None:
    """Raises ConfigError if a run must not write into its folder: an earlier one's is there, or it is the model's, or what it
    would remove there is what it would go on from.

    A run that goes on may, if there is a checkpoint to go on from.
    """
    folder, model = run.output.resolve(), run.model.resolve()
    if folder == model or folder.is_relative_to(model):
        raise ConfigError(f"output: {str(run.output)!r} is the model folder {str(run.model)!r}, or in it; name another folder")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output: {str(run.output)!r} is a file; name a folder")
    if start.overwrite and (start.resume or (start.checkpoint and start.checkpoint.resolve().is_relative_to(folder))):
        raise ConfigError(
            f"output: --overwrite removes what {str(run.output)!r} holds, and --resume would go on from it; leave one of them out"
        )
    if start.overwrite or not any((folder / name).exists() for name in (METRICS, MODEL, CHECKPOINTS)):
        return
    if _within(run, start.checkpoint) if start.checkpoint else start.resume or run.train.resume == "auto":
        return
    saved = "go on from its newest checkpoint (--resume), " if checkpoint_folders(folder) else ""
    raise ConfigError(
        f"output: {str(run.output)!r} holds a run; {saved}name another folder (--set output=…), or write over it (--overwrite)"
    )


@contextmanager
def claimed(world: World, run: RunConfig, start: Start, needed: int = 0) -> Iterator[Path | None]:
    """Inside it the run folder is this run's alone; gives the checkpoint to go on from, if any. A collective over all ranks.

    The claim ends with rank 0's process, however that ends.

    Args:
        needed: bytes that the run will write at least.

    Raises:
        ConfigError: as `check_output`, and if another run has the folder; on all ranks alike.
        CheckpointError: there is no whole checkpoint to go on from; on all ranks alike.
    """
    locks: list[int] = []
    try:
        checkpoint = _by_first(world, run, lambda: _begun(run, start, needed, locks))
        if checkpoint is not None and run.train.checkpoint is not None and run.train.checkpoint.verify_on_load:
            checkpoint = _verified(world, run, start, checkpoint)
        yield checkpoint
    finally:
        for lock in locks:
            os.close(lock)


def _by_first(world: World, run: RunConfig, choose: Callable[[], Path | None]) -> Path | None:
    """What rank 0 chooses, or the error that it meets, on all ranks. A collective."""
    said: list[Any] = [None, None]
    if world.rank == 0:
        try:
            said[1] = choose()
        except MeshweaveError as error:
            said[0] = error
        except OSError as error:
            said[0] = ConfigError(
                f"output: {str(run.output)!r} cannot be written ({error.strerror or error}); name another folder"
            )
    if world.size > 1:
        dist.broadcast_object_list(said, src=0, group=world.data_group)
    if said[0] is not None:
        raise said[0]
    return said[1]


def _begun(run: RunConfig, start: Start, needed: int, locks: list[int]) -> Path | None:
    """Takes the folder and makes it ready; the checkpoint to go on from."""
    locks.append(_lock(run.output))
    check_output(run, start)
    checkpoint = _checkpoint(run, start)
    if checkpoint is None or not _within(run, checkpoint):
        _clear(run.output)
    require_space(run.output, needed)
    return checkpoint


def _verified(world: World, run: RunConfig, start: Start, checkpoint: Path) -> Path:
    """The newest one whose content is what was written; damaged ones are set aside, but one that was named is refused."""
    while True:
        try:
            check_sums_together(world, checkpoint, read_manifest(checkpoint))
            return checkpoint
        except CheckpointError as error:
            if start.checkpoint is not None:
                raise
            damaged, fault = checkpoint, error

        def before(damaged: Path = damaged, fault: CheckpointError = fault) -> Path:
            found = [folder for folder in checkpoint_folders(run.output) if step_of(folder) < step_of(damaged)]
            if not any((folder / MANIFEST).exists() for folder in found):
                raise fault
            _set_aside(damaged, str(fault))
            if (newest := newest_whole(run.output)[0]) is None:
                raise fault
            return newest

        chosen = _by_first(world, run, before)
        assert chosen is not None
        checkpoint = chosen


def _set_aside(folder: Path, why: str) -> None:
    aside = folder.rename(folder.with_name(f"{folder.name}.aside-{time.time_ns()}"))
    logger.warning("%s; it is set aside, as %s", why, aside.name)


def _checkpoint(run: RunConfig, start: Start) -> Path | None:
    """The one to go on from. Later ones are out of the way then: unfinished ones are removed, others set aside, all named."""
    newest, faults = start.checkpoint, dict[Path, str]()
    if newest is not None:
        manifest = read_manifest(newest)
        check_sizes(newest, manifest)
        if not _within(run, newest):
            return newest
        # One that was set aside has its step not as its name.
        done = manifest.step
    elif start.overwrite or not (start.resume or run.train.resume == "auto"):
        return None
    else:
        newest, faults = newest_whole(run.output)
        done = step_of(newest) if newest else 0
    if newest is None:
        _require_nothing_to_lose(run, start, faults)
        if (run.output / METRICS).exists():
            logger.warning("%s: a run ended there before its first checkpoint; it starts anew", run.output)
    for folder in checkpoint_folders(run.output):
        if newest is None or (step_of(folder) >= done and folder.resolve() != newest.resolve()):
            fault = faults.get(folder, f"{folder}: is later than {newest}, or as old")
            if (folder / MANIFEST).exists():
                _set_aside(folder, fault)
            else:
                remove(folder)
                logger.warning("%s; it is removed", fault)
    return newest


def _require_nothing_to_lose(run: RunConfig, start: Start, faults: Mapping[Path, str]) -> None:
    """Raises CheckpointError where there is no whole checkpoint to go on from: starting anew is no answer if that was asked for,
    and none if it would remove checkpoints that are damaged or another version's, or a model."""
    if start.resume or (run.output / MODEL).exists() or any((folder / MANIFEST).exists() for folder in faults):
        found = "".join(f"\n  {fault}" for fault in faults.values())
        way = "start without --resume"
        if faults or not start.resume:
            way = "name another folder (--set output=…), or write over it (--overwrite)"
        raise CheckpointError(f"output: {str(run.output)!r} holds no whole checkpoint to go on from{found}; {way}")


def _within(run: RunConfig, checkpoint: Path) -> bool:
    """Whether it is one of the run folder's own."""
    return checkpoint.resolve().parent == (run.output / CHECKPOINTS).resolve()


def _lock(folder: Path) -> int:
    """Held until it is closed, or this process is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    # Not inherited: what this process starts must not keep the folder when it ends.
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(lock, 200).decode(errors="replace") or "another process"
        os.close(lock)
        raise ConfigError(f"output: a run is writing into {str(folder)!r} ({owner}); name another folder") from None
    except OSError as error:
        # Some network file systems know no locks.
        logger.warning("%s: nothing keeps a second run out of it (%s)", folder, error.strerror)
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return lock


def _clear(folder: Path) -> None:
    for name in (TENSORBOARD, MODEL, f"{MODEL}{PARTIAL}", CHECKPOINTS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (METRICS, CURVE, DIVERGED, MEASURED_PICTURE, MEASURED_TRACE):
        (folder / name).unlink(missing_ok=True)
