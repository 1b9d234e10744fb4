"""CLIP vision towers."""

from meshweave.model.families.plan import CutPlan, TensorPlan

BLOCK_RULES = {
    "encoder.layers.*.self_attn.q_proj": "colwise",
    "encoder.layers.*.self_attn.k_proj": "colwise",
    "encoder.layers.*.self_attn.v_proj": "colwise",
    "encoder.layers.*.self_attn.out_proj": "rowwise",
    "encoder.layers.*.mlp.fc1": "colwise",
    "encoder.layers.*.mlp.fc2": "rowwise",
}

PLANS = {"clip_vision_model": TensorPlan(rules=BLOCK_RULES)}

CUTS = {
    "clip_vision_model": CutPlan(
        blocks="encoder.layers", before=("embeddings", "pre_layrnorm"), hidden="squares", extra_positions=1
    )
}
