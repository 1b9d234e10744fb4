"""What does a model folder look like, as the hub publishes it? One writer a family: files, names and templates; tiny models.

Stock classes read them. Numbers of the image processors are small, their keys are those of the published files.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

from support.families import FAMILIES
from support.models import write_model_folder

VICUNA = (  # LLaVA-1.5's, as published: nothing ends an answer
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' }}{% else %}{{ 'ASSISTANT: ' }}{% endif %}"
    "{% if message['role'] != 'system' %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ IMAGE }}{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ IMAGE }}{% else %}{{ part.text | trim }}{% endif %}{% endfor %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ '[INST]' }}{% endif %}"
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '[IMG]' }}{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{{ '[/INST]' if message.role == 'user' else eos_token }}{% endfor %}"
)
QWEN_MARKS = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|audio_pad|>")
NORMAL = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def byte_tokenizer(eos: str, *special: str, **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with some merges, whose first ids are `<pad>` and `<s>`."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<s>"],
        show_progress=False,
    )
    model.train_from_iterator(["What is in this image? The answer is a picture of a cat. USER ASSISTANT SYSTEM"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token=eos,
        pad_token="<pad>",
        bos_token="<s>",
        additional_special_tokens=list(special),
        **options,
    )


def model_folder(
    family: str, folder: Path, *, weights: bool = False, processor: Mapping[str, Any] | None = None, **changes: Any
) -> Path:
    """Writes a folder of a family of `support.families`.

    Args:
        weights: whether safetensors are among its files.
        processor: changes to the processor's keys (`processor_config.json`).
        changes: to the image processor's keys (`preprocessor_config.json`); None takes one out.
    """
    written = _WRITERS[family](folder, family, weights, changes)
    if processor:
        file = written / "processor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | processor))
    return written


def _write(
    folder: Path,
    family: str,
    weights: bool,
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    images: dict[str, Any],
    processor: dict[str, Any] | None,
    tokens: dict[str, str],
    video: bool = False,
) -> Path:
    """`tokens`: key of the config → token whose id it holds."""
    tree = FAMILIES[family]().to_dict()
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in tokens.items()}
    text = tree["text_config"]
    text |= {"vocab_size": -(-len(tokenizer) // 8) * 8, "eos_token_id": tokenizer.eos_token_id}
    text |= {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    if "vocab_size_per_layer_input" in text:
        text["vocab_size_per_layer_input"] = text["vocab_size"]
    if "position_embedding_size" in tree.get("vision_config", {}):  # patches of a side, of the longest picture that there is
        tree["vision_config"]["position_embedding_size"] = 160
    config = AutoConfig.for_model(**tree | ids)
    write_model_folder(config, folder, weights=weights)
    tokenizer.save_pretrained(folder)
    kept = json.loads((folder / "tokenizer_config.json").read_text())
    name = (processor or {}).get("processor_class") or images.get("processor_class")
    (folder / "tokenizer_config.json").write_text(json.dumps(kept | {"processor_class": name}))
    (folder / "chat_template.jinja").write_text(template)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({key: value for key, value in images.items() if value is not None})
    )
    if video:
        (folder / "video_preprocessor_config.json").write_text(json.dumps(images | {"video_processor_type": video}))
    if processor is not None:
        (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def _llava(folder: Path, family: str, weights: bool, changes: dict[str, Any]) -> Path:
    images = NORMAL | {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "do_resize": True,
        "size": {"shortest_edge": 32},
        "processor_class": "LlavaProcessor",
    }
    processor = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": 8,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
    tokens = {"image_token_index": "<image>"}
    return _write(folder, family, weights, byte_tokenizer("</s>", "<image>"), VICUNA, images | changes, processor, tokens)


def _llava_next(folder: Path, family: str, weights: bool, changes: dict[str, Any]) -> Path:
    images = NORMAL | {
        "image_processor_type": "LlavaNextImageProcessor",
        "aspect_ratio_setting": "anyres",
        "crop_size": {"height": 16, "width": 16},
        "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32], [16, 48]],
        "size": {"shortest_edge": 16},
        "processor_class": "LlavaNextProcessor",
    }
    processor = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": 4,
        "processor_class": "LlavaNextProcessor",
        "vision_feature_select_strategy": "default",
    }
    tokens = {"image_token_index": "<image>"}
    return _write(folder, family, weights, byte_tokenizer("</s>", "<image>"), VICUNA, images | changes, processor, tokens)


def _onevision(folder: Path, family: str, weights: bool, changes: dict[str, Any]) -> Path:
    images = NORMAL | {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32], [16, 48]],
        "size": {"height": 16, "width": 16},
        "processor_class": "LlavaOnevisionProcessor",
    }
    processor = {
        "image_token": "<image>",
        "num_image_tokens": 16,
        "processor_class": "LlavaOnevisionProcessor",
        "video_token": "<video>",
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    }
    tokens = {"image_token_index": "<image>", "video_token_index": "<video>"}
    text = byte_tokenizer("<|im_end|>", "<|im_start|>", "<image>", "<video>")
    template = CHATML.replace("IMAGE", "'<image>\n'")
    return _write(folder, family, weights, text, template, images | changes, processor, tokens, "LlavaOnevisionVideoProcessor")


def _qwen(folder: Path, family: str, weights: bool, changes: dict[str, Any]) -> Path:
    name, video = {
        "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
        "qwen2_5_omni": ("Qwen2_5OmniProcessor", "Qwen2VLVideoProcessor"),
        "qwen3_omni_moe": ("Qwen3OmniMoeProcessor", "Qwen2VLVideoProcessor"),
    }.get(family, ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"))
    omni = "omni" in family
    images = NORMAL | {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "processor_class": name,
        # Qwen2.5's files give bounds in pixels, Qwen3's a size.
        **(
            {"size": {"shortest_edge": 256, "longest_edge": 4096}}
            if name == "Qwen3VLProcessor"
            else {"min_pixels": 256, "max_pixels": 4096}
        ),
    }
    if omni:
        images["feature_extractor_type"] = "WhisperFeatureExtractor"
    marks = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "audio_token": "<|audio_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
        "audio_bos_token": "<|im_start|>",
        "audio_eos_token": "<|im_end|>",
    }
    text = byte_tokenizer("<|im_end|>", *QWEN_MARKS, **({"extra_special_tokens": marks} if omni else {}))
    kind = "index" if family == "qwen2_5_omni" else "id"
    tokens = {
        f"image_token_{kind}": "<|image_pad|>",
        f"video_token_{kind}": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        **({f"audio_token_{kind}": "<|audio_pad|>"} if omni else {}),
    }
    template = CHATML.replace("IMAGE", "'<|vision_start|><|image_pad|><|vision_end|>'")
    return _write(folder, family, weights, text, template, images | changes, None, tokens, video)


def _internvl(folder: Path, family: str, weights: bool, changes: dict[str, Any]) -> Path:
    images = NORMAL | {
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 4,
        "size": {"height": 16, "width": 16},
        "processor_class": "InternVLProcessor",
    }
    processor = {"image_seq_length": 4, "processor_class": "InternVLProcessor"}
    marks = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    text = byte_tokenizer("<|im_end|>", "<|im_start|>", *marks.values(), extra_special_tokens=marks)
    template = CHATML.replace("IMAGE", "'<IMG_CONTEXT>\n'")
    tokens = {"image_token_id": "<IMG_CONTEXT>"}
    return _write(folder, family, weights, text, template, images | changes, processor, tokens, "InternVLVideoProcessor")


def _gemma3(folder: Path, family: str, weights: bool, changes: dict[str, Any]) -> Path:
    images = NORMAL | {
        "image_processor_type": "Gemma3ImageProcessor",
        "image_seq_length": 4,
        "size": {"height": 32, "width": 32},
        "processor_class": "Gemma3Processor",
    }
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    text = byte_tokenizer("<end_of_turn>", "<start_of_turn>", *marks.values(), extra_special_tokens=marks)
    tokens = {
        "boi_token_index": "<start_of_image>",
        "eoi_token_index": "<end_of_image>",
        "image_token_index": "<image_soft_token>",
    }
    processor = {"image_seq_length": 4, "processor_class": "Gemma3Processor"}
    template = GEMMA.replace("IMAGE", "'<start_of_image>'")
    return _write(folder, family, weights, text, template, images | changes, processor, tokens)


def _gemma4(folder: Path, family: str, weights: bool, changes: dict[str, Any]) -> Path:
    images = {
        "image_processor_type": "Gemma4ImageProcessor",
        "patch_size": 4,
        "pooling_kernel_size": 2,
        "max_soft_tokens": 70,
        "processor_class": "Gemma4Processor",
    }
    marks = {
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "image_token": "<|image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    }
    text = byte_tokenizer("<end_of_turn>", "<start_of_turn>", *marks.values(), "<|video|>", extra_special_tokens=marks)
    tokens = {
        "image_token_id": "<|image|>",
        "boi_token_id": "<|image>",
        "eoi_token_id": "<image|>",
        "video_token_id": "<|video|>",
        "audio_token_id": "<|audio|>",
    }
    processor = {"image_seq_length": 70, "processor_class": "Gemma4Processor"}
    template = GEMMA.replace("IMAGE", "'<|image|>'")
    return _write(folder, family, weights, text, template, images | changes, processor, tokens, "Gemma4VideoProcessor")


def _mistral3(folder: Path, family: str, weights: bool, changes: dict[str, Any]) -> Path:
    images = NORMAL | {
        "image_processor_type": "PixtralImageProcessor",
        "patch_size": 4,
        "size": {"longest_edge": 32},
        "processor_class": "PixtralProcessor",
    }
    processor = {
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
        "image_token": "[IMG]",
        "patch_size": 4,
        "processor_class": "PixtralProcessor",
        "spatial_merge_size": 2,
    }
    text = byte_tokenizer("</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    return _write(folder, family, weights, text, MISTRAL, images | changes, processor, {"image_token_index": "[IMG]"})


_WRITERS: dict[str, Callable[[Path, str, bool, dict[str, Any]], Path]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _onevision,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "qwen3_vl_moe": _qwen,
    "qwen3_5": _qwen,
    "qwen2_5_omni": _qwen,
    "qwen3_omni_moe": _qwen,
    "internvl": _internvl,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "gemma4_e": _gemma4,
    "mistral3": _mistral3,
}
IMAGE_FAMILIES = tuple(_WRITERS)
"""Families of `support.families` that take images."""
