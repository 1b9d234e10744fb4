"""Ranks hold their own stages, once each, with the same values under every cut."""

from functools import cache
from typing import Any

import pytest
import torch
from support.models import CONFIGS, llava, qwen3_vl, with_layers, write_model_folder
from support.ranks import run_ranks
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from meshweave.config import LANGUAGE, RunConfig, parse_config
from meshweave.layout import placements
from meshweave.model.blueprint import blueprint_of
from meshweave.model.modules import VISION, graph_of
from meshweave.model.parts import parts_of
from meshweave.parallel.build import build_model
from meshweave.parallel.gather import whole
from meshweave.parallel.mesh import build_meshes

UNCUT = ({"ranks": 0}, {"ranks": 0})


def config_of(family: str) -> PreTrainedConfig:
    return with_layers(llava(tied=True) if family == "llava tied" else CONFIGS[family](), 4, 5)


def run_of(vision: dict, language: dict, **top: Any) -> RunConfig:
    return parse_config(
        {
            "model": "unused",
            "weights": "seeded",
            "modules": {VISION: vision, LANGUAGE: language},
            "train": {"steps": 1, "batch_size": 4},
            **top,
        }
    )


def held(rank: int, run: RunConfig, config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """What this rank holds of every module."""
    placed = placements(run)
    meshes = build_meshes(placed, "cpu")
    model = build_model(run, config, placed, meshes, rank, torch.device("cpu"))
    return {
        name: {
            "stages": list(module.stages),
            "values": {key: whole(value) for key, value in module.parameters.items()},
            "trained": {key for key, value in module.parameters.items() if value.requires_grad},
            "tied": module.tied,
            "copies": module.copies,
            "partial": module.partial,
            "blocks": model.cuts[name],
            "meta": [key for stage in module.stages.values() for key, value in stage.named_buffers() if value.is_meta],
            "in stages": sorted(id(p) for stage in module.stages.values() for p in stage.parameters())
            == sorted(map(id, module.parameters.values())),
        }
        for name, module in model.modules.items()
    }


@cache
def uncut(family: str) -> dict[str, Tensor]:
    (found,) = run_ranks(1, held, run_of(*UNCUT), config_of(family))
    return {key: value for module in found.values() for key, value in module["values"].items()}


LAYOUTS = {
    "pp 4 and pp 2 × tp 2": ({"ranks": "0-3", "pp": 4}, {"ranks": "0-3", "pp": 2, "tp": 2}, {}),
    "pp 2 × dp 2 and pp 2 × dp 2": ({"ranks": "0-3", "pp": 2, "dp": 2}, {"ranks": "0-3", "pp": 2, "dp": 2}, {}),
    "pp 2 × tp 2 and interleaved": (
        {"ranks": "0-3", "pp": 2, "tp": 2},
        {"ranks": "0-3", "pp": 2, "dp": 2},
        {"schedule": {"language": "interleaved", "virtual_stages": 2}},
    ),
    "apart, bfloat16": ({"ranks": 0}, {"ranks": "1-3", "pp": 3, "layers": [3, 1, 1]}, {"dtype": "bfloat16"}),
}


@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("family", ["llava tied", "qwen3_vl"])
def test_every_rank_holds_its_stages_with_the_values_of_the_whole_model(family: str, layouts: str) -> None:
    vision, language, top = LAYOUTS[layouts]
    config, run = config_of(family), run_of(vision, language, **top)
    graph = graph_of(blueprint_of(config, torch.float32))
    values = uncut(family)
    placed = placements(run)
    for rank, modules in enumerate(run_ranks(4, held, run, config)):
        assert list(modules) == [name for name, placement in placed.items() if rank in placement]
        for name, found in modules.items():
            pp, position = placed[name].layout.pp, placed[name].coordinate(rank)["pp"]
            cut = found["blocks"]
            assert found["stages"] == list(range(position, len(cut), pp))
            names = set()
            for path, block in parts_of(graph, name).owners().items():
                if any(block in cut[stage] for stage in found["stages"]):
                    names |= {f"{path}.{key}" for key, _ in graph.model.get_submodule(path).named_parameters()}
            if family == "llava tied" and "lm_head.weight" in names:
                names = names - {"lm_head.weight"} | {"model.language_model.embed_tokens.weight"}
            assert set(found["values"]) == names
            assert found["trained"] == names
            assert set(found["partial"]) <= names
            assert not found["meta"]
            assert found["in stages"]
            for key, value in found["values"].items():
                assert torch.equal(value, values[key]), (rank, key)


def test_tied_embeddings_are_held_twice_and_named() -> None:
    run = run_of({"ranks": "0-3", "dp": 4}, {"ranks": "0-3", "pp": 4})
    tied = frozenset({"model.language_model.embed_tokens.weight"})
    found = [modules[LANGUAGE] for modules in run_ranks(4, held, run, config_of("llava tied"))]
    assert [module["tied"] for module in found] == [tied, frozenset(), frozenset(), tied]
    assert [module["copies"] for module in found] == [frozenset(), frozenset(), frozenset(), tied]
    loose = [modules[LANGUAGE] for modules in run_ranks(4, held, run, config_of("llava"))]
    assert not any(module["tied"] or module["copies"] for module in loose)


def test_pretrained_weights_are_read_into_their_stages(tmp_path: Any) -> None:
    folder = write_model_folder(with_layers(llava(tied=True), 4, 5), tmp_path, weights=True)
    stock = dict(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).named_parameters())
    run = run_of({"ranks": "0-1", "pp": 2}, {"ranks": "0-1", "pp": 2}, weights="pretrained", model=str(folder))
    for modules in run_ranks(2, held, run, config_of("llava tied")):
        for found in modules.values():
            for key, value in found["values"].items():
                assert torch.equal(value, stock[key]), key


@pytest.mark.parametrize("kind", ["shard", "replicate"])
def test_frozen_parameters_want_no_gradient(kind: str) -> None:
    vision = {"ranks": "0-3", "tp": 2, "dp": 2, "frozen": True, "data_parallel": kind}
    language = {"ranks": "0-3", "pp": 2, "dp": 2, "frozen": ["layers.0.", "norm"], "data_parallel": kind}
    run = run_of(vision, language)
    for modules in run_ranks(4, held, run, with_layers(qwen3_vl(), 4, 5)):
        assert modules[VISION]["trained"] == set()
        names = set(modules[LANGUAGE]["values"])
        assert modules[LANGUAGE]["trained"] == {name for name in names if "layers.0." not in name and "norm" not in name}
