"""How do parameters stay whole for a step? Gathered over `dp` once before it; gradients are summed once after it.

Inside the step no forward or backward then waits for another rank: what a pipeline needs, and an encoder whose lanes work at
different times. The only file that runs FSDP2's own steps: it has no public way to reduce outside a backward.
"""

from collections.abc import Iterator

from torch import nn
from torch.distributed._composable.replicate_with_fsdp import ReplicateModule, replicate
from torch.distributed.fsdp import FSDPModule, fully_shard


def gather(module: nn.Module) -> None:
    """Gathers the parameters of a data-parallel module, until `reduce`; a collective over its `dp`."""
    for part in _parts(module):
        if part is module:
            _state(part)._lazy_init()
        if not isinstance(part, ReplicateModule):  # its parameters stay whole anyway
            part.set_reshard_after_forward(False, recurse=False)
        part.set_reshard_after_backward(False, recurse=False)
        part.set_requires_gradient_sync(False, recurse=False)
    for part in _parts(module):
        part.unshard()


def accumulate(module: nn.Module) -> None:
    """Adds what a backward has left on a gathered module's parameters to its gradient sums, in the dtype of these.

    FSDP2 does so after its own backwards; after half a backward (`SplitBackward`) it is the caller's to do.
    """
    for part in _parts(module):
        for group in _state(part)._fsdp_param_groups:
            for parameter in group.fsdp_params:
                parameter.accumulate_unsharded_grad_if_needed()
                parameter.to_accumulated_grad_if_needed()


def reduce(module: nn.Module) -> None:
    """Sums the gradients of a gathered module over its `dp`, and shards its parameters again; a collective."""
    for part in _parts(module):
        part.set_reshard_after_backward(True, recurse=False)
        part.set_requires_gradient_sync(True, recurse=False)
    if isinstance(module, FSDPModule):
        root = _state(module)
        for state in root._state_ctx.all_states:
            for group in state._fsdp_param_groups:
                group.post_backward()
        root._root_post_backward_final_callback()


def _parts(module: nn.Module) -> Iterator[FSDPModule]:
    return (part for part in module.modules() if isinstance(part, FSDPModule))


def _state(module: FSDPModule):  # type: ignore[no-untyped-def]
    return replicate.state(module) if isinstance(module, ReplicateModule) else fully_shard.state(module)  # type: ignore[attr-defined]
