"""How does a trained model leave? As an ordinary Hugging Face folder."""

import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from meshweave.checkpoint.collect import gather_led, whole_values
from meshweave.config import RunConfig
from meshweave.model.blueprint import STORED, auto_class, blueprint_of
from meshweave.model.weights import fill_pretrained, fill_seeded, materialise
from meshweave.parallel.build import LocalModel
from meshweave.world import World

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz"}
"""Endings of files that hold weights, which training has changed."""


def export_model(world: World, model: LocalModel, config: PreTrainedConfig, run: RunConfig, folder: Path) -> None:
    """Gathers every parameter on rank 0, which writes `folder`, with the other files of the run's model folder. A collective
    over all ranks."""
    gathered = gather_led(model, world, whole_values(model))
    if world.rank != 0:
        return
    source = run.model
    with torch.device("meta"):
        stock = auto_class(config).from_config(config, dtype=STORED[run.dtype])
    stock.load_state_dict(gathered, strict=False, assign=True)
    stock.tie_weights()
    _fill_untrained(stock, config, run)
    if (source / "generation_config.json").exists():
        stock.generation_config = GenerationConfig.from_pretrained(source)
    stock.save_pretrained(folder)
    _copy_others(source, folder)


def _copy_others(source: Path, folder: Path) -> None:
    """Tokenizer, processor and template files, licence, code: whatever else the input folder holds, as it is."""
    for file in sorted(source.rglob("*")):
        place = file.relative_to(source)
        hidden = any(part.startswith(".") for part in place.parts)
        weights = file.suffix in _WEIGHTS or file.name.endswith(".index.json")
        if file.is_file() and not hidden and not weights and not (folder / place).exists():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / place)


def _fill_untrained(stock: PreTrainedModel, config: PreTrainedConfig, run: RunConfig) -> None:
    """Stored buffers, and parameters of encoders that the run has no module for, are as they were at the start."""
    kept = stock.state_dict().keys()
    stored = {name for name, _ in stock.named_buffers() if name in kept}
    unheld = {name for name, parameter in stock.named_parameters() if parameter.is_meta}
    if not stored | unheld:
        return
    materialise(stock, torch.device("cpu"))
    tensors: dict[str, torch.Tensor] = {**dict(stock.named_buffers()), **dict(stock.named_parameters())}
    targets = {name: tensors[name] for name in stored | unheld}
    blueprint = blueprint_of(config, STORED[run.dtype])
    if run.weights == "seeded":
        fill_seeded(targets, blueprint, run.seed)
    else:
        fill_pretrained(targets, blueprint, run.model)
