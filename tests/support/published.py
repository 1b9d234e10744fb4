"""What are the safetensors of a published model called, and how do they lie in the file? Tiny models in that form.

Written from the files on the Hub (llava-hf/llava-1.5-7b-hf, Qwen/Qwen2.5-VL-7B-Instruct, Qwen/Qwen3-VL-2B-Instruct,
Qwen/Qwen3-VL-30B-A3B-Instruct, google/gemma-3-4b-it, OpenGVLab/InternVL3_5-2B-HF, mistralai/Mixtral's experts), not with the
project's code.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from meshweave.model.blueprint import auto_class

_LLAVA = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
_WITH_TOWER = _LLAVA | {"model.vision_tower.": "vision_tower.vision_model."}
PREFIXES: dict[str, dict[str, str]] = {
    "llava": _WITH_TOWER,
    "llava_siglip": _WITH_TOWER,
    "llava_moe": _WITH_TOWER,
    "llava_mixtral": _WITH_TOWER,
    "gemma3": _WITH_TOWER,
    "internvl": _LLAVA | {"model.vision_tower.": "vision_tower."},
    "qwen2_5_vl": {"model.visual.": "visual.", "model.language_model.": "model."},
    "qwen3_vl": {},
    "qwen3_vl_moe": {},
}
"""Family to prefixes of names in transformers 5's models, and what stands there in the published files."""

LAYER_0: dict[str, tuple[str, ...]] = {
    "llava": (
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.model.norm.weight",
        "multi_modal_projector.linear_1.bias",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.0.self_attn.out_proj.weight",
        "vision_tower.vision_model.pre_layrnorm.weight",
    ),
    "qwen2_5_vl": (
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.norm.weight",
        "visual.blocks.0.attn.qkv.weight",
        "visual.merger.mlp.0.weight",
        "visual.patch_embed.proj.weight",
    ),
    "qwen3_vl": (
        "lm_head.weight",
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.0.self_attn.q_norm.weight",
        "model.visual.blocks.0.mlp.linear_fc1.weight",
        "model.visual.deepstack_merger_list.0.linear_fc1.weight",
        "model.visual.pos_embed.weight",
    ),
    "qwen3_vl_moe": (
        "lm_head.weight",
        "model.language_model.layers.0.mlp.experts.down_proj",
        "model.language_model.layers.0.mlp.experts.gate_up_proj",
        "model.language_model.layers.0.mlp.gate.weight",
    ),
    "gemma3": (
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.pre_feedforward_layernorm.weight",
        "multi_modal_projector.mm_input_projection_weight",
        "multi_modal_projector.mm_soft_emb_norm.weight",
        "vision_tower.vision_model.embeddings.patch_embedding.bias",
        "vision_tower.vision_model.post_layernorm.weight",
    ),
    "internvl": (
        "language_model.model.embed_tokens.weight",
        "multi_modal_projector.layer_norm.weight",
        "vision_tower.embeddings.cls_token",
        "vision_tower.embeddings.patch_embeddings.projection.bias",
        "vision_tower.encoder.layer.0.attention.q_proj.weight",
        "vision_tower.encoder.layer.0.lambda_1",
    ),
    "llava_moe": ("language_model.model.layers.1.mlp.experts.3.gate_proj.weight",),
    "llava_mixtral": (
        "language_model.model.layers.0.block_sparse_moe.experts.0.w1.weight",
        "language_model.model.layers.0.block_sparse_moe.gate.weight",
    ),
}
"""Some keys of the published files."""


def random_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A stock model whose every parameter is random: zeros and ones would hide a wrong slice."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.1)
    return model


def published_tensors(family: str, model: PreTrainedModel, *, turned: bool = True) -> dict[str, Tensor]:
    """The model's tensors as the family's published files hold them.

    Args:
        turned: whether Qwen3-VL-MoE's experts lie as published; else as transformers 5 saves them.
    """
    kept = {name for name, _ in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name not in kept and name in dict(model.named_parameters(remove_duplicate=False)):
            continue  # tied
        key = name
        for prefix, published in PREFIXES[family].items():
            if name.startswith(prefix):
                key = published + name.removeprefix(prefix)
        if ".experts." not in key:
            tensors[key.replace(".mlp.gate.", ".block_sparse_moe.gate.") if family == "llava_mixtral" else key] = value
        elif family == "qwen3_vl_moe":
            tensors[key] = value.transpose(1, 2) if turned else value
        else:
            tensors |= _one_by_one(family, key, value)
    return {key: value.contiguous() for key, value in tensors.items()}


def write_published(
    config: PreTrainedConfig, family: str, folder: Path, *, dtype: torch.dtype = torch.float32, turned: bool = True
) -> PreTrainedModel:
    """Writes a folder of two safetensors files, with other files beside them. Returns the model that it holds."""
    model = random_model(config, dtype)
    config.architectures, config.dtype = [type(model).__name__], dtype
    write_config(config, folder)
    tensors = published_tensors(family, model, turned=turned)
    keys = sorted(tensors)
    files = {key: f"model-0000{1 + (2 * place >= len(keys))}-of-00002.safetensors" for place, key in enumerate(keys)}
    for file in sorted(set(files.values())):
        save_file({key: tensors[key] for key in keys if files[key] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for name in ("LICENSE", "tokenizer.json", "chat_template.jinja", "generation_config.json", "code/modeling.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f'{{"what": "{name}"}}')
    return model


def write_config(config: PreTrainedConfig, folder: Path) -> None:
    """Writes config.json in the words of the published files, which transformers 4 reads, too."""
    config.save_pretrained(folder)
    tree = json.loads((folder / "config.json").read_text())
    text = tree["text_config"]
    if "mrope_section" in text.get("rope_parameters", {}):
        rope = text.pop("rope_parameters")
        text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    if "num_local_experts" in text and text["model_type"] != "mixtral":
        text["num_experts"] = text.pop("num_local_experts")
    (folder / "config.json").write_text(json.dumps(tree))


def _one_by_one(family: str, key: str, value: Tensor) -> dict[str, Tensor]:
    names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    if family == "llava_mixtral":
        names = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
        key = key.replace(".mlp.", ".block_sparse_moe.")
    place, _, last = key.rpartition(".")
    return {
        f"{place}.{expert}.{piece}.weight": part
        for expert, whole in enumerate(value)
        for piece, part in zip(names[last], whole.chunk(len(names[last])), strict=True)
    }
