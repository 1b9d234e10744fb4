"""What do checkpoints cost? The stall of a step, and whole saves and loads beside plain DCP of the same tensors.

    python benchmarks/checkpoint.py [--width 768] [--ranks 2] [--rounds 5]

A LLaVA with AdamW's state, language model and encoder sharded over all ranks. Plain DCP is `dcp.save` and `dcp.load` of the same
DTensors with its default file-system writer; it writes no checksums. Rounds alternate, medians are printed, and every save is to
a new folder. Loads come from the page cache on both sides.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, LlavaConfig, Qwen3Config

from meshweave.checkpoint.load import load_state
from meshweave.checkpoint.manifest import checkpoint_folder
from meshweave.checkpoint.save import Saver
from meshweave.checkpoint.state import held_state
from meshweave.config import RunConfig, parse_config
from meshweave.model.blueprint import STORED, blueprint_of, read_model_config
from meshweave.model.modules import graph_of
from meshweave.parallel.build import build_model
from meshweave.train.optimizer import build_optimizer
from meshweave.world import World, launch


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768, help="hidden size of both modules")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder if left out")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        run = _run(Path(folder), asked.width, asked.ranks)
        measured = launch(run, partial(_measure, rounds=asked.rounds))
    assert measured is not None
    size, seconds = measured
    title = f"{size / 1e9:.2f} GB over {asked.ranks} ranks, {asked.rounds} rounds"
    table = Table("", "median", "fastest", "slowest", title=title)
    for name, times in seconds.items():
        table.add_row(name, *(f"{value:.3f} s" for value in (statistics.median(times), min(times), max(times))))
    Console().print(table)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"stall with async / synchronous save: {middle['stall of a step, async'] / middle['save at once']:.2f}")
    print(f"save / plain DCP: {middle['save at once'] / middle['save, plain DCP']:.2f}")
    print(f"load / plain DCP: {middle['load'] / middle['load, plain DCP']:.2f}")
    both = (middle["save at once"] + middle["load"]) / (middle["save, plain DCP"] + middle["load, plain DCP"])
    print(f"save and load / plain DCP: {both:.2f}")


def _run(folder: Path, width: int, ranks: int) -> RunConfig:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=6, image_size=224, patch_size=14, projection_dim=width)
    text = Qwen3Config(**sizes, num_hidden_layers=6, num_key_value_heads=width // 64, head_dim=64, vocab_size=32000)
    config = LlavaConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_id=31999)
    config.save_pretrained(folder / "model")
    everywhere = {"ranks": f"0-{ranks - 1}", "dp": ranks}
    return parse_config(
        {
            "model": str(folder / "model"),
            "modules": {"vision": everywhere, "language": everywhere},
            "train": {"steps": 1, "batch_size": ranks},
            "weights": "seeded",
            "output": str(folder / "out"),
        }
    )


def _measure(world: World, run: RunConfig, rounds: int) -> tuple[int, dict[str, list[float]]]:
    config = read_model_config(run.model)
    model = build_model(run, config, world.placements, world.meshes, world.rank, world.device, world.expert_meshes)
    parameters = {name: value for part in model.modules.values() for name, value in part.parameters.items()}
    optimizer = build_optimizer(run, {"language": parameters})
    for value in parameters.values():
        optimizer.state[value] = {
            "step": torch.ones(()),
            "exp_avg": torch.rand_like(value, requires_grad=False),
            "exp_avg_sq": torch.rand_like(value, requires_grad=False),
        }
    graph = graph_of(blueprint_of(config, STORED[run.dtype]))
    shapes = {key: tuple(value.shape) for name in run.modules for key, value in graph.parameters(name).items()}
    savers = {name: Saver(world, _with(run, name == "async"), samples=1) for name in ("at once", "async")}
    plain: dict[str, Any] = {f"model.{name}": value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        plain |= {f"optimizer.{kind}.{name}": kept for kind, kept in optimizer.state[value].items()}
    seconds: dict[str, list[float]] = {}
    for step in range(1, rounds + 2):
        whole, other = checkpoint_folder(run.output, step), run.output / "plain" / str(step)

        def save(saver: Saver) -> None:
            saver.save(step, held_state(model, optimizer, world), {})  # noqa: B023

        took = {
            "save at once": _clocked(partial(save, savers["at once"])),
            "save, plain DCP": _clocked(partial(dcp.save, plain, checkpoint_id=other)),
            "load": _clocked(partial(load_state, world, whole, model, optimizer, shapes)),
            "load, plain DCP": _clocked(partial(dcp.load, dict(plain), checkpoint_id=other)),
        }
        size = sum(file.stat().st_size for file in whole.iterdir())
        dist.barrier()
        if world.rank == 0:
            shutil.rmtree(whole)
        dist.barrier()
        took["stall of a step, async"] = _clocked(partial(save, savers["async"]))
        savers["async"].wait()
        dist.barrier()
        if world.rank == 0:
            shutil.rmtree(whole)
            shutil.rmtree(other)
        dist.barrier()
        # The first round fills caches and allocates what later ones use again.
        for name, value in took.items() if step > 1 else ():
            seconds.setdefault(name, []).append(value)
    return size, seconds


def _with(run: RunConfig, asynchronous: bool) -> RunConfig:
    assert run.train.checkpoint is not None
    checkpoint = run.train.checkpoint.model_copy(update={"asynchronous": asynchronous, "keep": None})
    return run.model_copy(update={"train": run.train.model_copy(update={"checkpoint": checkpoint})})


def _clocked(work: Callable[[], object]) -> float:
    """Seconds until the last rank has its `work` done."""
    dist.barrier()
    started = time.perf_counter()
    work()
    took = torch.tensor(time.perf_counter() - started)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return float(took)


if __name__ == "__main__":
    main()
