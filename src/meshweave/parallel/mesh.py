"""Which process groups does a module's layout need? Turns placements into device meshes."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshweave.errors import LayoutError
from meshweave.layout import AXES, EXPERT_AXES, Placement


def build_meshes(placements: Mapping[str, Placement], device_type: str) -> dict[str, DeviceMesh]:
    """One mesh per module; axes of size 1 other than `dp` are left out, so that no process group is made for them.

    Every rank of the world must call this with the same placements in the same order, ranks outside a module included:
    a process group that only its members build hangs, or sums silently wrong.

    Raises:
        LayoutError: a placement's ranks do not ascend. torch numbers the ranks of a process group in ascending order, whatever
            order the mesh lists them in, and some of its operations would then shuffle shards silently.
    """
    meshes = {}
    for name, placement in placements.items():
        if list(placement.ranks) != sorted(placement.ranks):
            raise LayoutError(f"{name}: a mesh needs ascending ranks, got {placement.ranks}")
        sizes = zip(AXES, placement.layout.sizes(), strict=True)
        named = [(axis, size) for axis, size in sizes if size > 1 or axis == "dp"]
        grid = torch.tensor(placement.ranks).reshape([size for _, size in named])
        meshes[name] = DeviceMesh(device_type, grid, mesh_dim_names=tuple(axis for axis, _ in named))
    return meshes


def axis_mesh(mesh: DeviceMesh, axis: str) -> DeviceMesh | None:
    """The 1D mesh along `axis` through this rank, or None where the axis has size 1; this rank must be inside `mesh`."""
    return mesh[axis] if axis in (mesh.mesh_dim_names or ()) else None


def build_expert_meshes(placements: Mapping[str, Placement], device_type: str) -> dict[str, DeviceMesh]:
    """One mesh of the expert view per module that splits its experts, over the same ranks; axes of size 1 other than `edp` are
    left out. To be called as, and after, `build_meshes`."""
    meshes = {}
    for name, placement in placements.items():
        if placement.layout.ep * placement.layout.etp == 1:
            continue
        sizes = zip(EXPERT_AXES, placement.layout.sizes(EXPERT_AXES), strict=True)
        named = [(axis, size) for axis, size in sizes if size > 1 or axis == "edp"]
        grid = torch.tensor(placement.ranks).reshape([size for _, size in named])
        meshes[name] = DeviceMesh(device_type, grid, mesh_dim_names=tuple(axis for axis, _ in named))
    return meshes


def token_groups(mesh: DeviceMesh, scope: Literal["lane", "microbatch"]) -> tuple[dist.ProcessGroup, ...]:
    """Groups over which the tokens of one lane's microbatch, or of a whole microbatch, lie in one stage of `mesh`: sums over one
    after the other are sums over all of them."""
    axes = ("cp", "tp") if scope == "lane" else ("dp", "cp", "tp")
    lines = [axis_mesh(mesh, axis) for axis in axes]
    return tuple(line.get_group() for line in lines if line is not None and line.size() > 1)
