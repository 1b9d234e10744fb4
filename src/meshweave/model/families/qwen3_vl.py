"""Qwen3-VL: fused query-key-value in the vision tower; its text model has Qwen3's shape, but no plan in transformers."""

from transformers import Qwen3Config

from meshweave.model.families.plan import PACKED_QKV, CutPlan, PatchPlan, TensorPlan

_MERGER_RULES = {"linear_fc1": "colwise", "linear_fc2": "rowwise"}

PLANS = {
    "qwen3_vl_vision": TensorPlan(
        rules={
            "blocks.*.attn.qkv": PACKED_QKV,
            "blocks.*.attn.proj": "rowwise",
            "blocks.*.mlp.linear_fc1": "colwise",
            "blocks.*.mlp.linear_fc2": "rowwise",
        }
        | {f"merger.{name}": style for name, style in _MERGER_RULES.items()}
        | {f"deepstack_merger_list.*.{name}": style for name, style in _MERGER_RULES.items()},
        heads={"blocks.*.attn": "num_heads"},
    ),
    "qwen3_vl_text": TensorPlan(rules=Qwen3Config.base_model_tp_plan),
}

CUTS = {
    "qwen3_vl_vision": CutPlan(
        blocks="blocks",
        before=("patch_embed",),
        added=("pos_embed",),
        taps="deepstack_merger_list",
        tapped="deepstack_visual_indexes",
    )
}

PATCHES = {"qwen3_vl_vision": PatchPlan(blocks="blocks", merged=("merger", "deepstack_merger_list.*"))}
