"""What does this rank hold? Builds its part of every module it belongs to."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig

from meshweave.config import LANGUAGE, RunConfig
from meshweave.layout import Layout, Placement
from meshweave.model.blueprint import STORED, blueprint_of
from meshweave.model.encoder import EncoderStage
from meshweave.model.experts import expert_layers, lane_dim
from meshweave.model.families import patch_plan, tensor_plans
from meshweave.model.frozen import frozen_names
from meshweave.model.language import LanguageStage
from meshweave.model.modules import ModelGraph, first_names, graph_of
from meshweave.model.routing import Routing, routing_of
from meshweave.model.slicing import LanePart, sequence_rule
from meshweave.model.stages import stage_cuts
from meshweave.model.weights import fill_pretrained, fill_seeded, materialise
from meshweave.parallel.context import IMPLEMENTATION, ContextGroups, context_groups
from meshweave.parallel.context.patches import PATCH_IMPLEMENTATION, share_patches
from meshweave.parallel.data import ExpertLayers, data_parallel
from meshweave.parallel.expert import expert_parallel
from meshweave.parallel.mesh import axis_mesh
from meshweave.parallel.tensor import replicated_names, sequence_parallel, tensor_parallel
from meshweave.sequence.grid import SequenceRule


@dataclass(frozen=True)
class LocalModule:
    """This rank's part of one module."""

    name: str
    stages: Mapping[int, nn.Module]
    """(Virtual) stage to its `EncoderStage` or `LanguageStage`, ascending; `{0: …}` where the module is not cut."""
    parameters: Mapping[str, nn.Parameter]
    """Full transformers name to this rank's part (a DTensor where sharded); a tied one under its first name."""
    partial: tuple[str, ...]
    """Names of the parameters whose gradients are partial sums over `tp`."""
    tied: frozenset[str]
    """Names of the parameters that first and last stage both hold, on different ranks: their gradients are to be summed."""
    copies: frozenset[str]
    """Those of `tied` that this rank holds a second time: it is of the last stage."""


@dataclass(frozen=True)
class LocalModel:
    """This rank's part of the model: the modules it belongs to, in the order of the run file."""

    graph: ModelGraph
    modules: Mapping[str, LocalModule]
    cuts: Mapping[str, tuple[range, ...]]
    """Every module of the run, also those of other ranks, to the blocks of each of its (virtual) stages."""
    part: LanePart
    """What this rank holds of its language-model lane's sequences."""
    context: ContextGroups | None
    """With whom it attends; None where it has its lane's sequences for itself."""
    routing: Routing | None = None
    """How the language model routes tokens to experts, if it has any."""


def build_model(
    run: RunConfig,
    model_config: PreTrainedConfig,
    placements: Mapping[str, Placement],
    meshes: Mapping[str, DeviceMesh],
    rank: int,
    device: torch.device,
    expert_meshes: Mapping[str, DeviceMesh] | None = None,
) -> LocalModel:
    """Builds, shards and fills this rank's part of the model. Modules that split their experts need a mesh in `expert_meshes`.

    Raises:
        CheckpointError: the folder's weights are missing or do not fit.
        LayoutError: a module has no tensor-parallel plan, or cannot be cut into its stages.
    """
    stored = STORED[run.dtype]
    graph = graph_of(blueprint_of(model_config, stored))
    blueprint = blueprint_of(model_config, stored)
    cuts = stage_cuts(run, graph)
    modules = {}
    context = {name: _context(run, model_config, name, placement, rank) for name, placement in placements.items()}
    part = _lane_part(sequence_rule(run, model_config), placements[LANGUAGE], meshes[LANGUAGE], context[LANGUAGE], rank)
    if part.rule.packed:
        text: Any = graph.model.base_model.language_model
        text.set_attn_implementation(IMPLEMENTATION)
    for name, placement in placements.items():
        coordinate = placement.coordinate(rank)
        if coordinate is None:
            continue
        cut, pp = cuts[name], placement.layout.pp
        # Before anything else is done to the sub-modules: stand-ins take after what they replace.
        stages = {number: _stage(graph, name, cut[number], part) for number in range(coordinate["pp"], len(cut), pp)}
        tp, dp = axis_mesh(meshes[name], "tp"), axis_mesh(meshes[name], "dp")
        partial: list[str] = []
        if tp is not None:
            for child, plan in tensor_plans(graph, name).items():
                if name == LANGUAGE and part.rule.tp > 1:
                    sequence_parallel(graph.model.get_submodule(child), tp, plan)
                    continue
                partial += [f"{child}.{key}" for key in tensor_parallel(graph.model.get_submodule(child), tp, plan)]
        layers = expert_layers(graph, name) if placement.layout.ep * placement.layout.etp > 1 else {}
        edp = axis_mesh((expert_meshes or {})[name], "edp") if layers else None
        dims = _expert_dims(layers, placement.layout, run.modules[name].data_parallel)
        for layer in layers.values():
            expert_parallel(layer, (expert_meshes or {})[name])
        named = graph.parameters(name)
        for key in frozen_names(run.modules[name], named):
            named[key].requires_grad_(False)
        compute = torch.bfloat16 if run.dtype == "bfloat16" else None
        blocks = graph.blocks(name)
        assert dp is not None
        if name != LANGUAGE and placement.layout.cp > 1:
            _share_patches(graph, name, context[name])
        for number, stage in stages.items():
            if dp.size() > 1 or compute is not None or (edp is not None and edp.size() > 1):
                its = [blocks[index] for index in cut[number]]
                experts = None
                if edp is not None:
                    inside = {id(part) for part in stage.modules()}
                    experts = ExpertLayers([layer for layer in layers.values() if id(layer) in inside], edp, dims)
                data_parallel(stage, its, dp, run.modules[name].data_parallel, compute, experts)
            materialise(stage, device)
        parameters, buffers = _held(graph, name, stages, first_names(blueprint))
        if run.weights == "seeded":
            fill_seeded({**parameters, **buffers}, blueprint, run.seed)
        else:
            fill_pretrained({**parameters, **buffers}, blueprint, run.model)
        if name == LANGUAGE and part.rule.tp > 1:
            partial += replicated_names(parameters)
        tied = _tied(blueprint, parameters) if pp > 1 else frozenset()
        modules[name] = LocalModule(
            name,
            stages,
            parameters,
            tuple(key for key in partial if key in parameters),
            tied,
            tied if len(cut) - 1 in stages else frozenset(),
        )
    return LocalModel(graph, modules, cuts, part, context[LANGUAGE], routing_of(run, graph))


