"""How are experts split over `ep` and `etp`? Whole experts per rank, or slices of each; tokens travel to them and back.

Every rank of a stage holds tokens of its own. The only file that uses transformers' expert-parallel machinery.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from transformers.distributed.expert_parallel import AllToAllEP
from transformers.distributed.parallel_utils import _use_local_dtensor_params, _WaitTensor

from meshweave.model.experts import SPLITS, Split
from meshweave.parallel.mesh import axis_mesh

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Tokens `[rows, hidden]`, the experts of each `[rows, chosen]` and their weights `[rows, chosen]`, to `[rows, hidden]`."""


def expert_parallel(experts: nn.Module, mesh: DeviceMesh) -> None:
    """Splits one module of experts (on the meta device) over the axes `ep` and `etp` of an expert mesh.

    Its forward then takes this rank's tokens, with the numbers of experts as in the whole model, and is a collective: every rank
    of `ep` × `etp` must come to it and to its backward, in the same order, also one whose experts get no token.
    """
    ep, etp = axis_mesh(mesh, "ep"), axis_mesh(mesh, "etp")
    inner = mesh[tuple(axis for axis in ("ep", "etp") if axis_mesh(mesh, axis) is not None)]
    for name, value in dict(experts.named_parameters(recurse=False)).items():
        placements: list[Placement] = [] if ep is None else [Shard(0)]
        if etp is not None:
            placements.append(_slices(SPLITS[name]))
        part = distribute_tensor(value.detach(), inner, placements, src_data_rank=None)
        experts._parameters[name] = nn.Parameter(part, requires_grad=value.requires_grad)
    run: Forward = experts.forward
    if etp is not None:
        run = _Sliced(run, etp)
    if ep is not None:
        here = int(experts.num_experts) // ep.size()  # type: ignore[arg-type]
        experts.num_experts = here  # type: ignore[assignment]
        run = _Exchanged(run, here, ep)

    def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        with _use_local_dtensor_params(experts):
            return run(hidden, chosen, weights).to(hidden.dtype)

    experts.forward = forward  # type: ignore[assignment]


def _slices(split: Split) -> Placement:
    return Shard(split.inner) if split.pieces == 1 else _StridedShard(split.inner, split_factor=split.pieces)


class _Alone:
    """Stands for a mesh of one rank: no ranks share a batch, and a process group for that would do nothing."""

    def size(self) -> int:
        return 1


class _Exchanged(AllToAllEP):
    """transformers' exchange over `ep`, where no two ranks hold the same tokens."""

    def __init__(self, experts_forward: Forward, experts: int, mesh: DeviceMesh) -> None:
        self.experts_forward, self.num_local_experts = experts_forward, experts  # type: ignore[assignment]
        self.ep_mesh, self.tp_mesh = mesh, _Alone()  # type: ignore[assignment]


class _Sliced:
    """Experts of which this rank holds a slice of the intermediate width: works the tokens of all ranks of `etp`, and every rank
    gets the sum of all slices' results for its own. State: none."""

    def __init__(self, experts_forward: Forward, mesh: DeviceMesh) -> None:
        self.experts_forward, self.mesh = experts_forward, mesh

    def __call__(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        size, group = self.mesh.size(), self.mesh.get_group()
        counts = torch.empty(size, dtype=torch.long, device=hidden.device)
        dist.all_to_all_single(counts, torch.full_like(counts, len(hidden)), group=group)
        rows = counts.tolist()
        mine = [len(hidden)] * size
        every = chosen.new_empty(sum(rows), chosen.shape[1])
        dist.all_to_all_single(every, chosen.repeat(size, 1), rows, mine, group=group)
        # Every rank's rows to all: the backward sums what comes back from each. The other way round for the results.
        partial = self.experts_forward(
            _exchange(hidden.repeat(size, 1), rows, mine, group), every, _exchange(weights.repeat(size, 1), rows, mine, group)
        )
        return _exchange(partial, mine, rows, group).unflatten(0, (size, len(hidden))).sum(0)


def _exchange(tensor: Tensor, received: Sequence[int], sent: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    exchanged: Tensor = _WaitTensor.apply(all_to_all_single_autograd(tensor.contiguous(), list(received), list(sent), group))
    return exchanged
