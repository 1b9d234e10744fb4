"""Where do a run's numbers go? One record a step, to JSON lines and TensorBoard."""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
"""What is written, in a run folder."""


class MetricsLog:
    """Writes records to `metrics.jsonl` and `tensorboard/` in a run folder. State: the open files, and what a full disk has
    not taken: `metrics.jsonl` gets it as soon as there is room, TensorBoard nothing more.

    Args:
        done: steps that a run which goes on has behind it: what an earlier process wrote of later ones is cut.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / METRICS
        self.tensorboard = folder / TENSORBOARD
        if done:
            _cut(self.file, done)
        self._lines = self.file.open("ab" if done else "wb", buffering=0)
        self._left, self._failed = b"", False
        # TensorBoard then forgets the steps from there on; without any, there are none to forget.
        self._writer = SummaryWriter(str(self.tensorboard), purge_step=done or None)

    def add(self, record: Mapping[str, Any]) -> None:
        """Writes one record; it holds `step`, numbers (None: there is none), and numbers by module or kind."""
        self._left += json.dumps(record).encode() + b"\n"
        try:
            self._flush()
            self._show(record)
        except OSError as error:
            if not self._failed:
                logger.warning("%s: cannot be written (%s); the run goes on", self.file.parent, error.strerror)
            self._failed = True

    def records(self) -> list[dict[str, Any]]:
        """Every record of the run that is on the disk."""
        return [json.loads(line) for line in self.file.read_text().splitlines()]

    def close(self) -> None:
        """Ends both files."""
        with suppress(OSError):
            self._flush()
        self._lines.close()
        with suppress(OSError):
            self._writer.close()

    def _flush(self) -> None:
        while self._left:
            self._left = self._left[self._lines.write(self._left) :]

    def _show(self, record: Mapping[str, Any]) -> None:
        for key, value in record.items() if not self._failed else ():
            if isinstance(value, Mapping):
                for module, number in value.items():
                    self._writer.add_scalar(f"{key}/{module}", number, record["step"])
            elif key != "step" and value is not None:
                self._writer.add_scalar(key, value, record["step"])


def _cut(file: Path, done: int) -> None:
    """Keeps the lines of the first `done` steps; the last line may be half of one."""
    kept = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if step < done:
            kept.append(line)
    draft = file.with_name(f".{file.name}")
    draft.write_text("".join(f"{line}\n" for line in kept))
    draft.replace(file)
