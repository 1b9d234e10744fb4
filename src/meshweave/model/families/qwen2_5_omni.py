"""Qwen2.5-Omni vision towers: Qwen2.5-VL's, with separate query, key and value."""

from meshweave.model.families import qwen2_5_vl
from meshweave.model.families.plan import TensorPlan

_VL = qwen2_5_vl.PLANS["qwen2_5_vl_vision"]

PLANS = {
    "qwen2_5_omni_vision_encoder": TensorPlan(
        rules={name: style for name, style in _VL.rules.items() if name != "blocks.*.attn.qkv"}
        | {f"blocks.*.attn.{name}": "colwise" for name in "qkv"},
        heads=_VL.heads,
    )
}

CUTS = {"qwen2_5_omni_vision_encoder": qwen2_5_vl.CUTS["qwen2_5_vl_vision"]}
