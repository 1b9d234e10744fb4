"""Whatever a run file may say, the model trains as in one process: runs drawn at random, two steps each, in float64.

`MESHWEAVE_SEEDS=200 pytest tests/verification/test_random_runs.py` draws 200 instead of `COVERING`, `MESHWEAVE_SEEDS=200-300`
those of these numbers; a seed always draws the same run. A draw that the command line would refuse before it starts a process
is skipped.
"""

import os
from collections.abc import Callable
from itertools import pairwise, product
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from support import models
from support.families import FAMILIES
from support.models import write_model_folder
from support.runs import module, run_of, verified
from support.two_towers import ImagesAndSounds, two_towers
from transformers import AutoConfig, PreTrainedConfig

from meshweave.config import RunConfig
from meshweave.data.synthetic import SyntheticDataset
from meshweave.errors import MeshweaveError
from meshweave.layout import placements
from meshweave.model.blueprint import blueprint_of
from meshweave.model.check import check_executable, check_model
from meshweave.model.experts import routers
from meshweave.model.modules import ENCODERS, graph_of, has_encoder
from meshweave.step.loading import build_planner
from meshweave.step.schedules import run_schedule

COVERING = (20, 34, 100, 114, 157, 178, 220, 250)
"""Together these have every axis of every module, placement, schedule and kind of sequence; none is refused."""
STEPS = 2

MODELS: dict[str, Callable[[], PreTrainedConfig]] = FAMILIES | {
    "llava_siglip": models.llava_siglip,
    "llava_moe": models.llava_moe,
    "llava_mixtral": models.llava_mixtral,
    "two_towers": two_towers,
}
WEIGHTS = {"llava": 4, "qwen3_vl": 4, "llava_moe": 3, "qwen3_vl_moe": 3, "two_towers": 3, "gemma3": 3, "qwen2_5_vl": 3}
"""Families that are drawn more often than others."""

UNTIED = {"llava", "llava_siglip", "qwen3_vl", "qwen2_5_vl", "internvl", "llava_next"}
CARRIES_A_STATE = {"qwen3_5"}
"""Sequences of these are neither cut nor packed."""
SHARES_PATCHES = {"qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"}
ONE_STAGE = {"language": {"gemma4_e"}, "vision": {"gemma4", "gemma4_e"}, "audio": set[str]()}
FROZEN = ("embed_tokens", "layers.0.", "layers.1.", "blocks.0.", "projector", "merger", "lm_head", "norm", "experts", "mlp.gate.")


def draw_run(seed: int, folder: Path) -> tuple[RunConfig, PreTrainedConfig]:
    random = Random(seed)
    family = random.choices(list(MODELS), [WEIGHTS.get(name, 1) for name in MODELS])[0]
    config = MODELS[family]()
    if family in UNTIED and random.random() < 0.3:
        config = tied(config)
    names = [name for name in ENCODERS if has_encoder(config, name)] + ["language"]
    world = random.choice([1, 2, 3, 4, 4, 5, 6, 6, 8, 8])
    modules = {
        name: draw_module(random, family, config, name, ranks)
        for name, ranks in zip(names, draw_ranks(random, len(names), world), strict=True)
    }
    language = modules["language"]
    microbatches = random.choice([1, 2, 2, 3, 4, 5])
    schedule = draw_schedule(random, modules, microbatches)
    stages = language["pp"] * schedule.get("virtual_stages", 1)
    config = with_blocks(config, max(2, stages) + ("deepstack" in str(config)))
    if random.random() < 0.15:
        blocks = config.get_text_config().num_hidden_layers
        edges = sorted(random.sample(range(1, blocks), min(stages, blocks) - 1))
        language["layers"] = [stop - start for start, stop in pairwise([0, *edges, blocks])]
    for name in random.sample(names, len(names) - 1):
        if random.random() < 0.25:
            modules[name]["frozen"] = draw_frozen(random, config, name)
    train: dict[str, Any] = {
        "microbatches": microbatches,
        "batch_size": max(language["dp"] * microbatches, random.choice([1, 4, 7, 10])),
        "max_grad_norm": random.choice([None, 0.1, 1.0]),
    }
    if routers(graph_of(blueprint_of(config, torch.float32))):
        train["router_aux_loss"] = random.choice([None, 0.0, 0.5])
        train["router_aux_scope"] = random.choice(["lane", "microbatch"])
    if family not in CARRIES_A_STATE and random.random() < 0.4:
        train["pack"] = True
        if random.random() < 0.5:
            data = dataset_of(config)(config, STEPS * train["batch_size"], seed)
            tokens = [data.meta(number).tokens for number in range(len(data))]
            even = sum(tokens) / STEPS / microbatches / language["dp"]
            train["max_tokens"] = int(max(*tokens, 1.3 * even) * random.uniform(1.1, 2))
    pretrained = random.random() < 0.15
    write_model_folder(config, folder, weights=pretrained)
    used = {rank for its in modules.values() for rank in ranks_of(its)}
    run = run_of(
        folder,
        modules.pop("vision", None),
        modules.pop("language"),
        modules=modules,
        schedule=schedule,
        idle_ranks=",".join(str(rank) for rank in range(max(used)) if rank not in used) or (),
        node_size=random.choice([None, None, 2, 3]),
        train=train,
        weights="pretrained" if pretrained else "seeded",
        output=str(folder / "out"),
        seed=seed,
    )
    return run, config


