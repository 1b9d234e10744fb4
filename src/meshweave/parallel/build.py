"""What does this rank hold? Builds its part of every module it belongs to."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig

from meshweave.config import LANGUAGE, RunConfig
from meshweave.layout import Layout, Placement
from meshweave.model.blueprint import STORED, blueprint_of
from meshweave.model.encoder import EncoderStage
from meshweave.model.experts import expert_layers, lane_dim
from meshweave.model.frozen import frozen_names
from meshweave.model.language import LanguageStage
from meshweave.model.modules import ModelGraph, first_names, graph_of
from meshweave.model.routing import Routing, routing_of
from meshweave.model.slicing import LanePart, sequence_rule
from meshweave.model.stages import stage_cuts
from meshweave.model.weights import fill_pretrained, fill_seeded, materialise
from meshweave.parallel.context import ContextGroups
from meshweave.parallel.data import ExpertLayers, data_parallel
from meshweave.parallel.lane import build_context, lane_part
from meshweave.parallel.mesh import axis_mesh
from meshweave.parallel.split import attend_to_sequences, split_module


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
    context = {name: build_context(run, model_config, name, placement, rank) for name, placement in placements.items()}
    part = lane_part(sequence_rule(run, model_config), placements[LANGUAGE], meshes[LANGUAGE], context[LANGUAGE], rank)
    attend_to_sequences(graph, part)
    modules = {}
    for name, placement in placements.items():
        coordinate = placement.coordinate(rank)
        if coordinate is None:
            continue
        cut, pp = cuts[name], placement.layout.pp
        # Before anything else is done to the sub-modules: stand-ins take after what they replace.
        stages = {number: _stage(graph, name, cut[number], part) for number in range(coordinate["pp"], len(cut), pp)}
        expert_mesh = (expert_meshes or {}).get(name)
        partial = split_module(graph, name, part, meshes[name], expert_mesh, context[name])
        named = graph.parameters(name)
        for key in frozen_names(run.modules[name], named):
            named[key].requires_grad_(False)
        _keep(run, graph, name, placement.layout, stages, cut, meshes[name], expert_mesh)
        for stage in stages.values():
            materialise(stage, device)
        parameters, buffers = _held(graph, name, stages, first_names(blueprint))
        if run.weights == "seeded":
            fill_seeded({**parameters, **buffers}, blueprint, run.seed)
        else:
            fill_pretrained({**parameters, **buffers}, blueprint, run.model)
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


def _keep(
    run: RunConfig,
    graph: ModelGraph,
    name: str,
    layout: Layout,
    stages: Mapping[int, nn.Module],
    cut: Sequence[range],
    mesh: DeviceMesh,
    expert_mesh: DeviceMesh | None,
) -> None:
    """Has FSDP keep the stages over `dp`, and split experts over `edp`, where there is anything to do."""
    compute = torch.bfloat16 if run.dtype == "bfloat16" else None
    kind, blocks, dp = run.modules[name].data_parallel, graph.blocks(name), axis_mesh(mesh, "dp")
    layers = expert_layers(graph, name) if expert_mesh is not None else {}
    edp = axis_mesh(expert_mesh, "edp") if expert_mesh is not None else None
    assert dp is not None
    if dp.size() == 1 and compute is None and (edp is None or edp.size() == 1):
        return
    dims = _expert_dims(layers, layout, kind)
    for number, stage in stages.items():
        experts = None
        if edp is not None:
            inside = {id(module) for module in stage.modules()}
            experts = ExpertLayers([layer for layer in layers.values() if id(layer) in inside], edp, dims)
        data_parallel(stage, [blocks[index] for index in cut[number]], dp, kind, compute, experts)


def _expert_dims(layers: Mapping[str, nn.Module], layout: Layout, kind: str) -> dict[str, int]:
    """Weight of a module of experts to the dim that is cut over `edp`; all layers are alike."""
    if not layers or kind == "replicate":
        return {}
    weights = next(iter(layers.values())).named_parameters()
    return {key: lane_dim(key, tuple(value.shape), layout) for key, value in weights}


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
