"""What does one rank compute in a step? Forward and backward of its stages, and what it sends and receives for them.

The boundary and the ends of stages are crossed outside autograd: each side runs its own backward, on whichever ranks it lives.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from meshweave.config import LANGUAGE
from meshweave.data.dataset import IGNORE
from meshweave.data.loader import LanguageBatch, LocalStep
from meshweave.errors import DataError
from meshweave.model.encoder import EncoderStage, received_shapes
from meshweave.model.language import LanguageStage
from meshweave.model.routing import balance
from meshweave.model.slicing import LanePart
from meshweave.parallel.build import LocalModel
from meshweave.parallel.context import SequencePlan
from meshweave.parallel.data import synchronize_gradients
from meshweave.parallel.mesh import axis_mesh
from meshweave.parallel.step_gather import accumulate, gather, reduce
from meshweave.schedule.actions import Action, Kind
from meshweave.schedule.runtime import Message
from meshweave.schedule.schedule import Schedule
from meshweave.sequence.grid import LaneGrid
from meshweave.step.split_backward import SplitBackward
from meshweave.step.token_mail import TokenMail, sends_of
from meshweave.world import World

_Key = tuple[str, int, int]
"""Module, virtual stage, and pass or microbatch."""


@dataclass(frozen=True)
class Travel:
    """What tensors look like between ranks."""

    widths: Mapping[str, tuple[int, ...]]
    """Encoder to the width of every tensor of a media token (`media_widths`)."""
    hidden: int
    """Width of the language model's activations."""
    dtype: torch.dtype
    """Of activations, media tokens and their gradients."""


