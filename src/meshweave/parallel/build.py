"""What does this rank hold? Builds its part of every module it belongs to."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig

from meshweave.config import LANGUAGE, RunConfig
from meshweave.layout import Placement
from meshweave.model.blueprint import STORED, blueprint_of
from meshweave.model.families import tensor_plans
from meshweave.model.modules import Encoder, LanguageModel, ModelGraph, graph_of
from meshweave.model.weights import fill_pretrained, fill_seeded, materialise
from meshweave.parallel.data import data_parallel
from meshweave.parallel.mesh import axis_mesh
from meshweave.parallel.tensor import tensor_parallel


@dataclass(frozen=True)
class LocalModule:
    """This rank's part of one module."""

    name: str
    module: nn.Module
    parameters: Mapping[str, nn.Parameter]
    """Full transformers name to this rank's part (a DTensor where sharded)."""
    partial: tuple[str, ...]
    """Names of the parameters whose gradients are partial sums over `tp`."""


@dataclass(frozen=True)
class LocalModel:
    """This rank's part of the model: the modules it belongs to, in the order of the run file."""

    graph: ModelGraph
    modules: Mapping[str, LocalModule]


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
        LayoutError: a module has no tensor-parallel plan.
    """
    stored = STORED[run.dtype]
    graph = graph_of(blueprint_of(model_config, stored))
    blueprint = blueprint_of(model_config, stored)
    modules = {}
    for name, placement in placements.items():
        if rank not in placement:
            continue
        module: nn.Module = LanguageModel(graph) if name == LANGUAGE else Encoder(graph, name)
        tp, dp = axis_mesh(meshes[name], "tp"), axis_mesh(meshes[name], "dp")
        partial: list[str] = []
        if tp is not None:
            for child, plan in tensor_plans(graph, name).items():
                partial += [f"{child}.{key}" for key in tensor_parallel(graph.model.get_submodule(child), tp, plan)]
        children = graph.of_module(name)
        compute = torch.bfloat16 if run.dtype == "bfloat16" else None
        assert dp is not None
        if dp.size() > 1 or compute is not None:
            data_parallel(module, graph.blocks(name), dp, run.modules[name].data_parallel, compute)
        materialise({"": module}, device)
        if run.weights == "seeded":
            fill_seeded(children, blueprint, run.seed)
        else:
            fill_pretrained(children, blueprint, run.model)
        modules[name] = LocalModule(name, module, graph.parameters(name), tuple(partial))
    return LocalModel(graph, modules)
