"""Where do a run's numbers go? One record a step, to JSON lines and TensorBoard."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
"""What is written, in a run folder."""


class MetricsLog:
    """Writes records to `metrics.jsonl` and `tensorboard/` in a run folder. State: the open files.

    Args:
        done: steps that a run which goes on has behind it: what an earlier process wrote of later ones is cut.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / METRICS
        self.tensorboard = folder / TENSORBOARD
        if done:
            _cut(self.file, done)
        self._lines = self.file.open("a" if done else "w")
        # TensorBoard then forgets the steps from there on; without any, there are none to forget.
        self._writer = SummaryWriter(str(self.tensorboard), purge_step=done or None)

    def add(self, record: Mapping[str, Any]) -> None:
        """Writes one record; it holds `step`, numbers (None: there is none), and numbers by module or kind."""
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        for key, value in record.items():
            if isinstance(value, Mapping):
                for module, number in value.items():
                    self._writer.add_scalar(f"{key}/{module}", number, record["step"])
            elif key != "step" and value is not None:
                self._writer.add_scalar(key, value, record["step"])

    def records(self) -> list[dict[str, Any]]:
        """Every record of the run."""
        self._lines.flush()
        return [json.loads(line) for line in self.file.read_text().splitlines()]

    def close(self) -> None:
        """Ends both files."""
        self._lines.close()
        self._writer.close()


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
