"""How much work is in a module? Model FLOPs of one sample or media item, from shapes alone."""

from dataclasses import dataclass
from math import prod

from torch import nn

from meshweave.batch.plan import MediaMeta
from meshweave.config import LANGUAGE
from meshweave.model.modules import ModelGraph, module_config

TRAINING_FACTOR = 3
"""A backward costs two forwards."""


@dataclass(frozen=True)
class ModuleFlops:
    """Forward FLOPs of one sequence: `per_token · tokens + per_output · outputs + per_pair · Σ window²`.

    The usual count of matrix products (PaLM, arXiv 2204.02311, appendix B), attention in full where it is causal too; of experts
    only those that a token goes to; padding and recomputation are not work.
    """

    per_token: int
    """FLOPs per token of the blocks: text and media tokens, or patches."""
    per_output: int
    """FLOPs per media token that leaves an encoder (projector, mergers)."""
    per_pair: int
    """FLOPs per pair of tokens that attend to each other."""

    def sample(self, tokens: int) -> int:
        """Forward FLOPs of the language model for one sample of this fused length."""
        return self.per_token * tokens + self.per_pair * tokens**2

    def item(self, meta: MediaMeta) -> int:
        """Forward FLOPs of an encoder for one media item; frames attend within themselves."""
        grid = meta.grid or (meta.tokens,)
        frames, *sides = grid if len(grid) > 1 else (1, *grid)
        patches = prod(sides)
        return frames * (self.per_token * patches + self.per_pair * patches**2) + self.per_output * meta.tokens


def count_flops(graph: ModelGraph, name: str) -> ModuleFlops:
    """Coefficients for one module of a (meta or real) unsharded model."""
    blocks = graph.blocks(name)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    per_token = per_output = 0
    for module in graph.of_module(name).values():
        for part in module.modules():
            for parameter in part.parameters(recurse=False):
                if parameter.ndim < 2 or isinstance(part, nn.Embedding):
                    continue
                if name == LANGUAGE or id(parameter) in inside or not isinstance(part, nn.Linear):
                    per_token += _product(part, parameter)
                else:
                    per_output += _product(part, parameter)
    return ModuleFlops(per_token, per_output, 4 * sum(_attention_width(graph, name, block) for block in blocks))


def product_flops(module: nn.Module) -> int:
    """FLOPs of the matrix products of a module's own parameters, for each of its inputs; looking up embeddings is free."""
    return sum(
        _product(part, parameter)
        for part in module.modules()
        for parameter in part.parameters(recurse=False)
        if parameter.ndim >= 2 and not isinstance(part, nn.Embedding)
    )


def _product(part: nn.Module, parameter: nn.Parameter) -> int:
    """FLOPs of one product with a weight of `part`; of experts, those of the few that a token goes to."""
    chosen = getattr(getattr(part, "config", None), "num_experts_per_tok", None)
    if parameter.ndim == 3 and chosen is not None:
        return 2 * parameter.numel() * int(chosen) // parameter.shape[0]
    return 2 * parameter.numel()


def _attention_width(graph: ModelGraph, name: str, block: nn.Module) -> int:
    """Of what a block's attention weighs: all heads together; 0 where its cost does not grow with pairs (linear attention)."""
    if name == LANGUAGE:
        attention = getattr(block, "self_attn", None)
        output = getattr(attention, "o_proj", None)
        if attention is None or isinstance(output, nn.Linear):
            return 0 if attention is None else output.in_features  # type: ignore[union-attr]
    width: int = module_config(graph.model.config, name).hidden_size
    return width
