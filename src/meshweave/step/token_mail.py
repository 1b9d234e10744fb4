"""Which media tokens, or gradients of them, does a rank hand over and wait for in a step?"""

from collections import Counter
from collections.abc import Container, Mapping

from torch import Tensor

from meshweave.boundary import Arrival, TransferPlan, outgoing
from meshweave.schedule.actions import Action, Kind
from meshweave.schedule.runtime import Message

_BACK = frozenset({Kind.SEND_TOKEN_GRADIENTS, Kind.RECEIVE_TOKEN_GRADIENTS, Kind.SWAP_TOKEN_GRADIENTS})
_SWAPS = frozenset({Kind.SWAP_TOKENS, Kind.SWAP_TOKEN_GRADIENTS})

_Key = tuple[str, int, bool]
"""Encoder, microbatch, and whether it is gradients on their way back."""


class TokenMail:
    """Boundary messages of one rank in one step.

    State: tensors that still have to be sent, and arrivals that fill.
    """

    def __init__(
        self,
        crossings: Mapping[tuple[str, int], TransferPlan],
        rank: int,
        nothing: Mapping[str, Tensor],
        sends: Counter[_Key],
    ) -> None:
        """Prepares a step.

        Args:
            crossings: as in `LocalStep`.
            nothing: encoder to [0, width] of its media tokens.
            sends: how many actions will send each tensor.
        """
        self._crossings, self._rank, self._nothing = crossings, rank, nothing
        self._left = Counter(sends)
        self._ready: dict[_Key, Tensor] = {}
        self._arrivals: dict[_Key, Arrival] = {}

    def put(self, encoder: str, microbatch: int, back: bool, tokens: Tensor) -> None:
        """Makes this rank's rows ready to be sent."""
        if self._left[encoder, microbatch, back]:
            self._ready[encoder, microbatch, back] = tokens

    def outgoing(self, action: Action, ranks: Container[int]) -> list[Message]:
        """What an action sends to `ranks`; a swap also takes over what this rank has itself."""
        key = _key(action)
        plan = self._plan(key)
        if plan is None:
            return []
        tokens = self._ready[key]
        self._left[key] -= 1
        if not self._left[key]:
            del self._ready[key]
        if action.kind in _SWAPS:
            self._arrival(key, plan).copy(tokens)
        return outgoing(plan.for_rank(self._rank), tokens, ranks)

    def expect(self, action: Action, ranks: Container[int]) -> list[Message]:
        """Buffers for what an action brings from `ranks`."""
        key = _key(action)
        plan = self._plan(key)
        return [] if plan is None else self._arrival(key, plan).expect(ranks)

    def taken(self, encoder: str, microbatch: int, back: bool) -> Tensor:
        """[rows, width] of this rank's share, once all of it has come; without rows where the microbatch has no such media."""
        key = encoder, microbatch, back
        plan = self._plan(key)
        if plan is None:
            return self._nothing[encoder].detach()
        arrival = self._arrival(key, plan)
        del self._arrivals[key]
        return arrival.result()

    def _plan(self, key: _Key) -> TransferPlan | None:
        encoder, microbatch, back = key
        plan = self._crossings.get((encoder, microbatch))
        return plan.transpose() if plan is not None and back else plan

    def _arrival(self, key: _Key, plan: TransferPlan) -> Arrival:
        if key not in self._arrivals:
            self._arrivals[key] = Arrival(plan.for_rank(self._rank), self._nothing[key[0]])
        return self._arrivals[key]


def sends_of(actions: tuple[Action, ...]) -> Counter[_Key]:
    """How many actions of a list send each tensor of media tokens or of their gradients."""
    kinds = _SWAPS | {Kind.SEND_TOKENS, Kind.SEND_TOKEN_GRADIENTS}
    return Counter(_key(action) for action in actions if action.kind in kinds)


def _key(action: Action) -> _Key:
    return action.module, action.microbatch, action.kind in _BACK
