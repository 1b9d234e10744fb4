"""InternVL vision towers: CLIP's shape under other names."""

from meshweave.model.families.plan import CutPlan, TensorPlan

PLANS = {
    "internvl_vision": TensorPlan(
        rules={
            "encoder.layer.*.attention.q_proj": "colwise",
            "encoder.layer.*.attention.k_proj": "colwise",
            "encoder.layer.*.attention.v_proj": "colwise",
            "encoder.layer.*.attention.projection_layer": "rowwise",
            "encoder.layer.*.mlp.fc1": "colwise",
            "encoder.layer.*.mlp.fc2": "rowwise",
        },
        heads={"encoder.layer.*.attention": ("num_heads", "embed_dim")},
        unless="use_qk_norm",  # a norm over all heads
    )
}

CUTS = {"internvl_vision": CutPlan(blocks="encoder.layer", before=("embeddings",), hidden="squares", extra_positions=1)}
