"""Which parts of a language model are experts, how do ranks share them, and which parts choose among them?"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from transformers.utils.output_capturing import OutputRecorder

from meshweave.config import LANGUAGE, RunConfig
from meshweave.errors import LayoutError
from meshweave.layout import EXPERT_AXES, Layout
from meshweave.model.families.plan import matches
from meshweave.model.modules import ModelGraph, module_config

DISPATCHED = "ep_dispatch_experts"
"""Style that transformers' expert plans (`base_model_ep_plan`) give to a module of experts."""


@dataclass(frozen=True)
class Split:
    """How one weight `[experts, …, …]` of a module of experts may be cut beside its dim 0."""

    inner: int
    """The dim of the intermediate width, which `etp` cuts."""
    pieces: int
    """Matrices that lie one after the other along it; each is cut by itself."""
    hidden: int
    """The dim of the hidden width."""


SPLITS: Mapping[str, Split] = {
    "gate_up_proj": Split(inner=1, pieces=2, hidden=2),
    "down_proj": Split(inner=2, pieces=1, hidden=1),
}
"""Weights of transformers' gated experts, as nearly all of its models have them."""


def expert_layers(graph: ModelGraph, name: str) -> dict[str, nn.Module]:
    """Full name to the module of experts of every layer of one module that has some, first layer first."""
    found: dict[str, nn.Module] = {}
    for path, child in graph.of_module(name).items():
        plan = getattr(getattr(child, "config", None), "base_model_ep_plan", None) or {}
        for pattern in (pattern for pattern, style in plan.items() if style == DISPATCHED):
            found |= {f"{path}.{key}": part for key, part in matches(child, pattern) if not isinstance(part, nn.Parameter)}
    return found


def expert_parameters(graph: ModelGraph, name: str) -> dict[str, nn.Parameter]:
    """Full name to every parameter of experts of one module."""
    layers = expert_layers(graph, name)
    return {key: value for path, layer in layers.items() for key, value in layer.named_parameters(prefix=path)}


def lane_dim(name: str, shape: tuple[int, ...], layout: Layout) -> int:
    """The dim along which the shards over `edp` of an expert weight of this (whole) shape are cut.

    Whole experts where they divide; torch shards dim 0 a second time neither unevenly nor beside a packed dim.

    Raises:
        LayoutError: no dim divides.
    """
    edp = layout.sizes(EXPERT_AXES)[EXPERT_AXES.index("edp")]
    if layout.etp == 1 and shape[0] // layout.ep % edp == 0:
        return 0
    hidden = SPLITS[name.rpartition(".")[2]].hidden
    if shape[hidden] % edp == 0:
        return hidden
    raise LayoutError(
        f"the {edp} data-parallel copies of the experts (ep={layout.ep}, etp={layout.etp}) divide neither the experts of a rank "
        f"nor the hidden width {shape[hidden]}; use other sizes, or data_parallel: replicate"
    )


def routers(graph: ModelGraph) -> dict[str, tuple[nn.Module, int]]:
    """Full name to every router of the language model, first layer first, and the place of its logits among its outputs."""
    (path, text), *_ = graph.of_module(LANGUAGE).items()
    recorder = (getattr(text, "_can_record_outputs", None) or {}).get("router_logits")
    if not isinstance(recorder, OutputRecorder):
        return {}
    return {
        f"{path}.{key}": (part, recorder.index)
        for key, part in text.named_modules()
        if isinstance(part, recorder.target_class) and (recorder.layer_name or "") in key
    }


def expert_faults(run: RunConfig, graph: ModelGraph, name: str, layout: Layout) -> list[str]:
    """What is wrong with the layout of one module with respect to the model's experts."""
    module = run.modules[name]
    layers = expert_layers(graph, name)
    kind = module_config(graph.model.config, name).model_type
    if not layers:
        return [
            f"modules.{name}.{axis}={getattr(module, axis)}: a {kind} model has no experts; set it to 1"
            for axis in ("ep", "etp")
            if getattr(module, axis) > 1
        ]
    faults = _not_distinct(run, name)
    if module.ep == module.etp == 1:
        return faults
    weights = {key: tuple(value.shape) for key, value in expert_parameters(graph, name).items()}
    unknown = sorted({key.rpartition(".")[2] for key in weights} - set(SPLITS))
    layer = next(iter(layers.values()))
    if unknown or not getattr(layer, "is_concatenated", True) or getattr(layer, "is_transposed", False):
        return [*faults, f"modules.{name}: the experts of a {kind} model are laid out in another way; set its ep and etp to 1"]
    for key, shape in weights.items():
        split = SPLITS[key.rpartition(".")[2]]
        width = shape[split.inner] // split.pieces
        if shape[0] % module.ep:
            faults.append(f"modules.{name}.ep={module.ep}: does not divide the {shape[0]} experts of {kind}; use a divisor of it")
        elif width % module.etp:
            faults.append(
                f"modules.{name}.etp={module.etp}: does not divide the width {width} of an expert of {kind}; use a divisor of it"
            )
        elif module.data_parallel == "shard":
            try:
                lane_dim(key, shape, layout)
            except LayoutError as error:
                faults.append(f"modules.{name}: {error}")
    return faults


def _not_distinct(run: RunConfig, name: str) -> list[str]:
    """Experts take it that every rank of a stage holds tokens of its own; the one place that says where that is not so."""
    module = run.modules[name]
    if module.tp == 1 or module.sequence_parallel:
        return []
    return [f"modules.{name}.tp={module.tp}: a model with experts needs sequence_parallel: true there; take the key out"]
