"""Whisper-like audio towers: Qwen2-Audio, Qwen-Omni."""

from meshweave.model.families.plan import CutPlan, TensorPlan

_PLAN = TensorPlan(
    rules={
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.out_proj": "rowwise",
        "layers.*.fc1": "colwise",
        "layers.*.fc2": "rowwise",
    },
    heads={"layers.*.self_attn": ("num_heads",)},
)

PLANS = dict.fromkeys(("qwen2_audio_encoder", "qwen2_5_omni_audio_encoder", "qwen3_omni_moe_audio_encoder"), _PLAN)

CUTS = {
    "qwen2_audio_encoder": CutPlan(
        blocks="layers", before=(), added=("embed_positions",), shaped=("conv1", "conv2"), hidden="sounds"
    ),
    "qwen2_5_omni_audio_encoder": CutPlan(blocks="layers", before=(), tupled=True, shaped=("conv1", "conv2"), hidden="frames"),
    "qwen3_omni_moe_audio_encoder": CutPlan(
        blocks="layers", before=(), tupled=True, shaped=("conv2d1", "conv2d2", "conv2d3", "conv_out"), hidden="tokens"
    ),
}
