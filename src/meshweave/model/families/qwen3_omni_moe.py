"""Qwen3-Omni: Qwen3-VL's vision tower with other mergers; experts stay whole on every rank of tp."""

from dataclasses import replace

from meshweave.model.families import qwen3_vl
from meshweave.model.families.plan import TensorPlan

_VL = qwen3_vl.PLANS["qwen3_vl_moe_vision"]
_MERGERS = {
    f"{merger}.mlp.{number}": style
    for merger in ("merger", "merger_list.*")
    for number, style in ((0, "colwise"), (2, "rowwise"))
}

PLANS = {
    "qwen3_omni_moe_vision_encoder": TensorPlan(
        rules={name: style for name, style in _VL.rules.items() if name.startswith("blocks.")} | _MERGERS, heads=_VL.heads
    ),
    "qwen3_omni_moe_text": qwen3_vl.PLANS["qwen3_vl_moe_text"],
}

CUTS = {"qwen3_omni_moe_vision_encoder": replace(qwen3_vl.CUTS["qwen3_vl_moe_vision"], taps="merger_list")}
