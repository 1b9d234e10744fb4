"""What differs from one Hugging Face architecture to the next: one file a family."""

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedConfig

from meshweave.config import LANGUAGE
from meshweave.errors import LayoutError
from meshweave.model.families import (
    clip,
    internvl,
    pixtral,
    qwen2_5_omni,
    qwen2_5_vl,
    qwen3_omni_moe,
    qwen3_vl,
    siglip,
    whisper,
)
from meshweave.model.families.plan import GATHERED_HEAD, CutPlan, PatchPlan, TensorPlan, matches
from meshweave.model.modules import ModelGraph

PLANS: dict[str, TensorPlan] = (
    clip.PLANS
    | siglip.PLANS
    | internvl.PLANS
    | pixtral.PLANS
    | qwen2_5_vl.PLANS
    | qwen2_5_omni.PLANS
    | qwen3_vl.PLANS
    | qwen3_omni_moe.PLANS
    | whisper.PLANS
)
"""`model_type` of a sub-model to its tensor-parallel plan, where transformers has none."""

CUTS: dict[str, CutPlan] = (
    clip.CUTS
    | siglip.CUTS
    | internvl.CUTS
    | pixtral.CUTS
    | qwen2_5_vl.CUTS
    | qwen2_5_omni.CUTS
    | qwen3_vl.CUTS
    | qwen3_omni_moe.CUTS
    | whisper.CUTS
)
"""`model_type` of an encoder to where it may be cut into pipeline stages."""

PATCHES: dict[str, PatchPlan] = qwen2_5_vl.PATCHES | qwen3_vl.PATCHES
"""`model_type` of an encoder to how its patches are shared out over `cp`."""

LANGUAGE_CUT = CutPlan(blocks="layers", before=("embed_tokens",))
"""transformers' text models are built alike."""

PROVEN = frozenset(
    {
        "gemma3",
        "gemma4",
        "internvl",
        "llava",
        "llava_next",
        "llava_onevision",
        "mistral3",
        "qwen2_5_omni_thinker",
        "qwen2_5_vl",
        "qwen2_audio",
        "qwen3_5",
        "qwen3_omni_moe_thinker",
        "qwen3_vl",
        "qwen3_vl_moe",
    }
)
"""`model_type`s that the tests verify (docs/families.md); others take the generic path."""

HEAD_PLAN = TensorPlan(rules={"": GATHERED_HEAD})


def tensor_plans(graph: ModelGraph, name: str) -> dict[str, TensorPlan]:
    """Full name of a sub-model to its tensor-parallel plan, for one module with `tp` above 1.

    Raises:
        LayoutError: no sub-model has a plan, or a plan names something that is not there.
    """
    found = {}
    for child, module in graph.of_module(name).items():
        plan = _plan_of(module)
        if plan is not None:
            found[child] = plan
    if not found:
        raise LayoutError(f"modules.{name}: there is no tensor-parallel plan for it; set its tp to 1")
    head = graph.model.get_output_embeddings()
    if name == LANGUAGE and head.weight is not graph.model.get_input_embeddings().weight:
        # A tied head stays whole on every rank, as its embedding does.
        found[next(key for key, module in graph.model.named_modules() if module is head)] = HEAD_PLAN
    for child, plan in found.items():
        config = getattr(graph.model.get_submodule(child), "config", None)
        if plan.unless and getattr(config, plan.unless, False):
            raise LayoutError(f"modules.{name}: with {plan.unless} there is no tensor-parallel plan for {child}; set its tp to 1")
        for pattern in plan.rules:
            if next(matches(graph.model.get_submodule(child), pattern), None) is None:
                raise LayoutError(
                    f"modules.{name}: the tensor-parallel plan of {child} names {pattern!r}, which is not there; set its tp to 1"
                )
    return found


def cut_plan(graph: ModelGraph, name: str) -> tuple[str, CutPlan]:
    """Full name of the sub-model that holds a module's blocks, and where it may be cut.

    Raises:
        LayoutError: no sub-model has a plan, or the plan names something that is not there.
    """
    for child, module in graph.of_module(name).items():
        config = getattr(module, "config", None)
        plan = LANGUAGE_CUT if name == LANGUAGE else CUTS.get(getattr(config, "model_type", ""))
        if config is None or plan is None:
            continue
        if name == LANGUAGE and (reason := stages_apart(config)) is not None:
            raise LayoutError(f"modules.{name}: {reason}; set its pp to 1")
        there = {key for key, _ in module.named_modules()}
        lacking = sorted({plan.blocks, *plan.before, *plan.added, *plan.shaped} - there)
        if lacking:
            raise LayoutError(
                f"modules.{name}: {child} has no {', '.join(lacking)}, where {config.model_type} models are cut into pipeline "
                "stages; set its pp to 1"
            )
        return child, plan
    raise LayoutError(f"modules.{name}: it is not known where this module may be cut into pipeline stages; set its pp to 1")


def sliceable(text: PreTrainedConfig) -> str | None:
    """Why a language model's sequence cannot be cut over ranks (`cp`, or sequence-parallel `tp`), or None where it can."""
    kinds = sorted({kind for kind in _layer_types(text) if kind not in _LOOK_BACK})
    return f"{text.model_type} has {' and '.join(kinds)} layers, which carry a state along the sequence" if kinds else None


def stages_apart(text: PreTrainedConfig) -> str | None:
    """Why a language model cannot be cut into pipeline stages, or None where it can."""
    if getattr(text, "hidden_size_per_layer_input", 0):
        return f"every layer of {text.model_type} takes an embedding of its own, which only the first stage could look up"
    if getattr(text, "num_kv_shared_layers", 0):
        return f"the last {text.num_kv_shared_layers} layers of {text.model_type} take keys and values from earlier ones"
    return None


_LOOK_BACK = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Layer types that see other tokens by attention alone."""


def _layer_types(text: PreTrainedConfig) -> tuple[str, ...]:
    return tuple(getattr(text, "layer_types", None) or ())


def _plan_of(module: nn.Module) -> TensorPlan | None:
    """Ours, else transformers' own."""
    config = getattr(module, "config", None)
    if config is None:
        return None
    rules = getattr(config, "base_model_tp_plan", None)
    return PLANS.get(config.model_type) or (_without_alternatives(module, rules) if rules else None)


def patch_plan(graph: ModelGraph, name: str) -> tuple[str, PatchPlan]:
    """Full name of the sub-model whose patches are shared out over `cp`, and how.

    Raises:
        LayoutError: it is not known how.
    """
    for child, module in graph.of_module(name).items():
        kind = getattr(getattr(module, "config", None), "model_type", "")
        if kind in PATCHES:
            return child, PATCHES[kind]
    raise LayoutError(
        f"modules.{name}: its model does not take the patches of all items as one sequence, so cp cannot share them out; set "
        "its cp to 1 (dp deals out images and tiles)"
    )


def _without_alternatives(module: nn.Module, rules: Mapping[str, str]) -> TensorPlan:
    """transformers' plans name experts and what a model without them has in their place: only one of the two is there."""

    def part(pattern: str) -> str:
        return "experts" if "experts" in pattern else pattern.rpartition(".")[0]

    there = {part(pattern) for pattern in rules if next(matches(module, pattern), None) is not None}
    return TensorPlan(rules={pattern: style for pattern, style in rules.items() if part(pattern) in there})
