"""Whatever a run file may say, the model trains as in one process: runs drawn at random, two steps each, in float64.

`MESHWEAVE_SEEDS=200 pytest tests/train/test_random_runs.py` draws 200 instead of the first 6; a seed always draws the same run.
"""

import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support.models import CONFIGS, with_layers, write_model_folder
from support.runs import module, run_of, verified
from support.two_towers import ImagesAndSounds, two_towers
from transformers import PreTrainedConfig

from meshweave.config import RunConfig

FROZEN = {
    "vision": [True, ["encoder.layers.0.", "visual.blocks.0."], ["projector", "merger"]],
    "audio": [True, ["audio_projector"]],
    "language": [True, ["embed_tokens"], ["layers.0."]],
}


def draw_module(random: Random, world: int, stages: int) -> dict[str, Any]:
    layouts = [
        {"pp": pp, "dp": dp, "tp": tp}
        for pp in range(1, stages + 1)
        for dp in (1, 2, 3, 4)
        for tp in (1, 2, 4)
        if pp * dp * tp <= world
    ]
    layout = random.choice(layouts)
    ranks = sorted(random.sample(range(world), layout["pp"] * layout["dp"] * layout["tp"]))
    kept = random.choice(["shard", "shard", "replicate"])
    return module(",".join(map(str, ranks)), **layout, data_parallel=kept)


def ranks_of(its: dict[str, Any]) -> set[int]:
    return set(map(int, its["ranks"].split(",")))


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


def draw_run(seed: int, folder: Path) -> RunConfig:
    random = Random(seed)
    world = random.choice([1, 2, 2, 3, 3, 4, 4, 4, 5, 6])
    family = random.choice(["llava", "llava", "qwen3_vl", "qwen3_vl", "two_towers"])
    names = ["vision", "audio", "language"] if family == "two_towers" else ["vision", "language"]
    modules = {name: draw_module(random, world, 4 if name == "language" else 2) for name in names}
    microbatches = random.choice([1, 2, 3, 4, 5, 8])
    schedule = draw_schedule(random, modules, microbatches)
    for name in random.sample(names, len(names) - 1):
        if random.random() < 0.25:
            modules[name]["frozen"] = random.choice(FROZEN[name])
    batch_size = max(modules["language"]["dp"] * microbatches, random.choice([1, 4, 7, 10]))
    stages = modules["language"]["pp"] * schedule.get("virtual_stages", 1)
    config = draw_model(random, family, stages)
    used = set().union(*(ranks_of(its) for its in modules.values()))
    write_model_folder(config, folder)
    return run_of(
        folder,
        modules.pop("vision"),
        modules.pop("language"),
        modules=modules,
        schedule=schedule,
        idle_ranks=",".join(str(rank) for rank in range(max(used)) if rank not in used) or (),
        node_size=random.choice([None, None, 2]),
        train={"batch_size": batch_size, "microbatches": microbatches},
        seed=seed,
    )


def draw_model(random: Random, family: str, stages: int) -> PreTrainedConfig:
    config = two_towers() if family == "two_towers" else CONFIGS[family](tied=random.random() < 0.3)
    # Two deepstack features are added on the first stage of Qwen3-VL.
    return with_layers(config, 3, max(2, stages) + (family == "qwen3_vl"))


@pytest.mark.parametrize("seed", range(int(os.environ.get("MESHWEAVE_SEEDS", "6"))))
def test_a_random_run_equals_the_single_process(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = draw_run(seed, tmp_path)
    if "audio" in run.modules:
        monkeypatch.setattr("meshweave.train.verify.SyntheticDataset", ImagesAndSounds)
    shown = run.model_dump(exclude_defaults=True)
    try:
        report = verified(run, steps=2)
    except Exception as error:
        error.add_note(f"the run was {shown}")
        raise
    assert report.passed, f"{report}\nof {shown}"
