"""How is one layer split over `tp`? Applies a plan of transformers' tensor-parallel styles to a module over our mesh.

The only file that uses transformers' tensor-parallel machinery.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    ColwiseParallel,
    RowwiseParallel,
    TensorParallelLayer,
    apply_tensor_parallelism,
)

from meshweave.model.families.plan import GATHERED_HEAD, PACKED_QKV, PARTIAL_GRADIENT, TensorPlan, matches, of_experts

_GATHERED, _SCATTERED, _GATHERED_COLWISE = "gathered_sequence", "rowwise_scattered", "colwise_gathered"
"""Our styles of sequence parallelism: a block's attention or MLP gathers its input, its last product scatters the output."""


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


class _GatheredSequence(TensorParallelLayer):
    """A module whose input `[rows, length, hidden]` is cut along the sequence: it gets all of it.

    The input stays a DTensor, so that the gradients of all its uses are added up before they are scattered again.
    """

    def transform_inputs_pre_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mesh: DeviceMesh
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        whole = _gathered(hidden, mesh)
        return ((whole, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": whole})


class _GatheredColwise(ColwiseParallel):
    """A column-wise layer whose input is cut along the sequence. (`input_layouts` would not do: without gradients, transformers
    takes any input for a whole one.)"""

    def transform_inputs_pre_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mesh: DeviceMesh
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        whole = (_gathered(args[0], mesh), *args[1:])
        found: tuple[tuple[Any, ...], dict[str, Any]] = super().transform_inputs_pre_forward(module, whole, kwargs, mesh)
        return found


def _gathered(hidden: Tensor, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(hidden, mesh, [Shard(1)], run_check=False).redistribute(placements=[Replicate()])


ALL_PARALLEL_STYLES.register(PACKED_QKV, _PackedQKV())  # type: ignore[arg-type]
ALL_PARALLEL_STYLES.register(_GATHERED, _GatheredSequence())  # type: ignore[arg-type]
ALL_PARALLEL_STYLES.register(_SCATTERED, RowwiseParallel(output_layouts=Shard(1)))  # type: ignore[arg-type]
ALL_PARALLEL_STYLES.register(_GATHERED_COLWISE, _GatheredColwise())  # type: ignore[arg-type]


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


def sequence_parallel(module: nn.Module, mesh: DeviceMesh, plan: TensorPlan) -> None:
    """Splits `module` (on the meta device) over the 1D `mesh`, activations between its blocks along the sequence.

    Gradients of all parameters that are not split are then partial sums over `tp` (`replicated_names`). The plan's styles are
    known to be `SEQUENCE_STYLES`.
    """
    concrete: dict[str, str] = {}
    gathered: dict[str, str] = {}
    for pattern, style in plan.rules.items():
        if of_experts(pattern, style) or style == PARTIAL_GRADIENT:
            continue
        known = {"colwise": "colwise", "rowwise": _SCATTERED, GATHERED_HEAD: _GATHERED_COLWISE}[style]
        found = sorted((name for name, _ in matches(module, pattern)), key=lambda name: -name.count("."))
        concrete.update(dict.fromkeys(found, known))
        if known == "colwise":
            inner = [name for name, its in matches(module, pattern) if isinstance(its, nn.Module)]
            gathered |= {name.rpartition(".")[0]: _GATHERED for name in inner}
    apply_tensor_parallelism(module, mesh, concrete | gathered)  # type: ignore[arg-type]


def replicated_names(parameters: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
    """Names of those parameters that every rank of `tp` holds: it neither splits them, nor are they split experts."""
    return tuple(name for name, parameter in parameters.items() if not _split(parameter))


def _split(parameter: nn.Parameter) -> bool:
    if not isinstance(parameter, DTensor):
        return False
    axes = parameter.device_mesh.mesh_dim_names or ()
    splits = [axis for axis, kind in zip(axes, parameter.placements, strict=True) if not kind.is_replicate()]
    return "tp" in splits or bool({"edp", "ep", "etp"} & set(axes))
