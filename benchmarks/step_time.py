"""How long does a step take? One meshweave process against a plain loop, and layouts against each other on 4 ranks.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/step_time.py

Prints what it measures: medians over alternating blocks of steps, on random samples of a LLaVA-shaped model (CLIP tower,
Qwen3 language model) that is built here and has random weights. Both sides of each comparison read the same samples.
"""

import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from stepping import build_training
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlavaConfig, PreTrainedConfig, Qwen3Config

from meshweave.config import RunConfig, parse_config
from meshweave.data.dataset import Dataset
from meshweave.data.loader import Loader
from meshweave.data.synthetic import SyntheticDataset
from meshweave.model.blueprint import read_model_config
from meshweave.train.optimizer import build_schedule
from meshweave.train.trainer import step_tokens
from meshweave.world import World, launch

BLOCK = 4
"""Steps of one side before it is the other's turn, so that a drifting machine slows both."""


def bench_config(width: int, layers: int) -> PreTrainedConfig:
    """A LLaVA of two equally deep and wide modules, 64 media tokens an image."""
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        image_size=64,
        patch_size=8,
    )
    text = Qwen3Config(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=width // 8,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=5, vision_feature_layer=-1)


def bench_run(folder: Path, modules: dict[str, Any], batch_size: int, steps: int) -> RunConfig:
    """A run over these modules."""
    train = {"steps": steps, "batch_size": batch_size, "lr": 1e-4, "weight_decay": 0.01}
    return parse_config({"model": str(folder), "modules": modules, "train": train})


def meshweave_step(
    world: World, run: RunConfig, config: PreTrainedConfig, dataset: Dataset
) -> tuple[Loader, Callable[[int], int]]:
    """The loader, and a function that takes training step `number` as `meshweave train` does and returns the step's tokens."""
    training = build_training(world, run, config, dataset)

    def step(number: int) -> int:
        local = training.loader.step(number)
        training.take(local)
        return step_tokens(local.plan)

    return training.loader, step


def plain_step(run: RunConfig, dataset: Dataset, loader: Loader) -> Callable[[int], None]:
    """The loop one writes by hand around the stock model: pad, forward with labels, backward, clip, AdamW."""
    model = AutoModelForImageTextToText.from_pretrained(run.model, dtype=torch.float32, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.train.lr, betas=run.train.betas, weight_decay=0.01, fused=True)
    schedule = build_schedule(run, optimizer)

    def step(number: int) -> None:
        samples = loader.sample_ids(number)
        texts = [dataset.text(sample) for sample in samples]
        media = [dataset.media(sample, slot) for sample in samples for slot in range(len(dataset.meta(sample).media))]
        ids = pad_sequence([text for text, _ in texts], batch_first=True)
        labels = pad_sequence([label for _, label in texts], batch_first=True, padding_value=-100)
        mask = pad_sequence([torch.ones_like(text) for text, _ in texts], batch_first=True)
        pixels = torch.cat([item["pixel_values"] for item in media])
        model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels, use_cache=False).loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return step


def compare_with_plain(world: World, run: RunConfig, config: PreTrainedConfig, blocks: int) -> tuple[list[float], list[float]]:
    """Seconds of every counted step: meshweave's, and the plain loop's."""
    dataset = SyntheticDataset(config, run.train.batch_size * run.train.steps, most_items=3)
    loader, ours = meshweave_step(world, run, config, dataset)
    plain = plain_step(run, dataset, loader)
    seconds: tuple[list[float], list[float]] = ([], [])
    for block in range(blocks + 1):
        for side, step in enumerate((ours, plain)):
            for number in range(block * BLOCK, (block + 1) * BLOCK):
                started = time.perf_counter()
                step(number)
                if block:  # the first is warm-up
                    seconds[side].append(time.perf_counter() - started)
    return seconds


def time_layout(world: World, run: RunConfig, config: PreTrainedConfig, blocks: int) -> tuple[list[float], list[int]]:
    """Seconds and tokens of every counted step of one layout."""
    dataset = SyntheticDataset(config, run.train.batch_size * run.train.steps, most_items=3)
    _, step = meshweave_step(world, run, config, dataset)
    seconds, tokens = [], []
    for number in range((blocks + 1) * BLOCK):
        started = time.perf_counter()
        count = step(number)
        if number >= BLOCK:
            seconds.append(time.perf_counter() - started)
            tokens.append(count)
    return seconds, tokens


LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "homogeneous dp4": {"vision": {"dp": 4}, "language": {"dp": 4}},
    "homogeneous tp2 dp2": {"vision": {"tp": 2, "dp": 2}, "language": {"tp": 2, "dp": 2}},
    "homogeneous tp4": {"vision": {"tp": 4}, "language": {"tp": 4}},
    "vision dp4, language tp2 dp2": {"vision": {"dp": 4}, "language": {"tp": 2, "dp": 2}},
    "vision dp4, language tp4": {"vision": {"dp": 4}, "language": {"tp": 4}},
}


def main(
    blocks: Annotated[int, typer.Option(help=f"Counted blocks of {BLOCK} steps.")] = 5,
    width: Annotated[int, typer.Option(help="Hidden size of both modules.")] = 256,
    layers: Annotated[int, typer.Option(help="Layers of each module.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Samples of a step.")] = 16,
) -> None:
    """Measures both comparisons and prints them."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console()
    steps = (blocks + 1) * BLOCK
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(bench_config(width, layers), dtype=torch.float32).save_pretrained(folder)
        config = read_model_config(folder)
        console.print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} thread(s) a process")
        run = bench_run(folder, {"vision": {"ranks": 0}, "language": {"ranks": 0}}, batch_size, steps)
        result = launch(run, partial(compare_with_plain, config=config, blocks=blocks))
        assert result is not None
        ours, plain = (statistics.median(side) for side in result)
        console.print(
            f"\none process, {blocks * BLOCK} steps each: meshweave {ours:.4f} s, plain loop {plain:.4f} s a step (medians)"
        )
        console.print(f"meshweave takes {ours / plain - 1:+.1%} of the plain loop's time\n")
        table = Table("4 ranks", "median step", "tokens/s", "over homogeneous with\nthe same language layout")
        rates: dict[str, float] = {}
        for label, modules in LAYOUTS.items():
            placed = {module: {"ranks": "0-3"} | sizes for module, sizes in modules.items()}
            timed = launch(bench_run(folder, placed, batch_size, steps), partial(time_layout, config=config, blocks=blocks))
            assert timed is not None
            seconds, tokens = timed
            rates[label] = sum(tokens) / sum(seconds)
            twin = next(
                (other for other, its in LAYOUTS.items() if its["vision"] == its["language"] == modules["language"]), label
            )
            gain = "" if twin == label else f"{rates[label] / rates[twin] - 1:+.1%}"
            table.add_row(label, f"{statistics.median(seconds):.4f} s", f"{rates[label]:,.0f}", gain)
        console.print(table)
        best = max(rate for label, rate in rates.items() if label.startswith("homogeneous"))
        mixed = max(rate for label, rate in rates.items() if not label.startswith("homogeneous"))
        console.print(f"best heterogeneous against best homogeneous: {mixed / best - 1:+.1%} tokens/s")


if __name__ == "__main__":
    typer.run(main)
