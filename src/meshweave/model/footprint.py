"""How much of a module does each rank hold? Parameters and bytes, from shapes and layouts alone."""

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from torch import nn

from meshweave.layout import Layout, Placement
from meshweave.model.experts import expert_parameters
from meshweave.model.families import tensor_plans
from meshweave.model.families.plan import matches, of_experts
from meshweave.model.modules import ModelGraph, first_names
from meshweave.model.parts import parts_of

COPIES = 4
"""Tensors kept for one parameter: itself, its gradient, and AdamW's two moments, all in the stored dtype."""

GATHERED_COPIES = 2
"""Tensors kept for a parameter that is gathered for a step: itself and its gradient."""

SPLIT_DIMS: Mapping[str, tuple[int, int | None]] = {
    "colwise": (-2, 0),
    "colwise_gather_output": (-2, 0),
    "colwise_rep": (-2, 0),
    "packed_colwise": (-2, 0),
    "rowwise": (-1, None),
    "rowwise_rep": (-1, None),
    "rowwise_split_input": (-1, None),
    "packed_rowwise": (-1, None),
    "embedding_rowwise": (0, None),
    "embedding_colwise": (1, None),
}
"""Style of a tensor-parallel plan to the dims of weight and bias that `tp` splits; others split nothing."""


@dataclass(frozen=True)
class ModuleFootprint:
    """How many parameters a module has, and how many of them each of its ranks holds."""

    parameters: int
    """Of the whole module; tied ones once."""
    local: Mapping[int, int]
    """Rank to the parameters it holds. Parameters that tie the first stage to the last count on both."""
    parameter_bytes: int
    """Bytes of one stored parameter."""
    gathered: Mapping[int, int] = field(default_factory=dict)
    """Rank to the parameters of other lanes that it also holds, with gradients, throughout a step."""

    def local_bytes(self, rank: int) -> int:
        """Bytes of `rank`'s parameters, gradients and AdamW state (no activations)."""
        return (self.local.get(rank, 0) * COPIES + self.gathered.get(rank, 0) * GATHERED_COPIES) * self.parameter_bytes


def footprints(
    graph: ModelGraph,
    placements: Mapping[str, Placement],
    data_parallel: Mapping[str, Literal["shard", "replicate"]],
    cuts: Mapping[str, tuple[range, ...]],
    gathered: Container[str] = (),
) -> dict[str, ModuleFootprint]:
    """Footprint of every placed module.

    Args:
        graph: a model in its stored dtype, not split; on the meta device it costs no memory.
        data_parallel: module to how it is kept over `dp`.
        cuts: module to the blocks of each of its (virtual) stages, as `stage_cuts` says.
        gathered: modules whose parameters stay gathered over `dp` through a step (`Schedule.streams` is False).

    Raises:
        LayoutError: a module has `tp` above 1, but no tensor-parallel plan.
    """
    return {
        name: _footprint(graph, name, placement, data_parallel[name] == "shard", cuts[name], name in gathered)
        for name, placement in placements.items()
    }


