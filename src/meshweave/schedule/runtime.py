"""Who does what the list says? Executes a program's actions in order: computations one by one, messages beside them."""

import re
import time
from collections import deque
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from meshweave.errors import MeshweaveError, RankError
from meshweave.schedule.actions import COMPUTE, Action, Kind
from meshweave.schedule.schedule import Schedule, needs
from meshweave.schedule.simulate import Span
from meshweave.schedule.waits import Waits

Message = tuple[int, Tensor]
"""The rank at the other end, and what is sent or where it goes."""

_AHEAD = 2
"""Computations by which receives are posted ahead, where a backend lets messages overtake one another."""

_UNDER_WAY = 8
"""Send actions whose receive may still be open. What runs ahead, like a frozen encoder, waits for its reader after so many."""

_LOST = re.compile("timed out|timeout|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)
"""What a collective's error says where another rank hangs or is gone."""

_MEANING = {
    Kind.RECEIVE_FORWARD: "the activations",
    Kind.RECEIVE_BACKWARD: "the gradients of the activations",
    Kind.RECEIVE_TOKENS: "the media tokens",
    Kind.SWAP_TOKENS: "the media tokens",
    Kind.RECEIVE_TOKEN_GRADIENTS: "the gradients of the media tokens",
    Kind.SWAP_TOKEN_GRADIENTS: "the gradients of the media tokens",
}


class Worker(Protocol):
    """What one rank can do; the runtime says when."""

    def compute(self, action: Action) -> None:
        """Does a computation, a gather or a reduction."""
        ...

    def finish(self) -> None:
        """Waits until the device has done what was computed, so that a clock shows when that was."""
        ...

    def outgoing(self, action: Action, ranks: Container[int]) -> list[Message]:
        """What a send, or a swap, carries to each of `ranks`; several messages to one rank go in this order."""
        ...

    def expect(self, action: Action, ranks: Container[int]) -> list[Message]:
        """Buffers for what a receive, or a swap, brings from each of `ranks`: shapes follow from the plan."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a rank stands in a schedule, and how long it waits."""

    schedule: Schedule
    rank: int
    timeout_seconds: float
    in_order: bool
    """Whether messages are posted in the order of the list: NCCL's queue on a stream, and that order is the proven one."""
    waits: Waits = field(default_factory=Waits)
    """Gets what the rank waits for others."""


@dataclass
class _Mail:
    """State: messages that are posted and not awaited, and up to where in the list receives are posted."""

    received: dict[Action, list[tuple[int, dist.Work]]] = field(default_factory=dict)
    sent: deque[tuple[Action, list[tuple[Message, dist.Work]]]] = field(default_factory=deque)
    unseen: list[tuple[Action, Action, int, dist.Work]] = field(default_factory=list)
    posted: int = 0


def execute(place: Place, worker: Worker, clocked: list[Span] | None = None) -> None:
    """Runs this rank's list once.

    Args:
        clocked: gets the span of every computation, in seconds of `time.perf_counter`, if given.

    Raises:
        RankError: a message did not come within the timeout, or a peer is gone: rank, action, and what it waited for.
    """
    program = place.schedule.work.program_of(place.rank)
    if program is None:
        return
    actions = place.schedule.actions[program]
    horizons = _horizons(actions, 0 if place.in_order else _AHEAD)
    mail = _Mail()
    for action, horizon in zip(actions, horizons, strict=True):
        _post_receives(place, worker, mail, actions, horizon)
        if action.kind in COMPUTE or action.kind in (Kind.GATHER, Kind.REDUCE):
            if action.kind in COMPUTE:
                _await_inputs(place, mail, program, action)
            started = time.perf_counter()
            # The sums over ranks that a list has are waits above all.
            waits = nullcontext() if action.kind in COMPUTE else place.waits.clocked()
            with _named(place, action), waits:
                worker.compute(action)
                if clocked is not None:
                    worker.finish()
            if clocked is not None:
                clocked.append(Span(action, started, time.perf_counter()))
        elif not action.receives:
            _send(place, worker, mail, program, action)
    while mail.sent:
        _await_send(place, mail)
    _await_device(place, mail)


def _horizons(actions: Sequence[Action], ahead: int) -> list[int]:
    """Place in the list to the place before which all receives are to be posted then."""
    computations = [at for at, action in enumerate(actions) if action.kind in COMPUTE]
    found, passed = [], 0
    for at, action in enumerate(actions):
        passed += action.kind in COMPUTE
        following = computations[passed + ahead - 1 : passed + ahead]
        found.append(at + 1 if not ahead else max(at + 1, following[0] if following else len(actions)))
    return found


def _post_receives(place: Place, worker: Worker, mail: _Mail, actions: Sequence[Action], horizon: int) -> None:
    programs = place.schedule.work.programs
    for action in actions[mail.posted : horizon]:
        if action.receives:
            with _named(place, action):
                buffers = worker.expect(action, programs[action.peer].ranks)
                works = _post([dist.P2POp(dist.irecv, buffer, peer) for peer, buffer in buffers])
                mail.received[action] = [(peer, work) for (peer, _), work in zip(buffers, works, strict=True)]
    mail.posted = max(mail.posted, horizon)


def _send(place: Place, worker: Worker, mail: _Mail, program: int, action: Action) -> None:
    programs = place.schedule.work.programs
    ranks = programs[action.peer if action.sends else program].ranks
    while len(mail.sent) >= _UNDER_WAY:
        _await_send(place, mail)
    with _named(place, action):
        messages = worker.outgoing(action, ranks)
        buffers = [] if action.sends else worker.expect(action, ranks)
        posts = [dist.P2POp(dist.isend, tensor, peer) for peer, tensor in messages]
        posts += [dist.P2POp(dist.irecv, tensor, peer) for peer, tensor in buffers]
        works = _post(posts)
    # A message's tensor has to live until it is sent.
    mail.sent.append((action, list(zip(messages, works, strict=False))))
    if not action.sends:
        mail.received[action] = [(peer, work) for (peer, _), work in zip(buffers, works[len(messages) :], strict=True)]


def _await_inputs(place: Place, mail: _Mail, program: int, action: Action) -> None:
    schedule = place.schedule
    for need in needs(schedule.work, schedule.shares, program, action):
        for peer, work in mail.received.pop(need, ()):
            _await(place, work, _waiting(action, need, peer))
            if place.in_order:
                mail.unseen.append((action, need, peer, work))


def _await_send(place: Place, mail: _Mail) -> None:
    action, messages = mail.sent.popleft()
    for (peer, _), work in messages:
        _await(place, work, f"{action} waited for rank {peer} to receive")


def _await(place: Place, work: dist.Work, what: str) -> None:
    started = time.monotonic()
    try:
        with place.waits.clocked():
            if place.in_order:
                work.wait()  # of the stream, not of this process
            else:
                work.wait(timedelta(seconds=place.timeout_seconds))
    except RuntimeError as error:
        waited = time.monotonic() - started
        how = f"{waited:.0f} s in vain" if waited > 0.9 * place.timeout_seconds else "until the connection broke"
        raise RankError(f"rank {place.rank}: {what}, {how}") from error


def _await_device(place: Place, mail: _Mail) -> None:
    """On a device whose waits return at once: looks, within the timeout, for the first message that never came."""
    deadline = time.monotonic() + place.timeout_seconds
    for action, need, peer, work in mail.unseen:
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise RankError(f"rank {place.rank}: {_waiting(action, need, peer)}, {place.timeout_seconds:.0f} s in vain")
            time.sleep(0.001)


def _waiting(action: Action, need: Action, peer: int) -> str:
    what = f"{_MEANING[need.kind]} of {need.module}, microbatch {need.microbatch}"
    return f"{action} waited for {what}, from rank {peer} ({need})"


def _post(posts: list[dist.P2POp]) -> list[dist.Work]:
    """Starts the messages of one action together, so that none of them waits for another; a handle for each."""
    works = dist.batch_isend_irecv(posts) if posts else []
    # A backend may answer a batch with one handle for all of it.
    return works if len(works) == len(posts) else works * len(posts)


@contextmanager
def lost_ranks_named(rank: int, timeout_seconds: float, what: object) -> Iterator[None]:
    """Says in our words if a collective in it waits for a rank in vain.

    Raises:
        RankError: instead of the collective's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        raise RankError(
            f"rank {rank}: {what}: a collective in it did not end within {timeout_seconds:g} s, or broke off; "
            f"a rank of the same group hangs, or is gone ({str(error).splitlines()[0]})"
        ) from error


@contextmanager
def _named(place: Place, action: Action) -> Iterator[None]:
    """Says of any fault on which rank and in which action it happened."""
    with lost_ranks_named(place.rank, place.timeout_seconds, action):
        try:
            yield
        except MeshweaveError:
            raise
        except Exception as error:
            error.add_note(f"on rank {place.rank}, in {action}")
            raise
