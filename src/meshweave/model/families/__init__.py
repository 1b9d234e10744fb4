"""What differs from one Hugging Face architecture to the next: one file a family."""

from transformers import PreTrainedConfig

from meshweave.model.families import clip, qwen3_vl, siglip
from meshweave.model.families.plan import TensorPlan

PLANS: dict[str, TensorPlan] = clip.PLANS | siglip.PLANS | qwen3_vl.PLANS
"""`model_type` of a sub-model to its tensor-parallel plan, where transformers has none."""


def tensor_plan(config: PreTrainedConfig) -> TensorPlan | None:
    """Plan of the sub-model with this config: ours, else transformers' own, else None."""
    if config.model_type in PLANS:
        return PLANS[config.model_type]
    rules = getattr(config, "base_model_tp_plan", None)
    return TensorPlan(rules=rules) if rules else None