def draw_ranks(random: Random, modules: int, world: int) -> list[list[int]]:
    """Of every module, the language model last: the same ranks for all, none in common, or any."""
    match random.choice(["colocated", "colocated", "apart", "overlapping"]) if world > modules else "colocated":
        case "colocated":
            return [list(range(world))] * modules
        case "apart":
            cuts = sorted(random.sample(range(1, world), modules - 1))
            parts = [list(range(start, stop)) for start, stop in pairwise([0, *cuts, world])]
            largest = max(parts, key=len)
            parts.remove(largest)
            random.shuffle(parts)
            return [*parts, largest]
        case _:
            return [sorted(random.sample(range(world), random.randint(1, world))) for _ in range(modules)]


def draw_module(random: Random, family: str, config: PreTrainedConfig, name: str, ranks: list[int]) -> dict[str, Any]:
    text = config.get_text_config()
    language, whole = name == "language", family in CARRIES_A_STATE
    experts = bool(getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None))
    heads = text.num_key_value_heads if language else 4
    sizes = {
        "pp": [1] if family in ONE_STAGE[name] else [1, 2, 3, 4] if language else [1, 2],
        "dp": list(range(1, 9)),
        "cp": [1, 2, 3, 4] if language and not whole else [1, 2, 4] if name == "vision" and family in SHARES_PATCHES else [1],
        "tp": [tp for tp in (1, 2, 4) if heads % tp == 0],
        "replicas": [1] if language else [1, 1, 2, 4],
    }
    layouts = [dict(zip(sizes, its, strict=True)) for its in product(*sizes.values()) if prod(its) == len(ranks)]
    layout = random.choice([its for its in layouts if language or its["pp"] == 1 or its["cp"] == 1])
    found = module(",".join(map(str, ranks)), **layout, data_parallel=random.choice(["shard", "shard", "replicate"]))
    if language:
        if layout["tp"] > 1:
            found["sequence_parallel"] = not whole and (experts or random.random() < 0.75)
        if layout["cp"] > 1:
            found["context_parallel"] = random.choice(["ring", "ring", "ulysses"])
        if experts:
            stage = len(ranks) // layout["pp"]
            shared = [(ep, etp) for ep in (1, 2, 4) for etp in (1, 2, 4) if stage % (ep * etp) == 0]
            found["ep"], found["etp"] = random.choice(shared)
    return found


def draw_schedule(random: Random, modules: dict[str, dict[str, Any]], microbatches: int) -> dict[str, Any]:
    pipeline = modules["language"]["pp"]
    schedule: dict[str, Any] = {}
    if pipeline > 1:
        schedule["language"] = random.choice(["1f1b", "zero_bubble", "interleaved"])
        if schedule["language"] == "interleaved":
            schedule["virtual_stages"] = random.choice([2, 2, 3])
    within = all(ranks_of(its) <= ranks_of(modules["language"]) for its in modules.values())
    schedule["encoders"] = random.choice(
        ["auto", "three_phase", "graph_1f1b", *(["nested"] * 2 if within and pipeline > 1 else [])]
    )
    if schedule["encoders"] != "nested":
        schedule["macro_batch"] = random.choice([None, random.randint(1, microbatches)])
    return schedule


def draw_frozen(random: Random, config: PreTrainedConfig, name: str) -> Any:
    names = list(graph_of(blueprint_of(config, torch.float32)).parameters(name))
    there = [text for text in FROZEN if any(text in key for key in names)]
    return random.choice([True, random.sample(there, min(len(there), random.randint(1, 2)))])


def ranks_of(its: dict[str, Any]) -> set[int]:
    return set(map(int, its["ranks"].split(",")))


def tied(config: PreTrainedConfig) -> PreTrainedConfig:
    tree = config.to_dict()
    tree["tie_word_embeddings"] = tree["text_config"]["tie_word_embeddings"] = True
    return AutoConfig.for_model(**tree)


def with_blocks(config: PreTrainedConfig, blocks: int) -> PreTrainedConfig:
    """The same model with at least so many blocks in the language model, whose kinds go round."""
    tree = config.to_dict()
    text = tree["text_config"]
    if blocks <= text["num_hidden_layers"] or config.model_type == "gemma4":  # whose config speaks of every layer
        return config
    if types := text.get("layer_types"):
        text["layer_types"] = [types[number % len(types)] for number in range(blocks)]
    text["num_hidden_layers"] = blocks
    return AutoConfig.for_model(**tree)


def dataset_of(config: PreTrainedConfig) -> Callable[[Any, int, int], Any]:
    return ImagesAndSounds if config.model_type == "two_towers" else SyntheticDataset


def refused(run: RunConfig, config: PreTrainedConfig, data: Any) -> str | None:
    """What the command line would say of a run before it starts a process; None if it would start it."""
    try:
        check_model(run, config)
        check_executable(run, config)
        where = placements(run)
        planner = build_planner(run, data, where, run_schedule(run, config, where, data))
        for step in range(STEPS):
            planner.plan(step)
    except MeshweaveError as error:
        return str(error)
    return None


def seeds() -> list[int]:
    asked = os.environ.get("MESHWEAVE_SEEDS")
    if not asked:
        return list(COVERING)
    start, _, stop = asked.rpartition("-")
    return list(range(int(start or 0), int(stop)))


@pytest.mark.parametrize("seed", seeds())
def test_a_random_run_equals_the_single_process(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = draw_run(seed, tmp_path)
    monkeypatch.setattr("meshweave.verification.compare.SyntheticDataset", dataset_of(config))
    message = refused(run, config, dataset_of(config)(config, STEPS * run.train.batch_size, run.seed))
    if message is not None:
        assert "MESHWEAVE_SEEDS" in os.environ, message
        pytest.skip(message)
    shown = f"{config.model_type}: {run.model_dump(exclude_defaults=True)}"
    try:
        report = verified(run, STEPS)
    except Exception as error:
        error.add_note(f"the run was {shown}")
        raise
    assert report.passed, f"{report}\nof {shown}"
