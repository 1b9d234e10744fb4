"""Qwen2.5-VL vision towers: fused query-key-value, gated MLP, window attention."""

from meshweave.model.families.plan import PACKED_QKV, CutPlan, PatchPlan, TensorPlan

PLANS = {
    "qwen2_5_vl_vision": TensorPlan(
        rules={
            "blocks.*.attn.qkv": PACKED_QKV,
            "blocks.*.attn.proj": "rowwise",
            "blocks.*.mlp.gate_proj": "colwise",
            "blocks.*.mlp.up_proj": "colwise",
            "blocks.*.mlp.down_proj": "rowwise",
            "merger.mlp.0": "colwise",
            "merger.mlp.2": "rowwise",
        },
        heads={"blocks.*.attn": ("num_heads",)},
    ),
}

CUTS = {"qwen2_5_vl_vision": CutPlan(blocks="blocks", before=("patch_embed",))}

PATCHES = {"qwen2_5_vl_vision": PatchPlan(blocks="blocks", merged=("merger",))}
