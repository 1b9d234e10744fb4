"""Which models do the tests run? Real transformers classes at tiny size, as configs and as model folders."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlavaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SiglipVisionConfig,
)

from meshweave.model.blueprint import auto_class

QWEN_VL_TOKENS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}

QWEN_VL_TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
}


def _qwen3(**changes: Any) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        **changes,
    )


def llava(*, tied: bool = False) -> PreTrainedConfig:
    """CLIP tower and Qwen3; 16 media tokens an image; the last tower layer gets no gradient, as in LLaVA-1.5."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=_qwen3(tie_word_embeddings=tied),
        image_token_id=5,
        tie_word_embeddings=tied,
    )


def llava_siglip() -> PreTrainedConfig:
    """SigLIP tower: no class token, every feature kept."""
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=_qwen3(),
        image_token_id=5,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )


EXPERTS = 4


def llava_moe(**changes: Any) -> PreTrainedConfig:
    """CLIP tower and Qwen3-MoE: two of four experts a token, the first of three layers without experts."""
    text = Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
        **changes,
    )
    return LlavaConfig(vision_config=llava().vision_config, text_config=text, image_token_id=5)


def llava_mixtral() -> PreTrainedConfig:
    """CLIP tower and Mixtral: experts in every layer, routing weights that sum to 1."""
    text = MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        sliding_window=None,
    )
    return LlavaConfig(vision_config=llava().vision_config, text_config=text, image_token_id=5)


def qwen3_vl(*, tied: bool = False) -> PreTrainedConfig:
    """M-RoPE, fused query-key-value in the tower, two deepstack features per media token."""
    return Qwen3VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 4,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config=QWEN_VL_TEXT | {"num_hidden_layers": 3, "head_dim": 8},
        **QWEN_VL_TOKENS,
        tie_word_embeddings=tied,
    )


def qwen2_5_vl() -> PreTrainedConfig:
    """M-RoPE, fused query-key-value and window attention in the tower, biases in the language model."""
    return Qwen2_5_VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 4,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        text_config=QWEN_VL_TEXT | {"num_hidden_layers": 2},
        **QWEN_VL_TOKENS,
    )


def qwen3_vl_moe() -> PreTrainedConfig:
    """Qwen3-VL with experts in every layer of the language model."""
    text = {"num_hidden_layers": 3, "head_dim": 8, "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    vision = qwen3_vl().vision_config.to_dict() | {"model_type": "qwen3_vl_moe_vision"}
    return Qwen3VLMoeConfig(vision_config=vision, text_config=QWEN_VL_TEXT | text, **QWEN_VL_TOKENS)


EXPERT_CONFIGS = {"llava_moe": llava_moe, "llava_mixtral": llava_mixtral, "qwen3_vl_moe": qwen3_vl_moe}

CONFIGS = {"llava": llava, "llava_siglip": llava_siglip, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}


def with_layers(config: PreTrainedConfig, vision: int, language: int) -> PreTrainedConfig:
    """The same model with other numbers of layers in the encoder and in the language model."""
    tree = config.to_dict()
    tree["vision_config"]["depth" if "depth" in tree["vision_config"] else "num_hidden_layers"] = vision
    tree["text_config"]["num_hidden_layers"] = language
    tree["text_config"].pop("layer_types", None)
    return AutoConfig.for_model(**tree)


def write_model_folder(config: PreTrainedConfig, folder: Path, *, weights: bool = False) -> Path:
    """Writes config.json, and with `weights` also seeded random safetensors as `save_pretrained` writes them."""
    if weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = auto_class(config).from_config(config, dtype=torch.float32)
            for parameter in model.parameters():
                # Biases and norms too: zeros and ones would hide a wrong slice.
                torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.1)
            stored = model.state_dict().keys()
            for name, buffer in model.named_buffers():
                if name in stored:
                    buffer.uniform_(0.5, 1.5)
            model.save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    return folder
