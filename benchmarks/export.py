"""How much memory and time does it take to write a trained model? Two ranks, a model of 1 GB.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/export.py

Prints, for rank 0, the resident memory before the export and the most that was added during it; with `PYTHONPATH` set to the
sources of another version, the same of that one.
"""

import json
import shutil
import tempfile
import time
from pathlib import Path

from transformers import CLIPVisionConfig, LlavaConfig, Qwen3Config

from meshweave.checkpoint.export import export_model
from meshweave.config import RunConfig, parse_config
from meshweave.model.blueprint import read_model_config
from meshweave.parallel.build import build_model
from meshweave.world import World, launch


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        vision = CLIPVisionConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4)
        text = Qwen3Config(
            vocab_size=32000,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=14,
            num_attention_heads=8,
            num_key_value_heads=8,
            head_dim=128,
        )
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=5).save_pretrained(Path(folder, "model"))
        tree = {
            "model": str(Path(folder, "model")),
            "modules": {"vision": {"ranks": "0-1", "dp": 2}, "language": {"ranks": "0-1", "dp": 2}},
            "weights": "seeded",
            "train": {"steps": 1, "batch_size": 2},
            "output": str(Path(folder, "out")),
        }
        print(json.dumps(launch(parse_config(tree), measured), indent=2))


def measured(world: World, run: RunConfig) -> dict[str, float]:
    config = read_model_config(run.model)
    model = build_model(run, config, world.placements, world.meshes, world.rank, world.device, world.expert_meshes)
    # The peak starts anew from here.
    Path("/proc/self/clear_refs").write_text("5")
    before, started = _memory("VmRSS"), time.perf_counter()
    export_model(world, model, config, run, run.output)
    seconds = time.perf_counter() - started
    written = sum(file.stat().st_size for file in run.output.glob("*.safetensors")) if world.rank == 0 else 0
    if world.rank == 0:
        shutil.rmtree(run.output)
    return {
        "written MiB": round(written / 2**20),
        "rank 0 before MiB": round(before / 2**10),
        "rank 0 added at most MiB": round((_memory("VmHWM") - before) / 2**10),
        "seconds": round(seconds, 1),
    }


def _memory(key: str) -> int:
    """In KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
