"""What differs from one Hugging Face architecture to the next: one file a family."""

from transformers import PreTrainedConfig

from meshweave.config import LANGUAGE
from meshweave.errors import LayoutError
from meshweave.model.families import clip, qwen2_5_vl, qwen3_vl, siglip
from meshweave.model.families.plan import GATHERED_HEAD, CutPlan, PatchPlan, TensorPlan, matches
from meshweave.model.modules import ModelGraph

PLANS: dict[str, TensorPlan] = clip.PLANS | siglip.PLANS | qwen2_5_vl.PLANS | qwen3_vl.PLANS
"""`model_type` of a sub-model to its tensor-parallel plan, where transformers has none."""

CUTS: dict[str, CutPlan] = clip.CUTS | siglip.CUTS | qwen2_5_vl.CUTS | qwen3_vl.CUTS
"""`model_type` of an encoder to where it may be cut into pipeline stages."""

PATCHES: dict[str, PatchPlan] = qwen2_5_vl.PATCHES | qwen3_vl.PATCHES
"""`model_type` of an encoder to how its patches are shared out over `cp`."""

LANGUAGE_CUT = CutPlan(blocks="layers", before=("embed_tokens",))
"""transformers' text models are built alike."""

PROVEN = frozenset({"llava", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"})
"""`model_type`s that the tests verify; others take the generic path."""

HEAD_PLAN = TensorPlan(rules={"": GATHERED_HEAD})


def tensor_plans(graph: ModelGraph, name: str) -> dict[str, TensorPlan]:
    """Full name of a sub-model to its tensor-parallel plan, for one module with `tp` above 1.

    Raises:
        LayoutError: no sub-model has a plan, or a plan names something that is not there.
    """
    found = {}
    for child, module in graph.of_module(name).items():
        plan = _plan_of(getattr(module, "config", None))
        if plan is not None:
            found[child] = plan
    if not found:
        raise LayoutError(f"modules.{name}: there is no tensor-parallel plan for it; set its tp to 1")
    head = graph.model.get_output_embeddings()
    if name == LANGUAGE and head.weight is not graph.model.get_input_embeddings().weight:
        # A tied head stays whole on every rank, as its embedding does.
        found[next(key for key, module in graph.model.named_modules() if module is head)] = HEAD_PLAN
    for child, plan in found.items():
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
        there = {key for key, _ in module.named_modules()}
        lacking = sorted({plan.blocks, *plan.before, *plan.added} - there)
        if lacking:
            raise LayoutError(
                f"modules.{name}: {child} has no {', '.join(lacking)}, where {config.model_type} models are cut into pipeline "
                "stages; set its pp to 1"
            )
        return child, plan
    raise LayoutError(f"modules.{name}: it is not known where this module may be cut into pipeline stages; set its pp to 1")


def _plan_of(config: PreTrainedConfig | None) -> TensorPlan | None:
    """Ours, else transformers' own."""
    if config is None:
        return None
    rules = getattr(config, "base_model_tp_plan", None)
    return PLANS.get(config.model_type) or (TensorPlan(rules=rules) if rules else None)


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
