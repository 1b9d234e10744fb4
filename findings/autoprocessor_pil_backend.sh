#!/usr/bin/env bash
# One would guess: AutoProcessor.from_pretrained(folder, backend="pil") loads the processor with its PIL image processor; without
#   torchvision that is what one gets for any model whose image processor has a PIL twin.
# What happens: it raises for every processor that has a video part (here Qwen2.5-VL's), torchvision installed or not, since the option is
#   handed on to the video processor, which has no such backend. AutoImageProcessor takes it. Without the option the folder loads.
# Versions: transformers 5.23.0, torch 2.14.1, torchvision 0.29.1, pillow 13.0.0. Date: 2026-11-27.
set -euo pipefail
home=$(mktemp -d); trap 'rm -rf "$home"' EXIT
python3 -m venv "$home/venv"
"$home/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 torch==2.14.1 torchvision==0.29.1 pillow==13.0.0
cat > "$home/load.py" <<'PY'
import json, sys
from pathlib import Path
import transformers
from tokenizers import Tokenizer, models
from transformers import AutoImageProcessor, AutoProcessor, PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available

folder = Path(sys.argv[1])
words = ["<pad>", "<|image_pad|>", "<|video_pad|>", "a"]
model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>").save_pretrained(folder)
(folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
(folder / "preprocessor_config.json").write_text(json.dumps({
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
    "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 3136, "max_pixels": 12845056}))

def loaded(kind, **options):
    try:
        return type(kind.from_pretrained(folder, **options)).__name__
    except Exception as error:
        return f"{type(error).__name__}: {error}"

print("transformers", transformers.__version__, "- torchvision is there:", is_torchvision_available())
print("AutoProcessor:", loaded(AutoProcessor))
print("AutoImageProcessor, backend='pil':", loaded(AutoImageProcessor, backend="pil"))
refused = loaded(AutoProcessor, backend="pil")
print("AutoProcessor, backend='pil':", refused)
assert refused.startswith("ImportError: Video processor cannot be loaded"), "the behaviour has changed"
PY
mkdir "$home/folder"
HF_HUB_OFFLINE=1 "$home/venv/bin/python" "$home/load.py" "$home/folder"
