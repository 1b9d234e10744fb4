"""How is a run's state saved while it trains? One save at a time, in the background where asked, and never half."""

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from threading import Thread
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from meshweave.checkpoint.disk import sync, write_durably
from meshweave.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    Manifest,
    StoredFile,
    checkpoint_folder,
    newest_whole,
    prune,
    remove,
)
from meshweave.checkpoint.pieces import Piece
from meshweave.checkpoint.storage import SavePieces, Writer
from meshweave.config import RunConfig
from meshweave.errors import CheckpointError, RankError, cause
from meshweave.world import World

logger = logging.getLogger(__name__)

_PATIENCE = timedelta(hours=2)
"""For how long a rank waits for another to write: disks may be slower than steps."""


class Saver:
    """Saves checkpoints of one run. Making one is a collective over all ranks, as are `save` and `wait`, and the end of a `with`,
    which waits for the last save.

    State: the save that is under way, when it began, how many have failed in a row, and, where saves go on in the background,
    this rank's copy of its state in host memory, which every save fills anew.
    """

    def __init__(self, world: World, run: RunConfig, samples: int) -> None:
        assert run.train.checkpoint is not None
        self.world, self.run, self.samples, self.settings = world, run, samples, run.train.checkpoint
        # Its own: a save talks while the loader does, and while the step does.
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._running: Future[str | None] | None = None
        self._copies: dict[str, Tensor] = {}
        self._failures = 0
        self._saved = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether the run's settings ask for a checkpoint after so many steps. The last one has one: from there a run that is cut
        off while it writes its model goes on, and one that shall take more steps."""
        return step == self.run.train.steps or (self.settings.every is not None and step % self.settings.every == 0)

    def is_overdue(self) -> bool:
        """Whether this rank's clock asks for one; rank 0's does, for all."""
        minutes = self.settings.every_minutes
        return minutes is not None and self.world.rank == 0 and time.monotonic() > self._saved + 60 * minutes

    def save(self, step: int, pieces: Mapping[str, Piece], progress: Mapping[str, Any]) -> None:
        """Saves what the run is after `step` steps; returns as soon as `pieces` may change again.

        A save that fails is one line in the log, and the run goes on.

        Raises:
            CheckpointError: too many have failed in a row; on all ranks alike.
        """
        self.wait()
        self._saved = time.monotonic()
        manifest = Manifest(
            format=FORMAT,
            step=step,
            saved=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={name: version(name) for name in ("meshweave", "torch", "transformers")},
            samples=self.samples,
            run=self.run.model_dump(mode="json", by_alias=True),
            progress=dict(progress),
            files={},
        )
        held = self._copied(pieces) if self.settings.asynchronous else dict(pieces)
        self._running = self._begun(manifest, held)
        if not self.settings.asynchronous:
            self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Waits for the last save. A run that failed ends by its own error, and waits for no lost rank."""
        if error is None:
            self.wait()
        elif self._running is not None and isinstance(error, Exception) and not isinstance(error, RankError):
            # It says itself what fails; a rank that never comes to it may be what the run fails by.
            with suppress(Exception):
                self._running.result(self.run.timeout_seconds)

    def wait(self) -> None:
        """Until no save is under way. Raises as `save`."""
        running, self._running = self._running, None
        if running is None:
            return
        fault = running.result()
        self._failures = 0 if fault is None else self._failures + 1
        if self._failures >= self.settings.max_failures:
            raise CheckpointError(
                f"{self._failures} checkpoints in a row could not be saved, the last one: {fault}; make room or name another "
                "output, then go on with --resume (train.checkpoint.max_failures sets the number)"
            )

    def _copied(self, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
        cuda = self.world.device.type == "cuda"
        copied = {}
        for key, piece in pieces.items():
            if key not in self._copies:
                self._copies[key] = torch.empty(piece.part.shape, dtype=piece.part.dtype, pin_memory=cuda)
            copied[key] = Piece(piece.shape, piece.runs, self._copies[key].copy_(piece.part, non_blocking=True))
        if cuda:
            torch.cuda.synchronize(self.world.device)
        return copied

    def _begun(self, manifest: Manifest, pieces: Mapping[str, Piece]) -> Future[str | None]:
        future: Future[str | None] = Future()

        def work() -> None:
            try:
                future.set_result(self._write(manifest, pieces))
            except BaseException as error:
                future.set_exception(error)

        # A process ends without it: it may wait for a lost rank.
        Thread(target=work, name="checkpoint", daemon=True).start()
        return future

    def _write(self, manifest: Manifest, pieces: Mapping[str, Piece]) -> str | None:
        """Returns what went wrong, on all ranks alike."""
        folder = checkpoint_folder(self.run.output, manifest.step)

        def close(files: dict[str, StoredFile]) -> None:
            whole = manifest.model_copy(update={"files": files})
            # The folder's own name first: it shall not be gone with all that is in it.
            for above in (folder.parent, self.run.output):
                sync(above)
            write_durably(folder / MANIFEST, whole.model_dump_json(indent=1).encode())

        try:
            writer = Writer(folder, self.world.rank, close)
            dcp.save(dict(pieces), storage_writer=writer, planner=SavePieces(), process_group=self._group)
        except CheckpointException as error:
            fault = said(error)
            if self.world.rank == 0:
                remove(folder)
                newest, _ = newest_whole(self.run.output)
                logger.warning(
                    "checkpoint after step %d could not be saved (%s); the run goes on, %s",
                    manifest.step,
                    fault,
                    f"the newest good one is {newest}" if newest else "there is no good one yet",
                )
            return fault
        if self.world.rank == 0:
            prune(self.run.output, self.settings.keep)
        return None


def said(error: CheckpointException) -> str:
    """What the ranks met, in one line: DCP's own message holds a traceback of each."""
    return "; ".join(f"rank {rank}: {cause(failure)}" for rank, (failure, _) in sorted(error.failures.items()))
