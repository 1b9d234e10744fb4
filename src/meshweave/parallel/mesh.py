"""Which process groups does a module's layout need? Turns placements into device meshes."""

from collections.abc import Mapping

import torch
from torch.distributed.device_mesh import DeviceMesh

from meshweave.layout import AXES, Placement


def build_meshes(placements: Mapping[str, Placement], device_type: str) -> dict[str, DeviceMesh]:
    """One mesh per module; axes of size 1 other than `dp` are left out, so that no process group is made for them.

    Every rank of the world must call this with the same placements in the same order, ranks outside a module included:
    a process group that only its members build hangs, or sums silently wrong.
    """
    meshes = {}
    for name, placement in placements.items():
        sizes = zip(AXES, placement.layout.sizes(), strict=True)
        named = [(axis, size) for axis, size in sizes if size > 1 or axis == "dp"]
        grid = torch.tensor(placement.ranks).reshape([size for _, size in named])
        meshes[name] = DeviceMesh(device_type, grid, mesh_dim_names=tuple(axis for axis, _ in named))
    return meshes


def axis_mesh(mesh: DeviceMesh, axis: str) -> DeviceMesh | None:
    """The 1D mesh along `axis` through this rank, or None where the axis has size 1; this rank must be inside `mesh`."""
    return mesh[axis] if axis in (mesh.mesh_dim_names or ()) else None
