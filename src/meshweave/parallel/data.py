"""How are parameters kept over `dp`? FSDP2 sharding or plain replication; gradients are summed, never averaged."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def data_parallel(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    kind: Literal["shard", "replicate"],
    compute_dtype: torch.dtype | None,
) -> None:
    """Wraps each of `blocks`, then the rest of `module`, over the 1D `mesh`.

    Gradients are pure sums over `dp`: the step divides once by its global number of target tokens, which is exact for any
    mix of lanes. `compute_dtype` None computes in the parameters' dtype; otherwise gradients are still summed in theirs.
    """
    policy = MixedPrecisionPolicy()
    if compute_dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=next(module.parameters()).dtype)
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
