"""How does a trained model leave? As an ordinary Hugging Face folder."""

from pathlib import Path

import torch
from transformers import AutoProcessor, GenerationConfig, PreTrainedConfig

from meshweave.model.blueprint import STORED, auto_class
from meshweave.parallel.build import LocalModel
from meshweave.train.collect import gather_led, whole_values
from meshweave.train.world import World


def export_model(world: World, model: LocalModel, config: PreTrainedConfig, dtype: str, source: Path, folder: Path) -> None:
    """Gathers every parameter on rank 0, which writes `folder` with the processor of `source`. A collective over all ranks."""
    gathered = gather_led(model, world, whole_values(model))
    if world.rank != 0:
        return
    with torch.device("meta"):
        stock = auto_class(config).from_config(config, dtype=STORED[dtype])
    stock.load_state_dict(gathered, strict=False, assign=True)
    stock.tie_weights()
    if (source / "generation_config.json").exists():
        stock.generation_config = GenerationConfig.from_pretrained(source)
    stock.save_pretrained(folder)
    if any((source / file).exists() for file in ("processor_config.json", "preprocessor_config.json")):
        AutoProcessor.from_pretrained(source, backend="pil").save_pretrained(folder)