def _footprint(
    graph: ModelGraph, name: str, placement: Placement, sharded: bool, cut: Sequence[range], gathered: bool
) -> ModuleFootprint:
    layout = placement.layout
    parameters = graph.parameters(name)
    split = _split_dims(graph, name) if layout.tp > 1 else {}
    experts = expert_parameters(graph, name) if layout.ep * layout.etp > 1 else {}
    lanes = layout.dp * layout.cp if sharded else 1  # ranks that share a sequence keep parameters as lanes do
    held, whole_held, held_experts = {}, {}, {}
    for position in range(layout.pp):
        own = _of_stages(graph, name, parameters, [cut[stage] for stage in range(position, len(cut), layout.pp)], len(cut))
        # A model has a few distinct shapes and thousands of parameters.
        shapes = Counter((tuple(value.shape), split.get(key)) for key, value in own.items() if key not in experts)
        held_experts[position] = _held_experts({key: value for key, value in own.items() if key in experts}, layout, sharded)
        for tp in range(layout.tp):
            whole_held[position, tp] = sum(
                count * _part(shape, dim, layout.tp, tp, 1, 0) for (shape, dim), count in shapes.items()
            )
            for dp in range(lanes):
                parts = (count * _part(shape, dim, layout.tp, tp, lanes, dp) for (shape, dim), count in shapes.items())
                held[position, tp, dp] = sum(parts)
    local, others = {}, {}
    for rank in placement.ranks:
        coordinate = placement.coordinate(rank)
        assert coordinate is not None
        here, whole_here = held_experts[coordinate["pp"]]
        lane = coordinate["dp"] * layout.cp + coordinate["cp"] if sharded else 0
        local[rank] = held[coordinate["pp"], coordinate["tp"], lane] + here
        if gathered:
            others[rank] = whole_held[coordinate["pp"], coordinate["tp"]] + whole_here - local[rank]
    first = next(iter(parameters.values()))
    whole = sum(value.numel() for value in parameters.values())
    return ModuleFootprint(whole, local, first.element_size(), others)


def _held_experts(parameters: Mapping[str, nn.Parameter], layout: Layout, sharded: bool) -> tuple[int, int]:
    """Elements of expert weights that a rank of a stage holds, and those it holds while they are gathered over `edp`.

    Every rank holds as many: nothing is split that does not divide.
    """
    whole = sum(value.numel() for value in parameters.values()) // (layout.ep * layout.etp)
    (edp,) = layout.sizes(("edp",))
    return whole // edp if sharded else whole, whole


def _of_stages(
    graph: ModelGraph, name: str, parameters: Mapping[str, nn.Parameter], stages: Sequence[range], count: int
) -> Mapping[str, nn.Parameter]:
    """The parameters on some of a module's `count` stages; tied ones under their first name."""
    if count == 1:
        return parameters
    first = first_names(graph.model)
    own = {
        first[f"{path}.{key}"]
        for path, block in parts_of(graph, name).owners().items()
        if any(block in blocks for blocks in stages)
        for key, _ in graph.model.get_submodule(path).named_parameters()
    }
    if any(blocks.stop == len(graph.blocks(name)) for blocks in stages):
        own |= set(graph.loose.get(name, ()))
    return {key: value for key, value in parameters.items() if key in own}


def _part(shape: tuple[int, ...], dim: int | None, tp_size: int, tp: int, dp_size: int, dp: int) -> int:
    """Elements of one parameter on the rank at (`tp`, `dp`): `dim` is cut over tp, then dim 0 over dp."""
    sizes = list(shape)
    if dim is not None:
        sizes[dim] = _chunk(sizes[dim], tp_size, tp)
    if sizes:
        sizes[0] = _chunk(sizes[0], dp_size, dp)
    return prod(sizes)


def _chunk(size: int, parts: int, index: int) -> int:
    """Length of the `index`-th chunk that torch.chunk makes of `size`."""
    length = -(-size // parts)
    return max(0, min(length, size - index * length))


def _split_dims(graph: ModelGraph, name: str) -> dict[str, int | None]:
    """Full parameter name to the dim that `tp` splits, for the parameters that the plans split."""
    found: dict[str, int | None] = {}
    for child, plan in tensor_plans(graph, name).items():
        for pattern, style in plan.rules.items():
            if style not in SPLIT_DIMS or of_experts(pattern, style):
                continue
            for key, value in matches(graph.model.get_submodule(child), pattern):
                if isinstance(value, nn.Parameter):
                    found[f"{child}.{key}"] = _split_dim(value, style)
    return found


def _split_dim(parameter: nn.Parameter, style: str) -> int | None:
    weight, bias = SPLIT_DIMS[style]
    return bias if parameter.ndim == 1 else weight
