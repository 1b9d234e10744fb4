#!/usr/bin/env bash
# One would guess: processor(text=[text], images=[first, second]) and processor(text=[text], images=[[first, second]]) are two ways to
#   say that one text has two pictures, and give the same tokens.
# What happens: LLaVA-OneVision's tiles every picture of the flat list (5,873 tokens here) and none of the nested one (1,461), without a
#   word. apply_chat_template(tokenize=True) nests, so a conversation with two pictures gets other tokens than by its text and a list.
# Versions: transformers 5.23.0, torch 2.14.1, torchvision 0.29.1, pillow 13.0.0. Date: 2026-11-27.
set -euo pipefail
home=$(mktemp -d); trap 'rm -rf "$home"' EXIT
python3 -m venv "$home/venv"
"$home/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 torch==2.14.1 torchvision==0.29.1 pillow==13.0.0
cat > "$home/tokens.py" <<'PY'
import transformers
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import (LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor,
                          PreTrainedTokenizerFast)

words = ["<pad>", "<image>", "<video>"]
model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", additional_special_tokens=["<image>", "<video>"])
processor = LlavaOnevisionProcessor(LlavaOnevisionImageProcessor(), tokenizer, LlavaOnevisionVideoProcessor(),
                                    num_image_tokens=729, vision_feature_select_strategy="full")
first, second = Image.new("RGB", (640, 480)), Image.new("RGB", (480, 640))
print("transformers", transformers.__version__)
found = {}
for name, images in {"flat list": [first, second], "nested list": [[first, second]]}.items():
    out = processor(text=["<image> <image>"], images=images, return_tensors="pt")
    found[name] = out["input_ids"].shape[1]
    print(f"{name}: {found[name]} tokens, squares of each picture: {out['pixel_values'].shape[1]}")
assert found["flat list"] > 2 * found["nested list"], "the behaviour has changed"
PY
HF_HUB_OFFLINE=1 "$home/venv/bin/python" "$home/tokens.py"
