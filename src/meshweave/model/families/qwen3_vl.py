"""Qwen3-VL and Qwen3.5: fused query-key-value in the vision tower; Qwen3-VL's text model has Qwen3's shape, but no plan in
transformers."""

from dataclasses import replace

from transformers import Qwen3Config

from meshweave.model.families.plan import PACKED_QKV, CutPlan, PatchPlan, TensorPlan

_MERGER_RULES = {"linear_fc1": "colwise", "linear_fc2": "rowwise"}

_TOWER = TensorPlan(
    rules={
        "blocks.*.attn.qkv": PACKED_QKV,
        "blocks.*.attn.proj": "rowwise",
        "blocks.*.mlp.linear_fc1": "colwise",
        "blocks.*.mlp.linear_fc2": "rowwise",
    }
    | {f"merger.{name}": style for name, style in _MERGER_RULES.items()},
    heads={"blocks.*.attn": ("num_heads",)},
)
_DEEPSTACK_TOWER = replace(
    _TOWER, rules={**_TOWER.rules} | {f"deepstack_merger_list.*.{name}": style for name, style in _MERGER_RULES.items()}
)
_ATTENTION = {name: style for name, style in Qwen3Config.base_model_tp_plan.items() if "self_attn" in name}

PLANS = {
    "qwen3_vl_vision": _DEEPSTACK_TOWER,
    "qwen3_vl_moe_vision": _DEEPSTACK_TOWER,
    "qwen3_5_vision": _TOWER,
    "qwen3_5_moe_vision": _TOWER,
    "qwen3_vl_text": TensorPlan(rules=Qwen3Config.base_model_tp_plan),
    # Experts stay whole on every rank of tp.
    "qwen3_vl_moe_text": TensorPlan(rules=_ATTENTION),
}

_CUT = CutPlan(blocks="blocks", before=("patch_embed",), added=("pos_embed",))
_DEEPSTACK_CUT = replace(_CUT, taps="deepstack_merger_list", tapped="deepstack_visual_indexes")

CUTS = {
    "qwen3_vl_vision": _DEEPSTACK_CUT,
    "qwen3_vl_moe_vision": _DEEPSTACK_CUT,
    "qwen3_5_vision": _CUT,
    "qwen3_5_moe_vision": _CUT,
}

_PATCHES = PatchPlan(blocks="blocks", merged=("merger",))
_DEEPSTACK_PATCHES = replace(_PATCHES, merged=("merger", "deepstack_merger_list.*"))

PATCHES = {
    "qwen3_vl_vision": _DEEPSTACK_PATCHES,
    "qwen3_vl_moe_vision": _DEEPSTACK_PATCHES,
    "qwen3_5_vision": _PATCHES,
    "qwen3_5_moe_vision": _PATCHES,
}
