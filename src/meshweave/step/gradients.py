"""What happens to gradients between backward and the optimizer: summed over what is partial, one norm, one scale."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from meshweave.layout import AXES, EXPERT_AXES, Placement
from meshweave.parallel.build import LocalModule
from meshweave.parallel.mesh import axis_mesh

_LARGE = 1 << 20
"""Elements from which a gradient is summed where it lies: a copy of an embedding's would cost memory, and time for nothing."""


def sum_partial_gradients(module: LocalModule, mesh: DeviceMesh) -> None:
    """Sums, over `tp`, the gradients that cover only this rank's heads or tokens; small ones in one all-reduce per step."""
    tp = axis_mesh(mesh, "tp")
    grads = local_gradients(module.parameters[name] for name in module.partial)
    if tp is None or not grads:
        return
    small = []
    for grad in grads:
        if grad.numel() >= _LARGE and grad.is_contiguous():
            dist.all_reduce(grad, group=tp.get_group())
        else:
            small.append(grad)
    if not small:
        return
    flat = torch.cat([grad.flatten() for grad in small])
    dist.all_reduce(flat, group=tp.get_group())
    for grad, total in zip(small, flat.split([grad.numel() for grad in small]), strict=True):
        grad.copy_(total.view_as(grad))


def sum_tied_gradients(module: LocalModule, placement: Placement, rank: int) -> None:
    """Sums the gradients of parameters that the first and the last pipeline stage both hold; one exchange per step."""
    pipeline = placement.group(rank, "pp")
    other = {pipeline[0]: pipeline[-1], pipeline[-1]: pipeline[0]}.get(rank)
    for name in module.tied:
        parameter = module.parameters[name]
        if parameter.grad is None:  # frozen, on both stages
            continue
        assert other is not None
        (grad,) = local_gradients([parameter])
        theirs = torch.empty_like(grad)
        posts = [dist.P2POp(dist.isend, grad.clone(), other), dist.P2POp(dist.irecv, theirs, other)]
        for work in dist.batch_isend_irecv(posts):
            work.wait()
        grad.add_(theirs)


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """This rank's part of every gradient that is there."""
    grads = (parameter.grad for parameter in parameters)
    return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads if grad is not None]


def counts_here(parameter: nn.Parameter, placement: Placement, rank: int) -> bool:
    """Whether this rank's part of the parameter counts in sums over all ranks: one copy of every shard does."""
    sharded: set[str] = set()
    axes: tuple[str, ...] = AXES
    if isinstance(parameter, DTensor):
        names = parameter.device_mesh.mesh_dim_names or ()
        if set(names) & set(EXPERT_AXES[1:]):
            axes = EXPERT_AXES
        sharded = {name for name, kind in zip(names, parameter.placements, strict=True) if not kind.is_replicate()}
    if "dp" in sharded:
        sharded.add("cp")  # the mesh's `dp` is both
    coordinate = placement.coordinate(rank, axes)
    assert coordinate is not None
    return all(index == 0 for axis, index in coordinate.items() if axis not in sharded and axis != "pp")


def squared_norm(module: LocalModule, placement: Placement, rank: int) -> Tensor:
    """This rank's share of the module's squared gradient norm (float64 scalar); shares add up over all ranks."""
    counted = (p for name, p in module.parameters.items() if name not in module.copies and counts_here(p, placement, rank))
    grads = local_gradients(counted)
    device = next(iter(module.parameters.values())).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    if grads:
        norms = torch._foreach_norm(grads)
        total += torch.stack(norms).double().square().sum()
    return total


def scale_gradients(modules: Mapping[str, LocalModule], factor: float) -> None:
    """Multiplies every gradient in place."""
    for module in modules.values():
        grads = local_gradients(module.parameters.values())
        if grads:
            torch._foreach_mul_(grads, factor)
