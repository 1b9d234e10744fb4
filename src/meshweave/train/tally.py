"""What have a run's steps added up to? Goes into checkpoints, so a run that goes on sums up all of its steps."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from meshweave.data.faults import Fault, FaultLog
from meshweave.errors import FaultKind

_WARM_UP_STEPS = 5
"""Steps of a process that speed figures leave out: allocations and first connections."""

_SUMS = ("steps", "updated", "loss", "skipped", "left_out")
_COUNTS = ("faults", "flops", "forward_bytes", "backward_bytes")
"""What checkpoints keep of a tally; seconds are each process' own."""


@dataclass
class Tally:
    """State: sums over all steps so far, the same on every rank but for seconds."""

    steps: int = 0
    updated: int = 0
    loss: float | None = None
    """Of the last step that had one."""
    skipped: int = 0
    left_out: int = 0
    faults: Counter[FaultKind] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    forward_bytes: Counter[str] = field(default_factory=Counter)
    backward_bytes: Counter[str] = field(default_factory=Counter)
    met: FaultLog = field(default_factory=lambda: FaultLog(named=False))
    """Of the steps that were trained; the loader's own is ahead of them."""
    here: int = 0
    """Steps of this process."""
    seconds: float = 0.0
    """Of the timed steps of this process, and tokens in that time."""
    tokens: int = 0
    timed: int = 0

    def add(self, record: Mapping[str, Any], faults: Mapping[int, Fault], samples: int) -> None:
        """Counts a step: its record, the faults among its samples, and how many samples it asked for."""
        self.steps += 1
        self.here += 1
        self.updated += record["updated"]
        self.loss = self.loss if record["loss"] is None else record["loss"]
        self.skipped += record["skipped_samples"]
        self.left_out += record["left_out_samples"]
        self.faults.update(record["faults"])
        self.flops.update(record["flops"])
        self.forward_bytes.update(record["boundary_forward_bytes"])
        self.backward_bytes.update(record["boundary_backward_bytes"])
        self.met.name(faults)
        self.met.count(samples, faults)
        if self.here == _WARM_UP_STEPS + 1:
            self.timed, self.seconds, self.tokens = 0, 0.0, 0
        self.timed += 1
        self.seconds += record["seconds"]
        self.tokens += record["tokens"]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, for JSON."""
        sums = {name: getattr(self, name) for name in _SUMS}
        counts = {name: dict(getattr(self, name)) for name in _COUNTS}
        return sums | counts | {"met": self.met.state()}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Tally":
        """What `state` said."""
        tally = cls(**{name: state[name] for name in _SUMS})
        for name in _COUNTS:
            getattr(tally, name).update(state[name])
        tally.met.go_on(state["met"])
        return tally
