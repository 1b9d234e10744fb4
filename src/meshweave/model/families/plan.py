"""How does a model split over `tp`, and where may it be cut into stages? As data, next to the model it belongs to."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

PARTIAL_GRADIENT = "replicated_with_grad_allreduce"
"""Style of a replicated parameter that sees only this rank's heads (Qwen3's q_norm): its gradient is a partial sum over `tp`."""

GATHERED_HEAD = "colwise_gather_output"
"""Style of a head whose vocabulary is split over `tp`."""

SEQUENCE_STYLES = frozenset({"colwise", "rowwise", GATHERED_HEAD, PARTIAL_GRADIENT})
"""Styles that work where activations between blocks are cut along the sequence."""

PACKED_QKV = "packed_qkv"
"""Style (ours) of a fused query-key-value projection: parameters whole over `tp`, computed by heads."""


@dataclass(frozen=True)
class TensorPlan:
    """How one transformers model splits over `tp`."""

    rules: Mapping[str, str] = field(default_factory=dict)
    """Module or parameter name, `*` for a layer number, to the name of a transformers style."""
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Module name to the attributes that count its heads or their width, where the forward reads them: divided by `tp`."""
    unless: str | None = None
    """Key of the model's config that, where it is set, makes this plan wrong."""


@dataclass(frozen=True)
class CutPlan:
    """How one transformers model may be cut into pipeline stages: between its blocks. Names are relative to it."""

    blocks: str
    """The list of blocks."""
    before: tuple[str, ...]
    """Modules that run before the blocks and whose output is the hidden state."""
    added: tuple[str, ...] = ()
    """Modules before the blocks whose output is added to the hidden state."""
    taps: str | None = None
    """List of modules, each of which turns the output of one block into a further feature of every media token."""
    tapped: str | None = None
    """Key of the config that lists the number of the block of each tap."""
    tupled: bool = False
    """Whether a block returns the hidden state as the first of a tuple."""
    shaped: tuple[str, ...] = ()
    """Modules before these, of whose output a later stage needs the shape alone."""
    hidden: Literal["patches", "squares", "sequence", "sounds", "frames", "tokens"] = "patches"
    """Of an encoder, the shape of its hidden state: `[patches of all items, width]`, `[squares of all items, positions, width]`,
    `[1, patches of all items, width]`, `[sounds, positions, width]`, `[half of the frames of all sounds, width]` or
    `[media tokens, width]`."""
    extra_positions: int = 0
    """Positions of a square beside its patches."""


@dataclass(frozen=True)
class PatchPlan:
    """How the patches of one encoder are shared out over `cp`. Names are relative to it.

    Its blocks take `[patches of all items, width]` and the angles of their position embeddings, and hand further arguments on to
    attention.
    """

    blocks: str
    """The list of blocks."""
    merged: tuple[str, ...]
    """Modules that turn patches into media tokens, or into further features of these."""


def matches(module: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    """Modules that `pattern` names, each after its own parameters, and parameters that it names; the empty one is the root."""
    name_of = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    for name, child in module.named_modules():
        if name_of.fullmatch(name):
            yield from child.named_parameters(prefix=name, recurse=False)
            yield name, child
    for name, parameter in module.named_parameters():
        if name_of.fullmatch(name):
            yield name, parameter


def of_experts(pattern: str, style: str) -> bool:
    """Whether a rule splits experts, which sequence parallelism leaves whole: every rank has tokens of its own for them."""
    return ".experts" in pattern or style in ("packed_colwise", "packed_rowwise", "moe_tp_experts")
