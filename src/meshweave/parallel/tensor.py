"""How is one layer split over `tp`? Applies a plan of transformers' tensor-parallel styles to a module over our mesh.

The only file that uses transformers' tensor-parallel machinery.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer, apply_tensor_parallelism

from meshweave.model.families.plan import PACKED_QKV, PARTIAL_GRADIENT, TensorPlan, matches


class _PackedQKV(TensorParallelLayer):
    """A fused query-key-value projection: every rank computes its heads of each of the three.

    The parameters stay whole over `tp` (and sharded over `dp`): a rank's rows lie in three separate stripes, which a
    second sharding of the same dim cannot express. Their gradients are therefore partial sums over `tp`.
    """

    def transform_inputs_pre_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mesh: DeviceMesh
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # The gradient of the input sums over the heads of all ranks.
        whole = DTensor.from_local(args[0], mesh, [Replicate()], run_check=False)
        return (whole.to_local(grad_placements=[Partial()]), *args[1:]), kwargs

    @contextmanager
    def context_around_forward(self, module: nn.Module, mesh: DeviceMesh) -> Iterator[None]:
        whole = dict(module._parameters)
        heads = {
            name: value.unflatten(0, (3, mesh.size(), -1))[:, mesh.get_local_rank()].flatten(0, 1)
            for name, value in whole.items()
            if value is not None
        }
        module._parameters.update(heads)  # type: ignore[arg-type]
        try:
            yield
        finally:
            module._parameters.update(whole)


ALL_PARALLEL_STYLES.register(PACKED_QKV, _PackedQKV())  # type: ignore[arg-type]


def tensor_parallel(module: nn.Module, mesh: DeviceMesh, plan: TensorPlan) -> list[str]:
    """Splits `module` (on the meta device) over the 1D `mesh`.

    Returns the names of the parameters whose gradients are partial sums over `tp`: the caller sums them once per step.
    (transformers sums at every accumulation instead, which counts earlier microbatches again.)
    """
    concrete: dict[str, str] = {}
    partial: list[str] = []
    for pattern, style in plan.rules.items():
        if style in (PARTIAL_GRADIENT, PACKED_QKV):
            partial += [name for name, found in matches(module, pattern) if isinstance(found, nn.Parameter)]
        if style != PARTIAL_GRADIENT:
            # Parameters are sharded before their module's forward is wrapped.
            found = sorted((name for name, _ in matches(module, pattern)), key=lambda name: -name.count("."))
            concrete.update(dict.fromkeys(found, style))
    apply_tensor_parallelism(module, mesh, concrete)  # type: ignore[arg-type]
    for pattern, attributes in plan.heads.items():
        for _, owner in matches(module, pattern):
            for attribute in attributes if isinstance(owner, nn.Module) else ():
                setattr(owner, attribute, getattr(owner, attribute) // mesh.size())
    return partial
