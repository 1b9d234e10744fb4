"""Meshes are made alike on every rank, and a mesh that torch would shuffle is refused."""

import pytest
import torch.distributed as dist
from support.ranks import run_ranks

from meshweave.errors import LayoutError
from meshweave.layout import EXPERT_AXES, Layout, Placement
from meshweave.parallel.mesh import axis_mesh, build_expert_meshes, build_meshes

PLACEMENTS = {
    "vision": Placement(Layout(dp=2), (0, 3)),
    "audio": Placement(Layout(), (1,)),
    "language": Placement(Layout(dp=2, tp=2), (0, 1, 2, 3)),
}


def test_groups_are_those_of_the_geometry() -> None:
    def groups(rank: int) -> dict[tuple[str, str], tuple[int, ...]]:
        found = {}
        for name, mesh in build_meshes(PLACEMENTS, "cpu").items():
            if rank not in PLACEMENTS[name]:
                assert mesh.get_coordinate() is None
                continue
            for axis in ("dp", "tp"):
                part = axis_mesh(mesh, axis)
                found[name, axis] = tuple(dist.get_process_group_ranks(part.get_group())) if part is not None else (rank,)
        return found

    for rank, found in enumerate(run_ranks(4, groups)):
        for (name, axis), ranks in found.items():
            assert ranks == PLACEMENTS[name].group(rank, axis)


def test_expert_groups_are_those_of_the_geometry_and_there_are_none_without_experts() -> None:
    placements = {
        "vision": Placement(Layout(dp=2), (0, 3)),
        "language": Placement(Layout(pp=2, dp=4, ep=2, etp=2), tuple(range(8))),
    }

    def groups(rank: int) -> dict[str, tuple[int, ...]]:
        meshes = build_expert_meshes(placements, "cpu")
        assert list(meshes) == ["language"]
        parts = {axis: axis_mesh(meshes["language"], axis) for axis in EXPERT_AXES}
        return {axis: tuple(dist.get_process_group_ranks(part.get_group())) for axis, part in parts.items() if part is not None}

    for rank, found in enumerate(run_ranks(8, groups)):
        assert found == {axis: placements["language"].group(rank, axis, EXPERT_AXES) for axis in EXPERT_AXES}


def test_descending_ranks_are_refused() -> None:
    with pytest.raises(LayoutError, match="ascending"):
        build_meshes({"vision": Placement(Layout(dp=2), (1, 0))}, "cpu")
