"""Which samples are not trained, and when is that too many? Named while they are few, counted by kind, and a bound on them."""

import logging
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from meshweave.errors import DataError, FaultKind, LeftOutError

logger = logging.getLogger(__name__)

MOST_NAMED = 20
"""Unreadable samples that the log names, one line each; and so many that are left out."""
WINDOW = 1000
"""Samples over which the share of unreadable ones is taken."""
FEWEST = 200
"""Samples that a share is taken of at the least: in a few, one bad one says nothing."""


@dataclass(frozen=True)
class Fault:
    """Why a sample is not trained."""

    kind: FaultKind
    message: str
    left_out: bool
    """By a limit of the run file, or because it has nothing to learn from; else it cannot be read."""

    @classmethod
    def of(cls, error: DataError) -> "Fault":
        return cls(error.kind, str(error), isinstance(error, LeftOutError))


def unreadable(faults: Mapping[int, Fault]) -> int:
    """How many of them cannot be read."""
    return sum(not fault.left_out for fault in faults.values())


def too_many(count: int, samples: int, most: float) -> bool:
    """Whether `count` unreadable ones of so many samples are more than the share `most`."""
    return count > most * max(samples, FEWEST)


@dataclass
class FaultLog:
    """What a run has met so far, the same on every rank. State: samples named, counts by kind, the last steps' samples.

    Args:
        most: share of a window that may be unreadable (`data.max_skipped`).
        named: whether this process writes the log.
    """

    stop: bool = False
    """Whether one unreadable sample ends the run (`data.on_error`)."""
    most: float = 1.0
    named: bool = True
    _seen: dict[bool, set[int]] = field(default_factory=lambda: {False: set(), True: set()})
    _counts: Counter[FaultKind] = field(default_factory=Counter)
    _examples: dict[FaultKind, str] = field(default_factory=dict)
    _steps: deque[tuple[int, int, int]] = field(default_factory=deque)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, for JSON."""
        return {
            "skipped": sorted(self._seen[False]),
            "left_out": sorted(self._seen[True]),
            "counts": dict(self._counts),
            "examples": dict(self._examples),
            "steps": list(self._steps),
        }

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Counts from what `state` said on."""
        self._seen = {False: set(state["skipped"]), True: set(state["left_out"])}
        self._counts, self._examples = Counter(state["counts"]), dict(state["examples"])
        self._steps = deque((asked, bad, lost) for asked, bad, lost in state["steps"])

    def name(self, faults: Mapping[int, Fault]) -> None:
        """Names the faults of a step that are new; before its samples are read to the end, so more may come.

        Raises:
            DataError: one cannot be read, and that ends the run.
        """
        for sample, fault in sorted(faults.items()):
            if self.stop and not fault.left_out:
                raise DataError(f"sample {sample}: {fault.message} (or set `data.on_error: skip` to leave it out)", fault.kind)
            seen = self._seen[fault.left_out]
            if sample in seen:
                continue
            seen.add(sample)
            if self.named and len(seen) <= MOST_NAMED:
                more = "; further ones are counted, not named" if len(seen) == MOST_NAMED else ""
                logger.warning("sample %d is %s: %s%s", sample, "left out" if fault.left_out else "skipped", fault.message, more)

    def count(self, samples: int, faults: Mapping[int, Fault]) -> None:
        """Counts a step that was read.

        Raises:
            DataError: of the last `WINDOW` samples too many could not be read, or none is trained.
        """
        for fault in faults.values():
            self._counts[fault.kind] += 1
            self._examples.setdefault(fault.kind, fault.message)
        self._steps.append((samples, unreadable(faults), len(faults)))
        while len(self._steps) > 1 and sum(step[0] for step in self._steps) - self._steps[0][0] >= WINDOW:
            self._steps.popleft()
        asked, bad, lost = (sum(each) for each in zip(*self._steps, strict=True))
        if lost == asked >= MOST_NAMED:
            what = f"not one of {asked} samples can be trained"
        elif too_many(bad, asked, self.most):
            what = f"{bad} of the last {asked} samples could not be read, more than data.max_skipped={self.most:g} allows"
        else:
            return
        raise DataError(f"{what}; of all so far:\n{described(self._counts, self._examples)}")


def described(counts: Mapping[FaultKind, int], examples: Mapping[FaultKind, str]) -> str:
    """A line a kind, most frequent first."""
    return "\n".join(
        f"  {count} × {kind}, e.g. {examples[kind]}" for kind, count in sorted(counts.items(), key=lambda pair: -pair[1])
    )