@dataclass
class _Done:
    """A forward that waits for its backward: what came in, and what went out."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    media: Mapping[str, Tensor] = field(default_factory=dict)
    split: SplitBackward | None = None


class StepWorker:
    """A rank's part of one step, for `schedule.runtime.execute`.

    State: activations and messages under way, and the sums over this rank's samples.
    """

    def __init__(self, model: LocalModel, step: LocalStep, world: World, schedule: Schedule, travel: Travel) -> None:
        self.model, self.step, self.world, self.schedule, self.travel = model, step, world, schedule, travel
        self.sums = torch.zeros(5, dtype=torch.float64, device=world.device)
        """Loss of the tokens that this rank answers for; on the rank that leads its lane, target tokens, exact samples and
        samples; this rank's part of the load-balancing loss, by target tokens."""
        routing = model.routing
        size = (routing.layers, routing.experts) if routing else (0, 0)
        self.load = torch.zeros(size, dtype=torch.float64, device=world.device)
        """[layers with a router, experts] (token, slot) pairs of this rank."""
        program = schedule.work.program_of(world.rank)
        actions = () if program is None else schedule.actions[program]
        self._nothing = {
            name: torch.zeros(0, sum(widths), dtype=travel.dtype, device=world.device) for name, widths in travel.widths.items()
        }
        self._tokens = TokenMail(step.crossings, world.rank, self._nothing, sends_of(actions))
        self._done: dict[_Key, _Done] = {}
        self._received: dict[tuple[Kind, str, int, int], tuple[Tensor, ...]] = {}
        self._to_send: dict[tuple[Kind, str, int, int], tuple[Tensor, ...]] = {}
        self._attends: dict[int, SequencePlan] = {}
        self._last = {name: _last_work(step, name) for name in model.modules}

    def compute(self, action: Action) -> None:
        """Does a computation, a gather or a reduction."""
        kind, module, stage, number, _ = action
        match kind:
            case Kind.GATHER | Kind.REDUCE:
                for part in self.model.modules[module].stages.values():
                    gather(part) if kind == Kind.GATHER else reduce(part)
            case Kind.FORWARD:
                with torch.set_grad_enabled(self.schedule.work.modules[module].backward):
                    if module == LANGUAGE:
                        self._language_forward(stage, number)
                    else:
                        self._encoder_forward(module, stage, number)
            case Kind.WEIGHT_GRADIENT:
                split = self._done.pop((module, stage, number)).split
                assert split is not None
                split.weight_gradients()
                accumulate(self.model.modules[module].stages[stage])
            case _:
                self._backward(action)

    def finish(self) -> None:
        """Waits until the device has done what was computed."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)

    def outgoing(self, action: Action, ranks: Container[int]) -> list[Message]:
        """What a send, or a swap, carries to each of `ranks`."""
        if action.kind not in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD):
            return self._tokens.outgoing(action, ranks)
        peer = self._neighbour(action.module, 1 if action.kind == Kind.SEND_FORWARD else -1)
        return [(peer, tensor) for tensor in self._to_send.pop(action[:4])]

    def expect(self, action: Action, ranks: Container[int]) -> list[Message]:
        """Buffers for what a receive, or a swap, brings from each of `ranks`."""
        if action.kind not in (Kind.RECEIVE_FORWARD, Kind.RECEIVE_BACKWARD):
            return self._tokens.expect(action, ranks)
        kind, module, stage, number, _ = action
        forward = kind == Kind.RECEIVE_FORWARD
        # A backward brings what the next stage's forward got.
        shapes = self._shapes(module, stage if forward else stage + 1, number)
        buffers = tuple(torch.empty(shape, dtype=self.travel.dtype, device=self.world.device) for shape in shapes)
        self._received[action[:4]] = buffers
        peer = self._neighbour(module, -1 if forward else 1)
        return [(peer, buffer) for buffer in buffers]

    def _neighbour(self, module: str, step: int) -> int:
        pipeline = self.world.placements[module].group(self.world.rank, "pp")
        return pipeline[(pipeline.index(self.world.rank) + step) % len(pipeline)]

    def _shapes(self, module: str, stage: int, number: int) -> tuple[tuple[int, ...], ...]:
        """Of what a stage receives in a forward."""
        if module == LANGUAGE:
            batch = self.step.language[number]
            assert batch is not None
            return ((batch.grid.rows, self.model.part.own_length(batch.grid), self.travel.hidden),)
        media = self.step.media[module][number]
        if media is None:
            return ()
        return received_shapes(self.model.graph.model.config, module, self.model.cuts[module][stage], media.items)

    def _inputs(self, module: str, stage: int, number: int) -> tuple[Tensor, ...]:
        received = self._received.pop((Kind.RECEIVE_FORWARD, module, stage, number), ())
        for tensor in received:
            tensor.requires_grad_(torch.is_grad_enabled())
        return received

    def _language_forward(self, stage: int, number: int) -> None:
        batch, plan = self.step.language[number], self.step.plan.microbatches[number]
        lane = self.world.placements[LANGUAGE].lane(self.world.rank)
        assert batch is not None and lane is not None
        work = self.schedule.work
        inputs = self._inputs(LANGUAGE, stage, number)
        media = {}
        for encoder in work.encoders:
            if stage == 0:
                media[encoder] = self._tokens.taken(encoder, number, False)
                media[encoder].requires_grad_(torch.is_grad_enabled() and work.modules[encoder].backward)
        split = SplitBackward() if work.modules[LANGUAGE].split else None
        parts = {name: tokens.split(self.travel.widths[name], dim=1) for name, tokens in media.items() if len(tokens)}
        labels = batch.labels.to(self.world.device)
        arguments = {
            "input_ids": batch.input_ids.to(self.world.device),
            "grid": batch.grid,
            "sequence": self._attention(number, batch.grid),
            "media": parts,
            "items": [item for sample in plan.lanes[lane] for item in sample.media],
            "hidden": inputs[0] if inputs else None,
            "labels": labels,
        }
        if stage == 0 and (self.schedule.streams(LANGUAGE) or work.modules[LANGUAGE].together or batch.grid.cut):
            # Lanes that gather parameters or use experts together, and ranks that share a sequence, must also go backward
            # together, those without media, too.
            wanted = [tokens[:0] for name, tokens in media.items() if tokens.requires_grad and plan.items[name]]
            arguments["anchor"] = wanted[0] if wanted else None
        module = self.model.modules[LANGUAGE].stages[stage]
        if split is not None:
            with split.recording():
                result = module(**arguments)
        else:
            result = module(**arguments)
        if stage < work.last(LANGUAGE):
            outputs: tuple[Tensor, ...] = (result,)
            self._send_on(Kind.SEND_FORWARD, LANGUAGE, stage, number, outputs)
        else:
            loss, exact = result
            outputs = (loss,)
            if self.world.leads_lane:
                self.sums += _sums(labels, exact, len(plan.lanes[lane]))
            coordinate = self.world.placements[LANGUAGE].coordinate(self.world.rank)
            assert coordinate is not None
            if not (module.loss_is_shared and coordinate["tp"]):
                self.sums[0] += loss.detach()
        assert isinstance(module, LanguageStage)
        outputs += self._balance(module, batch)
        if torch.is_grad_enabled():
            self._done[LANGUAGE, stage, number] = _Done(inputs, outputs, media, split)

    def _attention(self, number: int, grid: LaneGrid) -> SequencePlan | None:
        """How this lane attends in a microbatch; None where the stock implementation does."""
        if grid.sequence is None:
            return None
        if number not in self._attends:
            self._attends[number] = SequencePlan(grid.sequence, grid.parts, self.model.part.rule.masks, self.model.context)
        return self._attends[number]

    def _balance(self, stage: LanguageStage, batch: LanguageBatch) -> tuple[Tensor, ...]:
        """The load-balancing loss of a forward, as one further output; none without a backward, or in a stage without routers."""
        logits, routing = stage.routed.take(), self.model.routing
        if routing is None or not logits or not torch.is_grad_enabled():
            return ()
        targets = int((batch.labels[:, 1:] != IGNORE).sum()) if self.world.speaks_for_stage else 0
        real = torch.from_numpy(batch.grid.real())[:, self.model.part.own(batch.grid)]
        groups = _token_groups(self.model.part, self.world.meshes[LANGUAGE], routing.scope)
        its = balance(logits, real.flatten().to(self.world.device), targets, routing, groups)
        self.load[stage.routed.layers] += its.load
        self.sums[4] += its.loss.detach()
        return (routing.coefficient * its.loss,) if routing.coefficient else ()

    def _encoder_forward(self, encoder: str, stage: int, number: int) -> None:
        media = self.step.media[encoder][number]
        served = self.schedule.work.modules[encoder].served(number, self.schedule.work.microbatches)
        last = stage == self.schedule.work.last(encoder)
        outputs: tuple[Tensor, ...] = ()
        inputs = self._inputs(encoder, stage, number)
        if media is not None:
            given = {name: self._to_device(value) for name, value in media.inputs.items()}
            part = self.model.modules[encoder].stages[stage]
            if stage:
                assert isinstance(part, EncoderStage)
                given |= part.sizes(media.items, self.world.device)
            outputs = tuple(part(given, inputs))
        if not last:
            self._send_on(Kind.SEND_FORWARD, encoder, stage, number, outputs)
        else:
            joined = torch.cat(outputs, dim=1) if outputs else self._nothing[encoder]
            outputs = (joined,) if outputs else ()
            rows = media.tokens if media is not None else (0,) * len(served)
            if media is not None and not media.dummy and len(joined) != sum(rows):
                raise DataError(
                    f"{encoder}, pass {number}, on rank {self.world.rank}: the encoder made {len(joined)} media tokens of "
                    f"{len(media.items)} items, the data counts {sum(rows)}; model folder and processor do not fit together"
                )
            parts = joined.detach()[: sum(rows)].split(list(rows))  # a dummy's tokens go nowhere
            for microbatch, part in zip(served, parts, strict=True):
                self._tokens.put(encoder, microbatch, False, part)
        if torch.is_grad_enabled():
            self._done[encoder, stage, number] = _Done(inputs, outputs)

    def _backward(self, action: Action) -> None:
        _, module, stage, number, _ = action
        done = self._done[module, stage, number]
        if self.schedule.streams(module):
            # Summed over lanes once, in the last pass in which the module works at all.
            synchronize_gradients(self.model.modules[module].stages[stage], number == self._last[module])
        gradients = self._gradients(module, stage, number, done)
        media = [tokens for tokens in done.media.values() if tokens.requires_grad]
        wanted = [*done.inputs, *media]
        # A loss goes without.
        gradients += (None,) * (len(done.outputs) - len(gradients))
        pairs = [(output, gradient) for output, gradient in zip(done.outputs, gradients, strict=True) if output.requires_grad]
        outputs, given = [output for output, _ in pairs], [gradient for _, gradient in pairs]
        found: list[Tensor | None] = [None] * len(wanted)
        if pairs and done.split is not None:
            parameters = self.model.modules[module].stages[stage].parameters()
            found = done.split.input_gradients(outputs, given, wanted, parameters)
        elif pairs:
            torch.autograd.backward(outputs, given)
            found = [tensor.grad for tensor in wanted]
        whole = [
            torch.zeros_like(tensor) if gradient is None else gradient for tensor, gradient in zip(wanted, found, strict=True)
        ]
        if stage:
            self._send_on(Kind.SEND_BACKWARD, module, stage, number, tuple(whole[: len(done.inputs)]))
        for encoder, gradient in zip(
            (name for name, tokens in done.media.items() if tokens.requires_grad), whole[len(done.inputs) :], strict=True
        ):
            self._tokens.put(encoder, number, True, gradient)
        if done.split is None:
            del self._done[module, stage, number]
        else:
            self._done[module, stage, number] = _Done((), (), split=done.split)

    def _gradients(self, module: str, stage: int, number: int, done: _Done) -> tuple[Tensor | None, ...]:
        """Gradients of what a forward put out."""
        work = self.schedule.work
        if stage < work.last(module):
            return self._received.pop((Kind.RECEIVE_BACKWARD, module, stage, number))
        if module == LANGUAGE:
            return (None,)
        taken = [
            self._tokens.taken(module, served, True)
            for served in work.modules[module].served(number, self.schedule.work.microbatches)
        ]
        media = self.step.media[module][number]
        if media is None:
            return ()
        return (torch.zeros_like(done.outputs[0]) if media.dummy else torch.cat(taken),)

    def _send_on(self, kind: Kind, module: str, stage: int, number: int, tensors: tuple[Tensor, ...]) -> None:
        self._to_send[kind, module, stage, number] = tuple(tensor.detach().contiguous() for tensor in tensors)

    def _to_device(self, value: Tensor) -> Tensor:
        if value.is_floating_point():
            return value.to(self.world.device, self.travel.dtype)
        return value.to(self.world.device)


def _token_groups(part: LanePart, mesh: DeviceMesh, scope: Literal["lane", "microbatch"]) -> list[dist.ProcessGroup]:
    """Groups over which the tokens of one lane's microbatch, or of a whole microbatch, lie in one stage of the language model.

    Sums over one after the other are sums over all of them.
    """
    lanes = axis_mesh(mesh, "dp")  # with `cp`
    assert lanes is not None
    across = part.cp_groups if scope == "lane" else [lanes.get_group()]
    return [*across, *([part.tp_group] if part.tp_group is not None else [])]


def _sums(labels: Tensor, exact: Tensor | None, samples: int) -> Tensor:
    sums = torch.zeros(5, dtype=torch.float64, device=labels.device)
    sums[1] = (labels[:, 1:] != IGNORE).sum()
    sums[2] = exact.sum() if exact is not None else 0
    sums[3] = samples
    return sums


def _last_work(step: LocalStep, module: str) -> int:
    """The last pass in which the module works at all, on any rank."""
    if module == LANGUAGE:
        return len(step.plan.microbatches) - 1
    passes = step.plan.passes(module)
    return max((number for number, served in enumerate(passes) if any(part.items[module] for part in served)), default=-1)
