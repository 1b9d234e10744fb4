"""Which families do the tests prove? Tiny configs of the real transformers classes, widths of 32 and 2 to 4 layers."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from support import models

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
QWEN_TOWER: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": 32,
}


def _config(model_type: str, **tree: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **tree)


def gemma3() -> PreTrainedConfig:
    """Bidirectional attention inside an image, sliding windows, tied embeddings, placeholders outside the vocabulary."""
    return _config(
        "gemma3",
        vision_config=TOWER | {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8, "vision_use_head": False},
        text_config=TEXT
        | {
            "model_type": "gemma3_text",
            "num_hidden_layers": 3,
            "head_dim": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        mm_tokens_per_image=4,
        boi_token_index=4,
        eoi_token_index=5,
        image_token_index=97,
    )


def internvl() -> PreTrainedConfig:
    """Images in tiles, layer scale, pixel shuffle."""
    return _config(
        "internvl",
        vision_config=TOWER | {"image_size": [16, 16], "patch_size": [4, 4]},
        text_config=TEXT | {"model_type": "qwen2"},
        image_token_id=5,
        image_seq_length=4,
    )


def _any_resolution(model_type: str, tower: str, text: str) -> PreTrainedConfig:
    return _config(
        model_type,
        vision_config=TOWER | {"model_type": tower, "image_size": 16, "patch_size": 4, "vision_use_head": False},
        text_config=TEXT | {"model_type": text},
        image_token_index=5,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32], [16, 48]],
        **({"video_token_index": 6} if model_type == "llava_onevision" else {}),
    )


def llava_next() -> PreTrainedConfig:
    """Tiles of any resolution, a parameter that ends rows of media tokens."""
    return _any_resolution("llava_next", "clip_vision_model", "llama")


def llava_onevision() -> PreTrainedConfig:
    """As LLaVA-NeXT, over SigLIP and Qwen2."""
    return _any_resolution("llava_onevision", "siglip_vision_model", "qwen2")


def mistral3() -> PreTrainedConfig:
    """Pixtral tower: images of their own size, rotary positions in two dims, patches merged, breaks between rows of tokens."""
    return _config(
        "mistral3",
        vision_config=TOWER | {"model_type": "pixtral", "image_size": 32, "patch_size": 4, "head_dim": 8},
        text_config=TEXT | {"model_type": "mistral", "head_dim": 8},
        image_token_index=5,
        spatial_merge_size=2,
    )


def qwen2_audio() -> PreTrainedConfig:
    """No vision at all."""
    return _config(
        "qwen2_audio",
        audio_config={
            "num_mel_bins": 8,
            "encoder_layers": 3,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "d_model": 32,
            "max_source_positions": 16,
        },
        text_config=TEXT | {"model_type": "qwen2"},
        audio_token_index=5,
    )


def qwen2_5_omni() -> PreTrainedConfig:
    """The thinker: images and sounds, M-RoPE."""
    return _config(
        "qwen2_5_omni_thinker",
        audio_config={
            "num_mel_bins": 8,
            "encoder_layers": 3,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "d_model": 32,
            "max_source_positions": 16,
            "n_window": 4,
            "output_dim": 32,
        },
        vision_config=QWEN_TOWER | {"window_size": 16, "fullatt_block_indexes": [1]},
        text_config=TEXT | {"rope_parameters": MROPE},
        image_token_index=5,
        video_token_index=6,
        audio_token_index=7,
        vision_start_token_id=8,
        vision_end_token_id=9,
        audio_start_token_id=10,
        audio_end_token_id=11,
        user_token_id=12,
    )


def qwen3_omni_moe() -> PreTrainedConfig:
    """The thinker: as Qwen2.5-Omni, with deepstack features and experts."""
    return _config(
        "qwen3_omni_moe_thinker",
        audio_config={
            "num_mel_bins": 8,
            "encoder_layers": 3,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "d_model": 32,
            "max_source_positions": 75,
            "n_window": 50,
            "n_window_infer": 100,
            "downsample_hidden_size": 8,
            "output_dim": 32,
        },
        vision_config=QWEN_TOWER | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        text_config=TEXT
        | {
            "num_hidden_layers": 3,
            "head_dim": 8,
            "rope_parameters": MROPE,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
        image_token_id=5,
        video_token_id=6,
        audio_token_id=7,
        vision_start_token_id=8,
        vision_end_token_id=9,
        audio_start_token_id=10,
        audio_end_token_id=11,
        user_token_id=12,
    )


def qwen3_vl_moe() -> PreTrainedConfig:
    """As Qwen3-VL, with experts."""
    return _config(
        "qwen3_vl_moe",
        vision_config=QWEN_TOWER | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        text_config=TEXT
        | {
            "num_hidden_layers": 3,
            "head_dim": 8,
            "rope_parameters": MROPE,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
        **models.QWEN_VL_TOKENS,
    )


def qwen3_5() -> PreTrainedConfig:
    """Linear attention in most layers, gated attention in the others."""
    return _config(
        "qwen3_5",
        vision_config=QWEN_TOWER | {"num_position_embeddings": 64},
        text_config=TEXT
        | {
            "num_hidden_layers": 3,
            "head_dim": 8,
            "rope_parameters": MROPE | {"partial_rotary_factor": 1.0},
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
        },
        **models.QWEN_VL_TOKENS,
    )


def _gemma4(**text: Any) -> PreTrainedConfig:
    return _config(
        "gemma4",
        vision_config=TOWER
        | {
            "num_key_value_heads": 4,
            "head_dim": 8,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
        },
        text_config=TEXT | {"head_dim": 8, "global_head_dim": 16, "sliding_window": 16} | text,
        image_token_id=5,
        video_token_id=6,
        audio_token_id=7,
        boi_token_id=8,
        eoi_token_id=9,
    )


def gemma4() -> PreTrainedConfig:
    """Patches with their places, attention of two head sizes, bidirectional in images in sliding windows only."""
    return _gemma4(
        num_hidden_layers=3,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        hidden_size_per_layer_input=0,
        use_bidirectional_attention="vision",
    )


def gemma4_e() -> PreTrainedConfig:
    """Gemma 4's E models: embeddings of every layer, keys and values that layers share."""
    return _gemma4(
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=96,
        num_kv_shared_layers=2,
    )


FAMILIES = {
    "llava": models.llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_5_vl": models.qwen2_5_vl,
    "qwen3_vl": models.qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_5": qwen3_5,
    "internvl": internvl,
    "gemma3": gemma3,
    "gemma4": gemma4,
    "gemma4_e": gemma4_e,
    "mistral3": mistral3,
    "qwen2_audio": qwen2_audio,
    "qwen2_5_omni": qwen2_5_omni,
    "qwen3_omni_moe": qwen3_omni_moe,
}
