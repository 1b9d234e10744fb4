"""How are parameters kept over `dp`? FSDP2 sharding or plain replication; gradients are summed, never averaged."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard


@dataclass(frozen=True)
class ExpertLayers:
    """Modules of experts that are kept over `edp` instead of `dp`."""

    modules: Sequence[nn.Module]
    mesh: DeviceMesh
    """1D, over `edp`."""
    dims: Mapping[str, int] = field(default_factory=dict)
    """Name of a weight inside such a module to the dim that is cut over `edp`; 0 where it is not named."""

    def placement(self, module: nn.Module) -> Callable[[nn.Parameter], Shard]:
        """Where each parameter of `module` is cut."""
        dims = {id(value): self.dims.get(name, 0) for name, value in module.named_parameters()}
        return lambda parameter: Shard(dims[id(parameter)])


def data_parallel(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    kind: Literal["shard", "replicate"],
    compute_dtype: torch.dtype | None,
    experts: ExpertLayers | None = None,
) -> None:
    """Wraps each of `blocks`, then the rest of `module`, over the 1D `mesh`; before them `experts` over their own.

    Gradients are pure sums over `dp`: the step divides once by its global number of target tokens, which is exact for any
    mix of lanes. `compute_dtype` None computes in the parameters' dtype; otherwise gradients are still summed in theirs.
    """
    policy = MixedPrecisionPolicy()
    if compute_dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=next(module.parameters()).dtype)
    for layer in experts.modules if experts is not None else ():
        assert experts is not None
        # Routing weights come in a dtype of the router's choosing.
        as_given = replace(policy, cast_forward_inputs=False)
        if kind == "shard":
            fully_shard(layer, mesh=experts.mesh, mp_policy=as_given, shard_placement_fn=experts.placement(layer))
        else:
            replicate(layer, mesh=experts.mesh, mp_policy=as_given)
    apply = fully_shard if kind == "shard" else replicate
    for part in (*blocks, module):
        apply(part, mesh=mesh, mp_policy=policy)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            # Both: gloo has no pre-scaled sum, and the factor alone would ask for one.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def synchronize_gradients(module: nn.Module, enabled: bool) -> None:
    """Whether the next backward reduces gradients over `dp`, or only accumulates them on this rank."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
