"""How evenly do routers use their experts? The load-balancing loss, and what it needs of a forward.

Of a group of tokens (one lane's microbatch, or all lanes of a microbatch; padding left out) the loss is the mean over layers of
`experts · Σ_e f_e · P_e`: f_e is the share of the group's (token, slot) pairs that went to expert e, P_e the mean probability
that the router gave it. It is 1 where the load is even. A group counts with its number of target tokens, so that a step's loss
is (Σ token losses + coefficient · Σ_groups targets · loss of the group) / target tokens of the step.
Routers are taken to turn their logits into probabilities by a softmax.
(transformers' own pools all layers and counts every slot by itself: `num_experts_per_tok` times as much where the load is even.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedConfig

from meshweave.config import LANGUAGE, RunConfig
from meshweave.model.experts import routers
from meshweave.model.modules import ModelGraph, module_config


@dataclass(frozen=True)
class Routing:
    """How a model routes tokens, and what that adds to the loss."""

    layers: int
    """Layers with a router."""
    experts: int
    """Of each of them."""
    chosen: int
    """Experts that one token goes to."""
    coefficient: float
    """Of the load-balancing loss; 0 leaves it out."""
    scope: Literal["lane", "microbatch"]
    """What makes a group of tokens."""


@dataclass(frozen=True)
class Balance:
    """What one rank's tokens contribute."""

    loss: Tensor
    """Target tokens of the group · its loss, this rank's part (scalar): parts add up over ranks and stages."""
    load: Tensor
    """`[layers of the stage, experts]` float64: how many of this rank's (token, slot) pairs went to each expert."""


def routing_of(run: RunConfig, graph: ModelGraph) -> Routing | None:
    """How the language model routes; None if it has no routers that transformers can record."""
    layers = routers(graph)
    if not layers:
        return None
    text = module_config(graph.model.config, LANGUAGE)
    return Routing(
        len(layers), text.num_experts, text.num_experts_per_tok, router_coefficient(run, text), run.train.router_aux_scope
    )


def router_coefficient(run: RunConfig, text: PreTrainedConfig) -> float:
    """What the run says; else the model's own, if its config asks for the loss by `output_router_logits`."""
    if run.train.router_aux_loss is not None:
        return run.train.router_aux_loss
    return getattr(text, "router_aux_loss_coef", 0.0) if getattr(text, "output_router_logits", False) else 0.0


class RoutingRecord:
    """Keeps what the routers of some blocks put out. State: the logits of the last forward, until they are taken."""

    def __init__(self, graph: ModelGraph, blocks: range) -> None:
        inside = {id(part) for block in (graph.blocks(LANGUAGE)[number] for number in blocks) for part in block.modules()}
        every = list(routers(graph).values())
        self.layers = [number for number, (router, _) in enumerate(every) if id(router) in inside]
        """Of all layers with a router, those recorded here."""
        self._logits: list[Tensor] = []
        for number in self.layers:
            router, index = every[number]
            router.register_forward_hook(partial(self._record, index))

    def take(self) -> list[Tensor]:
        """`[tokens, experts]` of every recorded layer, in order; forgets them."""
        taken, self._logits = self._logits, []
        return taken

    def _record(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._logits.append(output[index] if isinstance(output, tuple) else output)


def balance(
    logits: Sequence[Tensor], real: Tensor, targets: float, routing: Routing, groups: Sequence[dist.ProcessGroup]
) -> Balance:
    """The load-balancing loss of one forward.

    Args:
        logits: `[tokens, experts]` of every layer of the stage, of this rank's tokens.
        real: `[tokens]` bool, whether it is a token and no padding.
        targets: this rank's part of the group's target tokens.
        groups: process groups along which the token group lies; sums over one after the other give those over all its ranks. Only
            counts are summed: no gradient needs to travel.
    """
    every = torch.stack(list(logits))
    probabilities = every.softmax(-1, dtype=torch.promote_types(every.dtype, torch.float32))
    with torch.no_grad():
        kept = real.to(torch.float64)
        chosen = probabilities.topk(routing.chosen, dim=-1).indices.flatten(1)
        pairs = kept.repeat_interleave(routing.chosen).expand(len(every), -1)
        load = torch.zeros(len(every), routing.experts, dtype=torch.float64, device=every.device).scatter_add_(1, chosen, pairs)
        sums = torch.cat([load.flatten(), kept.sum().view(1), kept.new_tensor([targets])])
        for group in groups:
            dist.all_reduce(sums, group=group)
        tokens, every_target = sums[-2].clamp(min=1), sums[-1]
        shares = sums[:-2].view_as(load) / (tokens * routing.chosen)
        factors = shares * every_target * routing.experts / tokens / routing.layers
    # P is a mean over all tokens of the group; of its sum this rank has its own.
    sums_here = torch.einsum("lte,t->le", probabilities, real.to(probabilities.dtype))
    return Balance((sums_here * factors.to(sums_here.dtype)).sum(), load)
