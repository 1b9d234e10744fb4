"""How does a trained model leave? As an ordinary Hugging Face folder."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PreTrainedConfig

from meshweave.model.blueprint import STORED, blueprint_of
from meshweave.model.modules import graph_of
from meshweave.parallel.build import LocalModel
from meshweave.parallel.gather import whole
from meshweave.train.world import World


def export_model(world: World, model: LocalModel, config: PreTrainedConfig, dtype: str, source: Path, folder: Path) -> None:
    """Gathers every parameter on rank 0, which writes `folder` with the processor of `source`. A collective over all ranks."""
    gathered: dict[str, Tensor] = {}
    graph = graph_of(blueprint_of(config, STORED[dtype]))
    for name, placement in world.placements.items():
        first = placement.ranks[0]
        for key, meta in graph.parameters(name).items():
            value = whole(model.modules[name].parameters[key]) if world.rank in placement else None
            if first != 0 and world.rank == first:
                assert value is not None
                dist.send(value.contiguous(), dst=0)
            elif first != 0 and world.rank == 0:
                value = torch.empty(meta.shape, dtype=meta.dtype, device=world.device)
                dist.recv(value, src=first)
            if world.rank == 0:
                assert value is not None
                gathered[key] = value.cpu()
    if world.rank != 0:
        return
    with torch.device("meta"):
        stock = AutoModelForImageTextToText.from_config(config, dtype=STORED[dtype])
    stock.load_state_dict(gathered, strict=False, assign=True)
    stock.tie_weights()
    if (source / "generation_config.json").exists():
        stock.generation_config = GenerationConfig.from_pretrained(source)
    stock.save_pretrained(folder)
    if any((source / file).exists() for file in ("processor_config.json", "preprocessor_config.json")):
        AutoProcessor.from_pretrained(source, backend="pil").save_pretrained(folder)