def _expert_dims(layers: Mapping[str, nn.Module], layout: Layout, kind: str) -> dict[str, int]:
    """Weight of a module of experts to the dim that is cut over `edp`; all layers are alike."""
    if not layers or kind == "replicate":
        return {}
    weights = next(iter(layers.values())).named_parameters()
    return {key: lane_dim(key, tuple(value.shape), layout) for key, value in weights}


def _context(run: RunConfig, config: PreTrainedConfig, name: str, placement: Placement, rank: int) -> ContextGroups | None:
    """With whom this rank attends in one module. Every rank of the world must call it: it makes process groups."""
    layout = placement.layout
    if layout.cp == 1:
        return None
    lanes = list(dict.fromkeys(placement.group(member, "cp") for member in placement.ranks))
    if name != LANGUAGE:
        return context_groups("ulysses", lanes, [layout.cp], rank)  # the heads are as many that each rank gets some
    text = config.get_text_config()
    heads = {getattr(text, key, None) for key in ("num_key_value_heads", "num_global_key_value_heads")}
    each = [count // layout.tp for count in heads if count]
    return context_groups(run.modules[name].context_parallel, lanes, each, rank)


def _lane_part(rule: SequenceRule, placement: Placement, mesh: DeviceMesh, groups: ContextGroups | None, rank: int) -> LanePart:
    coordinate = placement.coordinate(rank)
    if coordinate is None:
        return LanePart(rule)
    u = min({**groups.ulysses, **groups.ring}) if groups is not None else 1
    found = [group[u] for group in (groups.ulysses, groups.ring) if u in group] if groups is not None else []
    tp = axis_mesh(mesh, "tp")
    own = coordinate["tp"] if rule.tp > 1 else 0
    return LanePart(rule, coordinate["cp"], own, tuple(found), tp.get_group() if tp is not None else None)


def _share_patches(graph: ModelGraph, name: str, groups: ContextGroups | None) -> None:
    assert groups is not None
    child, plan = patch_plan(graph, name)
    tower: Any = graph.model.get_submodule(child)
    # Not by its setter, which would look for a library of the name.
    tower.config._attn_implementation = PATCH_IMPLEMENTATION
    share_patches(tower, plan, tower.config.spatial_merge_size**2, groups.ulysses[groups.cp])


def _stage(graph: ModelGraph, name: str, blocks: range, part: LanePart) -> nn.Module:
    return LanguageStage(graph, blocks, part) if name == LANGUAGE else EncoderStage(graph, name, blocks)


def _held(
    graph: ModelGraph, name: str, stages: Mapping[int, nn.Module], first: Mapping[str, str]
) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Parameters, tied ones once and under their first name, and buffers of the stages by full name."""
    parameters: dict[str, nn.Parameter] = {}
    buffers: dict[str, Tensor] = {}
    for path, module in _children(graph, name, stages):
        for key, parameter in module.named_parameters(prefix=path):
            parameters.setdefault(first[key], parameter)
        buffers |= module.named_buffers(prefix=path)
    for path in graph.loose.get(name, ()):
        for stage in stages.values():
            if (loose := stage._parameters.get(path.rpartition(".")[2])) is not None:
                parameters[path] = loose
    return parameters, buffers


def _children(graph: ModelGraph, name: str, stages: Mapping[int, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Full name and stage's version of each sub-module that the module consists of."""
    for stage in stages.values():
        for path in graph.children[name]:
            yield path, stage.get_submodule(path.rpartition(".")[2])


def _tied(blueprint: nn.Module, held: Mapping[str, nn.Parameter]) -> frozenset[str]:
    """Names of the held parameters that have a second name."""
    first = first_names(blueprint)
    return frozenset(name for key, name in first.items() if key != name and name in held)
