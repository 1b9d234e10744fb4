"""Which process groups does a module's layout need? Turns placements into device meshes."""

from collections.abc import Mapping

import torch
from torch.distributed.device_mesh import DeviceMesh

from meshweave.errors import LayoutError
from meshweave.layout import AXES, EXPERT_AXES, Placement

_MESH_AXES = ("pp", "replicas", "dp", "tp")


def build_meshes(placements: Mapping[str, Placement], device_type: str) -> dict[str, DeviceMesh]:
    """One mesh per module, for its parameters; axes of size 1 other than `dp` are left out, so that no process group is made for
    them.

    The mesh's `dp` joins the layout's `dp` and `cp`: ranks that share a sequence keep the same parameters and add up their
    gradients, as lanes do.

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
        grid = torch.tensor(placement.ranks).reshape(placement.layout.sizes())
        joined = grid.transpose(AXES.index("dp"), AXES.index("replicas")).flatten(2, 3)
        named = [(axis, size) for axis, size in zip(_MESH_AXES, joined.shape, strict=True) if size > 1 or axis == "dp"]
        shape, names = [size for _, size in named], tuple(axis for axis, _ in named)
        meshes[name] = DeviceMesh(device_type, joined.reshape(shape), mesh_dim_names=names)
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
