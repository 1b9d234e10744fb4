"""Where do a run's numbers go? One record a step, to JSON lines and TensorBoard."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """Writes records to `metrics.jsonl` and `tensorboard/` in a run folder. State: the open files, and the records so far."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "metrics.jsonl"
        self.tensorboard = folder / "tensorboard"
        self.records: list[dict[str, Any]] = []
        self._lines = self.file.open("w")
        self._writer = SummaryWriter(str(self.tensorboard))

    def add(self, record: Mapping[str, Any]) -> None:
        """Writes one record; it holds `step`, numbers (None: there is none), and numbers by module or kind."""
        self.records.append(dict(record))
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        for key, value in record.items():
            if isinstance(value, Mapping):
                for module, number in value.items():
                    self._writer.add_scalar(f"{key}/{module}", number, record["step"])
            elif key != "step" and value is not None:
                self._writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        """Ends both files."""
        self._lines.close()
        self._writer.close()
