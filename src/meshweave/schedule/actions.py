"""What may a rank be told to do? One action, and its text."""

import re
from enum import StrEnum
from typing import NamedTuple

from meshweave.errors import ScheduleError


class Kind(StrEnum):
    """What an action does; the value is its text, as torch's pipelining writes it where it has one."""

    FORWARD = "F"
    BACKWARD = "B"
    """Both gradients: of the stage's input and of its weights."""
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"
    SEND_FORWARD = "SEND_F"
    """Activations, to the next stage of the module."""
    RECEIVE_FORWARD = "RECV_F"
    SEND_BACKWARD = "SEND_B"
    """Gradients of activations, to the stage before."""
    RECEIVE_BACKWARD = "RECV_B"
    SEND_TOKENS = "SEND_X"
    """Media tokens, over the boundary to the language model."""
    RECEIVE_TOKENS = "RECV_X"
    SWAP_TOKENS = "SWAP_X"
    """Media tokens among ranks of one program: send and receive at once."""
    SEND_TOKEN_GRADIENTS = "SEND_G"
    """Gradients of media tokens, back over the boundary."""
    RECEIVE_TOKEN_GRADIENTS = "RECV_G"
    SWAP_TOKEN_GRADIENTS = "SWAP_G"
    GATHER = "GATHER"
    """Parameters, over `dp`, for the whole step."""
    REDUCE = "REDUCE"
    """Gradients, over `dp`, once for the whole step; parameters are sharded again."""


COMPUTE = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT})
"""Kinds that occupy the processor."""

RECEIVED_AS = {
    Kind.SEND_FORWARD: Kind.RECEIVE_FORWARD,
    Kind.SEND_BACKWARD: Kind.RECEIVE_BACKWARD,
    Kind.SEND_TOKENS: Kind.RECEIVE_TOKENS,
    Kind.SEND_TOKEN_GRADIENTS: Kind.RECEIVE_TOKEN_GRADIENTS,
}
"""A send to the kind of action that receives it."""

_SENDS = frozenset(RECEIVED_AS)
_SENT_AS = {received: sent for sent, received in RECEIVED_AS.items()}
_RECEIVES = frozenset(_SENT_AS)
_STAGE_STEP = {Kind.SEND_FORWARD: 1, Kind.SEND_BACKWARD: -1}


class Action(NamedTuple):
    """One entry of a schedule: `language.2F5` is stage 2 of the language model working microbatch 5 forward.

    Text of an action between programs ends in the other one: `language.2SEND_F5>3`, `language.3RECV_F5<2`.
    """

    kind: Kind
    module: str
    """For a boundary, its encoder."""
    stage: int
    """Virtual stage; for a boundary, the encoder's last."""
    microbatch: int
    """Of the module's own numbering: an encoder's forward and backward count its passes, boundaries count the language model's
    microbatches; -1 for `GATHER` and `REDUCE`, which are for all."""
    peer: int = -1
    """Program at the other end; -1 where there is none."""

    @property
    def sends(self) -> bool:
        """Whether it sends to its peer."""
        return self.kind in _SENDS

    @property
    def receives(self) -> bool:
        """Whether it receives from its peer."""
        return self.kind in _RECEIVES

    def received_by(self, program: int) -> "Action":
        """The action of the peer that receives what this action of `program` sends."""
        stage = self.stage + _STAGE_STEP.get(self.kind, 0)
        return Action(RECEIVED_AS[self.kind], self.module, stage, self.microbatch, program)

    def sent_by(self, program: int) -> "Action":
        """The action of the peer that sends what this action of `program` receives."""
        kind = _SENT_AS[self.kind]
        return Action(kind, self.module, self.stage - _STAGE_STEP.get(kind, 0), self.microbatch, program)

    def __str__(self) -> str:
        microbatch = "" if self.microbatch < 0 else self.microbatch
        peer = f"{'>' if self.sends else '<'}{self.peer}" if self.peer >= 0 else ""
        return f"{self.module}.{self.stage}{self.kind}{microbatch}{peer}"


_TEXT = re.compile(r"(?P<module>\w+)\.(?P<stage>\d+)(?P<kind>[A-Z](?:[A-Z_]*[A-Z])?)(?P<microbatch>\d*)(?:[<>](?P<peer>\d+))?")


def parse_action(text: str) -> Action:
    """The action that a text names: the inverse of `str`.

    Raises:
        ScheduleError: the text names no action.
    """
    found = _TEXT.fullmatch(text)
    if found is None or found["kind"] not in set(Kind):
        raise ScheduleError(f"{text!r} is no action; one reads as language.2F5 or language.2SEND_F5>3")
    microbatch, peer = (-1 if found[key] in ("", None) else int(found[key]) for key in ("microbatch", "peer"))
    return Action(Kind(found["kind"]), found["module"], int(found["stage"]), microbatch, peer)
