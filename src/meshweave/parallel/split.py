"""How is one module divided over the ranks of a stage? Matrices over `tp`, experts over `ep` and `etp`, patches over `cp`."""

from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from meshweave.config import LANGUAGE
from meshweave.model.experts import expert_layers
from meshweave.model.families import patch_plan, tensor_plans
from meshweave.model.modules import ModelGraph
from meshweave.model.slicing import LanePart
from meshweave.parallel.context import IMPLEMENTATION, ContextGroups
from meshweave.parallel.context.patches import PATCH_IMPLEMENTATION, share_patches
from meshweave.parallel.expert import expert_parallel
from meshweave.parallel.mesh import axis_mesh
from meshweave.parallel.tensor import replicated_names, sequence_parallel, tensor_parallel


def attend_to_sequences(graph: ModelGraph, part: LanePart) -> None:
    """Lets the language model attend over packed and cut sequences, if that is how they lie."""
    if part.rule.packed:
        text: Any = graph.model.base_model.language_model
        text.set_attn_implementation(IMPLEMENTATION)


def split_module(
    graph: ModelGraph,
    name: str,
    part: LanePart,
    mesh: DeviceMesh,
    expert_mesh: DeviceMesh | None,
    context: ContextGroups | None,
) -> list[str]:
    """Divides the module's sub-modules, in place and on the meta device.

    Args:
        mesh: of the module's parameters.
        expert_mesh: the expert view of the same ranks, if experts are split.
        context: with whom an encoder shares the patches of a pass, if with anyone.

    Returns:
        Full names of the parameters whose gradients are partial sums over `tp`.

    Raises:
        LayoutError: the module has no plan for it.
    """
    tp, partial = axis_mesh(mesh, "tp"), []
    for child, plan in tensor_plans(graph, name).items() if tp is not None else ():
        assert tp is not None
        module = graph.model.get_submodule(child)
        if name == LANGUAGE and part.rule.tp > 1:
            sequence_parallel(module, tp, plan)
        else:
            partial += [f"{child}.{key}" for key in tensor_parallel(module, tp, plan)]
    if expert_mesh is not None:
        for layer in expert_layers(graph, name).values():
            expert_parallel(layer, expert_mesh)
    if name == LANGUAGE and part.rule.tp > 1:
        partial += replicated_names(graph.parameters(name))
    if name != LANGUAGE and context is not None:
        child, patches = patch_plan(graph, name)
        tower: Any = graph.model.get_submodule(child)
        # Not by its setter, which would look for a library of the name.
        tower.config._attn_implementation = PATCH_IMPLEMENTATION
        share_patches(tower, patches, tower.config.spatial_merge_size**2, context.ulysses[context.cp])
    return partial
