"""What is a schedule? A list of actions for every program, and how much of the encoders' work each program takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshweave.config import LANGUAGE
from meshweave.schedule.actions import Action, Kind
from meshweave.schedule.work import StepWork

Shares = Mapping[str, tuple[tuple[float, ...], ...]]
"""Encoder → pass → program → its lanes' share of the pass, relative to an even one: 1 everywhere is even, 0 is no part in it."""


@dataclass(frozen=True)
class Schedule:
    """What every rank does in a step, in order. The checker, the simulator, the picture and the runtime read this."""

    work: StepWork
    actions: tuple[tuple[Action, ...], ...]
    """Program to its list."""
    shares: Shares = field(default_factory=dict)
    """Encoders that are not named are shared evenly."""

    def share(self, encoder: str, number: int, program: int) -> float:
        """The share of a program's lanes in a pass, relative to an even one."""
        return self.shares[encoder][number][program] if encoder in self.shares else 1.0

    def streams(self, module: str) -> bool:
        """Whether FSDP may gather and release the module's parameters block by block, because its ranks come to every gather
        together. Otherwise they are gathered once before the step, and gradients reduced once after it."""
        return streams(self.work, module)

    def __str__(self) -> str:
        return "\n".join(f"{number}: {' '.join(map(str, actions))}" for number, actions in enumerate(self.actions))


def streams(work: StepWork, module: str) -> bool:
    """As `Schedule.streams`."""
    # A language model without a pipeline works every microbatch everywhere, in one order; its programs are one gang.
    return work.modules[module].stages == 1 and (module == LANGUAGE or len(work.holders(module, 0)) == 1)


def tasks(work: StepWork, shares: Shares, program: int) -> list[Action]:
    """Every computation that a program has to do in a step, in no particular order."""
    found = []
    for name, stages in work.programs[program].stages.items():
        module = work.modules[name]
        for number in range(module.passes(work.microbatches)):
            if name in shares and not shares[name][number][program]:
                continue
            for stage in stages:
                found += [Action(kind, name, stage, number) for kind in kinds_of(work, name)]
    return found


def kinds_of(work: StepWork, module: str) -> tuple[Kind, ...]:
    """The computations that a module does for every pass."""
    if not work.modules[module].backward:
        return (Kind.FORWARD,)
    if work.modules[module].split:
        return (Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)
    return (Kind.FORWARD, Kind.BACKWARD)


def needs(work: StepWork, shares: Shares, program: int, action: Action) -> list[Action]:
    """What a computation waits for: earlier computations of its program, and what it receives."""
    kind, module, stage, number, _ = action
    its = work.modules[module]
    if kind == Kind.WEIGHT_GRADIENT:
        return [Action(Kind.INPUT_GRADIENT, module, stage, number)]
    if kind == Kind.FORWARD:
        if stage:
            return [Action(Kind.RECEIVE_FORWARD, module, stage, number, work.neighbours[module, program][0])]
        if module != LANGUAGE:
            return []
        return [
            _from(program, giver, Kind.SWAP_TOKENS, Kind.RECEIVE_TOKENS, encoder, work.last(encoder), number)
            for encoder in work.encoders
            for giver in givers(work, shares, encoder, number)
        ]
    needed = [Action(Kind.FORWARD, module, stage, number)]
    if stage < its.stages - 1:
        return [*needed, Action(Kind.RECEIVE_BACKWARD, module, stage, number, work.neighbours[module, program][1])]
    if module == LANGUAGE:
        return needed
    swap, receive = Kind.SWAP_TOKEN_GRADIENTS, Kind.RECEIVE_TOKEN_GRADIENTS
    return needed + [
        _from(program, taker, swap, receive, module, stage, served)
        for served in its.served(number, work.microbatches)
        for taker in work.holders(LANGUAGE, 0)
    ]


def emits(work: StepWork, shares: Shares, program: int, action: Action) -> list[Action]:
    """What a program sends once it has done a computation."""
    kind, module, stage, number, _ = action
    its = work.modules[module]
    before, after = work.neighbours[module, program]
    if kind == Kind.WEIGHT_GRADIENT:
        return []
    if kind == Kind.FORWARD:
        if stage < its.stages - 1:
            return [Action(Kind.SEND_FORWARD, module, stage, number, after)]
        if module == LANGUAGE:
            return []
        return [
            _from(program, taker, Kind.SWAP_TOKENS, Kind.SEND_TOKENS, module, stage, served)
            for served in its.served(number, work.microbatches)
            for taker in work.holders(LANGUAGE, 0)
        ]
    if stage:
        return [Action(Kind.SEND_BACKWARD, module, stage, number, before)]
    if module != LANGUAGE:
        return []
    swap, send = Kind.SWAP_TOKEN_GRADIENTS, Kind.SEND_TOKEN_GRADIENTS
    return [
        _from(program, giver, swap, send, encoder, work.last(encoder), number)
        for encoder in work.encoders
        if work.modules[encoder].backward
        for giver in givers(work, shares, encoder, number)
    ]


def givers(work: StepWork, shares: Shares, encoder: str, microbatch: int) -> list[int]:
    """Programs whose lanes have media tokens of a language-model microbatch."""
    holders = work.holders(encoder, work.last(encoder))
    number = microbatch // work.modules[encoder].per_pass
    return [program for program in holders if encoder not in shares or shares[encoder][number][program] > 0]


def _from(program: int, other: int, swap: Kind, apart: Kind, encoder: str, stage: int, microbatch: int) -> Action:
    """A boundary action of `program` with `other`, which may be itself."""
    if program == other:
        return Action(swap, encoder, stage, microbatch)
    return Action(apart, encoder, stage, microbatch, other)
