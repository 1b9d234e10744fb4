"""A run goes on from a checkpoint as if it had never stopped: bit for bit in its own layout, to rounding in any other.

`MESHWEAVE_SEEDS=7 pytest tests/checkpoint/test_resume.py` hands the run from layout to layout in another order.
"""

import json
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.models import CONFIGS, EXPERT_CONFIGS, with_layers, write_model_folder
from support.runs import module
from support.two_towers import two_towers
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedConfig

from meshweave.checkpoint.collect import gather, held_parameters
from meshweave.checkpoint.load import load_state
from meshweave.checkpoint.manifest import checkpoint_folder
from meshweave.checkpoint.pieces import Piece
from meshweave.checkpoint.save import Saver
from meshweave.checkpoint.state import held_state
from meshweave.config import RunConfig, parse_config
from meshweave.config.fields import ranks_from_text
from meshweave.data.build import build_datasets
from meshweave.layout import placements
from meshweave.model.blueprint import STORED, TRAVELS_AS, blueprint_of, read_model_config
from meshweave.model.modules import graph_of, media_widths
from meshweave.parallel.build import LocalModel, build_model
from meshweave.parallel.mesh import build_expert_meshes, build_meshes
from meshweave.step.loading import build_loader
from meshweave.step.run import finish_gradients, run_step
from meshweave.step.schedules import agreed_schedule
from meshweave.step.worker import Travel
from meshweave.train.optimizer import build_optimizer, build_schedule
from meshweave.train.output import Start
from meshweave.train.trainer import train
from meshweave.world import World, launch

STEPS, SAVED = 5, 2


def run_of(model: Path, output: Path, modules: Mapping[str, Any], **changes: Any) -> RunConfig:
    train_changes = changes.pop("train", {})
    tree: dict[str, Any] = {
        "model": str(model),
        "modules": dict(modules),
        "data": {"source": "synthetic", "samples": 40, "eval_samples": 2},
        "train": {"steps": STEPS, "batch_size": 4, "microbatches": 2, "lr": 1e-2, "warmup_steps": 2} | train_changes,
        "weights": "seeded",
        "dtype": "float64",
        "output": str(output),
        "timeout_seconds": 60,
    }
    return parse_config(tree | changes)


def trained(run: RunConfig, start: Start | None = None) -> None:
    config = read_model_config(run.model)
    launch(run, lambda world, run: train(world, run, config, start=start or Start()))


