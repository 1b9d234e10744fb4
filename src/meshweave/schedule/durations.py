"""How long does an action take? A table of seconds, modelled or measured."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshweave.schedule.actions import Action, Kind
from meshweave.schedule.work import StepWork

Key = tuple[Kind, str, int]


@dataclass(frozen=True)
class Durations:
    """Seconds of actions. What is in neither table takes no time."""

    table: Mapping[Key, float]
    """(kind, module, stage) to the seconds of one such action: of an encoder, of a pass that is shared evenly; of a send, of the
    whole way to the other end."""
    exact: Mapping[tuple[int, Action], float] = field(default_factory=dict)
    """(program, action) to its own seconds, where it has any."""

    def of(self, program: int, action: Action, share: float = 1.0) -> float:
        """Seconds of one action of a program that has this share of the pass."""
        if self.exact:
            own = self.exact.get((program, action))
            if own is not None:
                return own
        return self.table.get(action[:3], 0.0) * share


def equal_durations(work: StepWork, forward: float = 1.0, backward: float = 2.0, link: float = 0.0) -> Durations:
    """Every stage of every module takes the same time; halves of a backward share it equally."""
    table: dict[Key, float] = {}
    for name, module in work.modules.items():
        for stage in range(module.stages):
            table[Kind.FORWARD, name, stage] = forward
            table[Kind.BACKWARD, name, stage] = backward
            table[Kind.INPUT_GRADIENT, name, stage] = table[Kind.WEIGHT_GRADIENT, name, stage] = backward / 2
            for kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD, Kind.SEND_TOKENS, Kind.SEND_TOKEN_GRADIENTS):
                table[kind, name, stage] = link
    return Durations(table)
