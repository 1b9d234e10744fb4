"""Pixtral vision towers: Mistral's blocks."""

from meshweave.model.families.plan import CutPlan, TensorPlan

PLANS = {
    "pixtral": TensorPlan(
        rules={
            "transformer.layers.*.attention.q_proj": "colwise",
            "transformer.layers.*.attention.k_proj": "colwise",
            "transformer.layers.*.attention.v_proj": "colwise",
            "transformer.layers.*.attention.o_proj": "rowwise",
            "transformer.layers.*.feed_forward.gate_proj": "colwise",
            "transformer.layers.*.feed_forward.up_proj": "colwise",
            "transformer.layers.*.feed_forward.down_proj": "rowwise",
        },
        heads={"transformer.layers.*.attention": ("num_heads",)},
    )
}

CUTS = {
    "pixtral": CutPlan(blocks="transformer.layers", before=("ln_pre",), shaped=("patch_conv",), hidden="sequence"),
}
