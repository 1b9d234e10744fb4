#!/usr/bin/env bash
# One would guess: a folder that holds Qwen3-VL-MoE's experts as they are published, [experts, hidden, 2 * inner], is read right whatever
#   the sizes are: the orientation belongs to the format.
# What happens: whether a tensor is turned is decided tensor by tensor from its shape. Where hidden == 2 * inner the two forms have the same
#   shape, and gate_up_proj is taken as it lies, without a word: the model computes with transposed experts. down_proj of the same folder
#   is turned. With any other sizes both are.
# Versions: transformers 5.23.0, torch 2.13.0 (CPU). Date: 2026-11-28.
set -euo pipefail
home=$(mktemp -d); trap 'rm -rf "$home"' EXIT
python3 -m venv "$home/venv"
"$home/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 torch==2.13.0 numpy==2.4.6
cat > "$home/load.py" <<'PY'
import sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen3VLMoeConfig
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

def turned_right(hidden, inner, folder):
    text = dict(hidden_size=hidden, moe_intermediate_size=inner, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, head_dim=16, num_experts=2, num_experts_per_tok=1, vocab_size=64, decoder_sparse_step=1,
                rope_scaling={"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True})
    vision = dict(hidden_size=32, intermediate_size=32, depth=1, num_heads=2, out_hidden_size=hidden, deepstack_visual_indexes=[],
                  num_position_embeddings=16, patch_size=4)
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, image_token_id=60, video_token_id=61, vision_start_token_id=62,
                              vision_end_token_id=63)
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    experts = {key: value for key, value in model.state_dict().items() if ".experts." in key}
    for key, value in experts.items():
        stored[key] = value.transpose(1, 2).contiguous()  # as the published checkpoints have it
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    read = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    return {key.rpartition(".")[2]: torch.equal(read[key], value) for key, value in experts.items()}

print("transformers", transformers.__version__)
base = Path(sys.argv[1])
other, square = turned_right(32, 24, base / "other"), turned_right(32, 16, base / "square")
print("hidden 32, inner 24, read as it was:", other)
print("hidden 32, inner 16, read as it was:", square)
assert other == {"gate_up_proj": True, "down_proj": True}, "the behaviour has changed"
assert square == {"gate_up_proj": False, "down_proj": True}, "the behaviour has changed"
PY
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$home/venv/bin/python" "$home/load.py" "$home"
