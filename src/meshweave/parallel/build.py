"""What does this rank hold? Builds its part of every module it belongs to."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig

from meshweave.config import LANGUAGE, RunConfig
from meshweave.layout import Placement
from meshweave.model.blueprint import STORED, blueprint_of
from meshweave.model.encoder import EncoderStage
from meshweave.model.families import tensor_plans
from meshweave.model.frozen import frozen_names
from meshweave.model.language import LanguageStage
from meshweave.model.modules import ModelGraph, first_names, graph_of
from meshweave.model.stages import stage_cuts
from meshweave.model.weights import fill_pretrained, fill_seeded, materialise
from meshweave.parallel.data import data_parallel
from meshweave.parallel.mesh import axis_mesh
from meshweave.parallel.tensor import tensor_parallel


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


def build_model(
    run: RunConfig,
    model_config: PreTrainedConfig,
    placements: Mapping[str, Placement],
    meshes: Mapping[str, DeviceMesh],
    rank: int,
    device: torch.device,
) -> LocalModel:
    """Builds, shards and fills this rank's part of the model.

    Raises:
        CheckpointError: the folder's weights are missing or do not fit.
        LayoutError: a module has no tensor-parallel plan, or cannot be cut into its stages.
    """
    stored = STORED[run.dtype]
    graph = graph_of(blueprint_of(model_config, stored))
    blueprint = blueprint_of(model_config, stored)
    cuts = stage_cuts(run, graph)
    modules = {}
    for name, placement in placements.items():
        coordinate = placement.coordinate(rank)
        if coordinate is None:
            continue
        cut, pp = cuts[name], placement.layout.pp
        # Before anything else is done to the sub-modules: stand-ins take after what they replace.
        stages = {number: _stage(graph, name, cut[number]) for number in range(coordinate["pp"], len(cut), pp)}
        tp, dp = axis_mesh(meshes[name], "tp"), axis_mesh(meshes[name], "dp")
        partial: list[str] = []
        if tp is not None:
            for child, plan in tensor_plans(graph, name).items():
                partial += [f"{child}.{key}" for key in tensor_parallel(graph.model.get_submodule(child), tp, plan)]
        named = graph.parameters(name)
        for key in frozen_names(run.modules[name], named):
            named[key].requires_grad_(False)
        compute = torch.bfloat16 if run.dtype == "bfloat16" else None
        blocks = graph.blocks(name)
        assert dp is not None
        for number, stage in stages.items():
            if dp.size() > 1 or compute is not None:
                its = [blocks[index] for index in cut[number]]
                data_parallel(stage, its, dp, run.modules[name].data_parallel, compute)
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
    return LocalModel(graph, modules, cuts)


def _stage(graph: ModelGraph, name: str, blocks: range) -> nn.Module:
    return LanguageStage(graph, blocks) if name == LANGUAGE else EncoderStage(graph, name, blocks)


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
