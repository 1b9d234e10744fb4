"""Whose is the run folder? One run's at a time, and an earlier run's is not written over without being told."""

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from meshweave.checkpoint.folder import PARTIAL
from meshweave.config import RunConfig
from meshweave.errors import ConfigError
from meshweave.step.trace import MEASURED_PICTURE, MEASURED_TRACE
from meshweave.world import World

METRICS, TENSORBOARD, MODEL, CURVE = "metrics.jsonl", "tensorboard", "model", "loss.png"
"""What a run leaves in its folder."""
_LOCK = ".running"


def check_output(run: RunConfig, overwrite: bool) -> None:
    """Raises ConfigError if a run must not write into its folder: an earlier one's is there, or it is the model's."""
    folder, model = run.output.resolve(), run.model.resolve()
    if folder == model or folder.is_relative_to(model):
        raise ConfigError(f"output: {str(run.output)!r} is the model folder {str(run.model)!r}, or in it; name another folder")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output: {str(run.output)!r} is a file; name a folder")
    if not overwrite and any((folder / name).exists() for name in (METRICS, MODEL)):
        raise ConfigError(
            f"output: {str(run.output)!r} holds a run; name another folder (--set output=…), or write over it (--overwrite)"
        )


@contextmanager
def claimed(world: World, run: RunConfig, overwrite: bool) -> Iterator[None]:
    """Inside it the run folder is this run's alone; a collective over all ranks.

    With `overwrite`, what an earlier run left there is removed. The claim ends with rank 0's process, however that ends.

    Raises:
        ConfigError: as `check_output`, and if another run has the folder; on all ranks alike.
    """
    refusal: list[str | None] = [None]
    lock = None
    if world.rank == 0:
        try:
            lock = _lock(run.output)
            check_output(run, overwrite)
            _clear(run.output)
        except ConfigError as error:
            refusal = [str(error)]
        except OSError as error:
            refusal = [f"output: {str(run.output)!r} cannot be written ({error.strerror}); name another folder"]
    if world.size > 1:
        dist.broadcast_object_list(refusal, src=0, group=world.data_group)
    try:
        if refusal[0] is not None:
            raise ConfigError(refusal[0])
        yield
    finally:
        if lock is not None:
            os.close(lock)


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
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return lock


def _clear(folder: Path) -> None:
    for name in (TENSORBOARD, MODEL, f"{MODEL}{PARTIAL}"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (METRICS, CURVE, MEASURED_PICTURE, MEASURED_TRACE):
        (folder / name).unlink(missing_ok=True)