def losses(output: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len({record["step"] for record in records}) == len(records)
    return {record["step"]: record["loss"] for record in records}


def weights(output: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted((output / "model").glob("*.safetensors")) for name, value in load_file(file).items()}


def both(vision: Mapping[str, Any], language: Mapping[str, Any]) -> dict[str, Any]:
    return {"vision": vision, "language": language}


def test_the_same_layout_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model = write_model_folder(with_layers(CONFIGS["llava"](), 2, 2), tmp_path / "model")
    saving = {"checkpoint": {"every": SAVED}}
    layout = both(module("0-1", dp=2), module("0-1", tp=2))
    unbroken = run_of(model, tmp_path / "whole", layout, train=saving)
    trained(unbroken)
    broken = run_of(model, tmp_path / "broken", layout, train=saving)
    trained(broken, Start(checkpoint=checkpoint_folder(unbroken.output, SAVED)))
    assert losses(broken.output) == {step: loss for step, loss in losses(unbroken.output).items() if step >= SAVED}
    for name, value in weights(unbroken.output).items():
        assert torch.equal(weights(broken.output)[name], value), name


DENSE = [
    both(module("0-1", dp=2), module("0-1", tp=2)),
    both(module("0-2", dp=3), module("3-6", dp=2, tp=2)),
    both(module("1,4", tp=2), module("0-3", pp=2, cp=2)),
    both(module("0-3", dp=2, replicas=2), module("0-3", dp=4, data_parallel="replicate")),
    both(module("6-7", pp=2), module("0-7", pp=2, dp=2, tp=2, sequence_parallel=False)),
    both(module("5"), module("0-5", dp=3, cp=2)),
    both(module("0-4", dp=5), module("0-4", dp=5)),
]
"""Every axis; the same ranks, others, some in common; parts of uneven size."""
SCHEDULED = [
    both(module("0-1", dp=2), module("0-1", pp=2)) | {"schedule": {"encoders": "nested"}},
    both(module("2"), module("0-1", pp=2)) | {"schedule": {"language": "interleaved"}},
    both(module("0-1", dp=2), module("0-3", pp=2, dp=2)) | {"schedule": {"language": "zero_bubble"}},
]
EXPERTS = [
    both(module("0-1", dp=2), module("0-3", dp=4, ep=2)),
    both(module("0"), module("0-3", dp=4, etp=2)),
    both(module("2"), module("0-3", pp=2, dp=2, ep=2)),
    both(module("0-3", dp=4), module("0-3", dp=4, ep=2, etp=2)),
    both(module("0-1", dp=2), module("2-5", tp=2, dp=2, ep=2)),
]
TOWERS = [
    {"vision": module("0-1", dp=2), "audio": module("2"), "language": module("0-2", dp=3)},
    {"vision": module("0"), "audio": module("0-1", dp=2), "language": module("1-2", tp=2)},
    {"vision": module("3"), "audio": module("3"), "language": module("0-1", pp=2)},
]


def tied(config: PreTrainedConfig) -> PreTrainedConfig:
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = True
    return config


CHAINS: dict[str, tuple[PreTrainedConfig, list[dict[str, Any]]]] = {
    "llava": (with_layers(CONFIGS["llava"](), 2, 2), DENSE),
    "llava tied": (tied(with_layers(CONFIGS["llava"](), 2, 4)), [DENSE[1], *SCHEDULED]),
    "qwen3_vl_moe": (with_layers(EXPERT_CONFIGS["qwen3_vl_moe"](), 4, 4), EXPERTS),
    "two towers": (two_towers(), TOWERS),
}
RANKS = 8
SEED = int(os.environ.get("MESHWEAVE_SEEDS", "0"))
"""Draws the order of a chain: which layout follows which."""


@pytest.mark.parametrize("chain", CHAINS)
def test_a_run_that_changes_its_layout_at_every_step_equals_one_that_never_does(chain: str, tmp_path: Path) -> None:
    config, layouts = CHAINS[chain]
    layouts = Random(SEED).sample(deepcopy(layouts), len(layouts))
    model = write_model_folder(config, tmp_path / "model")
    frozen = {"frozen": ["layers.0."]}
    runs = []
    for layout in layouts:
        schedule = layout.pop("schedule", {})
        modules = {name: its | (frozen if name == "vision" else {}) for name, its in layout.items()}
        train = {"batch_size": 10}
        runs.append(run_of(model, tmp_path / "out", modules, train=train, schedule=schedule, idle_ranks=idle(layout)))
    first = {name: module("0", **frozen if name == "vision" else {}) for name in layouts[0]}
    alone = run_of(model, tmp_path / "alone", first, train={"batch_size": 10})
    changing = launch(runs[0], partial(hop, runs=runs))
    steady = launch(alone, partial(hop, runs=[alone] * len(runs)))
    assert changing is not None
    assert steady is not None
    assert changing[0] == pytest.approx(steady[0], rel=1e-9)
    for name, value in steady[1].items():
        if " of " not in name:
            # A key's bias has no gradient but rounding: it stays about 0.
            error = (changing[1][name] - value).norm() / value.norm().clamp_min(1e-3)
            assert error < 1e-9, name


def idle(modules: Mapping[str, Any]) -> list[int]:
    return sorted(set(range(RANKS)) - {rank for its in modules.values() for rank in ranks_from_text(its["ranks"])})


def held_bytes(model: LocalModel, optimizer: AdamW) -> int:
    parameters = [value for part in model.modules.values() for value in part.parameters.values()]
    tensors = [*parameters, *(value for its in optimizer.state.values() for value in its.values())]
    return sum(Piece.of(value).part.nbytes for value in tensors) + torch.get_rng_state().nbytes


def hop(world: World, run: RunConfig, runs: Sequence[RunConfig]) -> tuple[list[float], dict[str, Tensor]]:
    """A step of each run in turn, handed from one to the next by a checkpoint. The losses, and the last state."""
    config = read_model_config(run.model)
    found, before = [], None
    for number, run in enumerate(runs):
        where = placements(run)
        meshes, expert_meshes = build_meshes(where, "cpu"), build_expert_meshes(where, "cpu")
        world = replace(world, placements=where, meshes=meshes, expert_meshes=expert_meshes)
        dataset, _ = build_datasets(run, config)
        schedule = agreed_schedule(world, run, config, dataset)
        model = build_model(run, config, where, meshes, world.rank, world.device, expert_meshes)
        optimizer = build_optimizer(run, {name: part.parameters for name, part in model.modules.items()})
        if number:
            graph = graph_of(blueprint_of(config, STORED[run.dtype]))
            shapes = {key: tuple(value.shape) for name in run.modules for key, value in graph.parameters(name).items()}
            read = load_state(world, checkpoint_folder(run.output, number), model, optimizer, shapes)
            assert read <= 1.3 * held_bytes(model, optimizer)
            now = state(model, optimizer, world)
            assert before is not None
            assert now.keys() == before.keys()
            assert all(torch.equal(now[key], before[key]) for key in now)
        rates = build_schedule(run, optimizer, number)
        loader = build_loader(run, dataset, world, schedule, model.part.rule)
        travel = Travel(media_widths(config), config.get_text_config().hidden_size, TRAVELS_AS[run.dtype])
        totals = run_step(model, loader.step(number), world, schedule, travel)
        if finish_gradients(model, totals, run.train.max_grad_norm):
            optimizer.step()
        rates.step()
        optimizer.zero_grad()
        assert totals.loss is not None
        found.append(totals.loss)
        before = state(model, optimizer, world)
        saver = Saver(world, run, len(dataset))
        saver.save(number + 1, held_state(model, optimizer, world), {})
        saver.wait()
    assert before is not None
    return found, before


def state(model: LocalModel, optimizer: AdamW, world: World) -> dict[str, Tensor]:
    """Whole parameters and optimizer state, on rank 0."""
    tensors: dict[str, Tensor] = dict(held_parameters(model))
    for name, parameter in held_parameters(model).items():
        tensors |= {f"{kind} of {name}": value for kind, value in optimizer.state.get(parameter, {}).items()}
    gathered = gather(world, tensors)
    assert not any(gathered.drift.values())
    return dict(gathered.values)
