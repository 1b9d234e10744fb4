"""A model leaves as the folder it came from: same keys, form, dtypes and files, from any layout; or not at all."""

import errno
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.families import FAMILIES
from support.folders import model_folder
from support.models import EXPERT_CONFIGS, qwen3_vl
from support.published import LAYER_0, published_tensors, random_model, write_published
from support.runs import module, run_of
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from meshweave.checkpoint import folder as writing
from meshweave.checkpoint.export import export_model
from meshweave.checkpoint.folder import FolderPlan, plan_folder, write_folder
from meshweave.config import RunConfig
from meshweave.errors import CheckpointError
from meshweave.model.blueprint import auto_class, blueprint_of, read_model_config
from meshweave.model.names import published_forms
from meshweave.model.weights import fill_seeded, materialise
from meshweave.parallel.build import build_model
from meshweave.train.trainer import train
from meshweave.world import World, launch


class Case(NamedTuple):
    family: str
    config: Callable[[], PreTrainedConfig]
    vision: dict[str, Any]
    language: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16
    turned: bool = True


def tied_at(top: bool, text: bool) -> PreTrainedConfig:
    config = qwen3_vl(tied=top)
    config.text_config.tie_word_embeddings = text
    return config


def untied_internvl() -> PreTrainedConfig:
    config = FAMILIES["internvl"]()
    config.tie_word_embeddings = False
    return config


square = FAMILIES["qwen3_vl_moe"]  # hidden == 2 · moe_intermediate: gate_up_proj [4, 32, 32]
PIPELINE = (module("0"), module("0-1", pp=2))
CASES = {
    "llava": Case("llava", FAMILIES["llava"], *PIPELINE),
    "llava, float32, tp2": Case("llava", FAMILIES["llava"], module("0-1", dp=2), module("0-1", tp=2), torch.float32),
    "llava, tp2 dp2": Case("llava", FAMILIES["llava"], module("0-1", dp=2), module("0-3", tp=2, dp=2)),
    "qwen2.5-vl, apart": Case("qwen2_5_vl", FAMILIES["qwen2_5_vl"], module("0"), module("1")),
    "qwen3-vl": Case("qwen3_vl", qwen3_vl, module("0-1", tp=2), module("0-1", dp=2)),
    "qwen3-vl, tied": Case("qwen3_vl", partial(tied_at, True, True), *PIPELINE),
    "qwen3-vl, tied at the top alone": Case("qwen3_vl", partial(tied_at, True, False), *PIPELINE),
    "qwen3-vl, tied in the text alone": Case("qwen3_vl", partial(tied_at, False, True), *PIPELINE),
    "gemma 3": Case("gemma3", FAMILIES["gemma3"], module("0-1", dp=2), module("0-1", tp=2)),
    "internvl": Case("internvl", untied_internvl, *PIPELINE),
    "qwen3-vl-moe": Case("qwen3_vl_moe", EXPERT_CONFIGS["qwen3_vl_moe"], module("0"), module("0-1", dp=2, ep=2)),
    "qwen3-vl-moe, square": Case("qwen3_vl_moe", square, module("0"), module("0-1", dp=2, ep=2)),
    "qwen3-vl-moe, square, as transformers 5 saves it": Case(
        "qwen3_vl_moe", square, module("0"), module("0-1", dp=2, ep=2), turned=False
    ),
    "qwen3-moe": Case("llava_moe", EXPERT_CONFIGS["llava_moe"], module("0"), module("0-3", tp=2, dp=2, etp=2)),
    "mixtral": Case("llava_mixtral", EXPERT_CONFIGS["llava_mixtral"], *PIPELINE),
}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            found |= {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    return found


def others_of(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file() and "safetensors" not in file.name]
    return {str(file.relative_to(folder)): file.read_text() for file in files}


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def exported(run: RunConfig, shard_bytes: int = 30_000) -> Path:
    """The folder that the run's model leaves as, before any step."""
    config = read_model_config(run.model)

    def work(world: World, run: RunConfig) -> None:
        model = build_model(run, config, world.placements, world.meshes, world.rank, world.device, world.expert_meshes)
        export_model(world, model, config, run, run.output, shard_bytes)

    launch(run, work)
    return run.output


@pytest.fixture(autouse=True)
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters come to rank 0 in several pieces, as large ones do."""
    monkeypatch.setattr("meshweave.checkpoint.collect._PIECE_BYTES", 1000)


@pytest.mark.parametrize("name", CASES)
def test_a_model_leaves_as_the_folder_it_came_from(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    source = tmp_path / "in"
    stock = write_published(case.config(), case.family, source, dtype=case.dtype, turned=case.turned)
    changes = {"weights": "pretrained", "dtype": "float32", "output": str(tmp_path / "out")}
    out = exported(run_of(source, case.vision, case.language, **changes))
    assert_same_tensors(tensors_of(out), published_tensors(case.family, stock, turned=case.turned))
    assert others_of(out) == others_of(source)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors_of(source).keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors_of(source).values())
    assert len(set(index["weight_map"].values())) == len(list(out.glob("*.safetensors"))) > 2
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("family", sorted(LAYER_0))
def test_seeded_weights_leave_as_the_published_ones_of_their_family(family: str) -> None:
    config = (EXPERT_CONFIGS | FAMILIES)[family]()
    forms = published_forms(blueprint_of(config, torch.float32))
    model = random_model(config)
    expected, values = published_tensors(family, model), model.state_dict()
    assert_same_tensors({key: part for name, form in forms.items() for key, part in form.apart(values[name])}, expected)
    assert set(LAYER_0[family]) - {"lm_head.weight"} <= expected.keys()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_seeded_weights_of_any_family_are_read_by_transformers_as_they_were(family: str, tmp_path: Path) -> None:
    """The square experts of Qwen3-VL-MoE are published turned, and transformers 5 would not turn them."""
    config = (FAMILIES | EXPERT_CONFIGS)[family]()
    config.save_pretrained(tmp_path / "in")
    write_folder(plan_folder(tmp_path / "in", config, seed=3), lambda name: None, tmp_path / "out")
    model = blueprint_of(config, torch.float32)
    materialise(model, torch.device("cpu"))
    fill_seeded(dict(model.named_parameters()), blueprint_of(config, torch.float32), 3)
    loaded, said = auto_class(config).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    tree = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (tree["architectures"], tree["dtype"]) == ([type(loaded).__name__], "float32")
    tied = "lm_head.weight" not in dict(model.named_parameters())
    assert tree["tie_word_embeddings"] == tree["text_config"]["tie_word_embeddings"] == tied


def test_transformers_sees_the_same_model_in_both_folders_where_nothing_is_learned(tmp_path: Path) -> None:
    """The input folder has no processor, and files besides."""
    source = model_folder("llava", tmp_path / "in", weights=True)
    AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    (source / "LICENSE").write_text("as you like")
    (source / "preprocessor_config.json").unlink()
    (source / "processor_config.json").unlink()
    changes = {"data": {"source": "synthetic"}, "weights": "pretrained", "dtype": "float32"}
    run = run_of(
        source,
        module("0-1", dp=2),
        module("0-1", tp=2),
        train={"lr": 1e-38, "steps": 1, "batch_size": 4},
        output=str(tmp_path / "run"),
        **changes,
    )
    config = read_model_config(source)
    launch(run, lambda world, run: train(world, run, config))
    assert others_of(run.output / "model") == others_of(source)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    image = config.image_token_id
    ids = torch.tensor([[7, *[image] * 16, 8, 9]])
    logits = [
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)(input_ids=ids, pixel_values=pixels).logits
        for folder in (source, run.output / "model")
    ]
    assert torch.equal(*logits)


def a_folder(tmp_path: Path) -> tuple[Path, PreTrainedConfig]:
    config = FAMILIES["llava"]()
    write_published(config, "llava", tmp_path / "in", dtype=torch.bfloat16)
    return tmp_path / "in", read_model_config(tmp_path / "in")


def test_what_no_rank_holds_leaves_as_it_came(tmp_path: Path) -> None:
    """An encoder that is not trained, and tensors that the model has no name for."""
    source, config = a_folder(tmp_path)
    with safe_open(source / "model-00001-of-00002.safetensors", framework="pt") as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    tensors |= {"talker.weight": torch.rand(3, dtype=torch.float64), "talker.steps": torch.tensor(7), "empty": torch.rand(0, 2)}
    save_file(tensors, source / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    value = torch.full((32,), 0.5)
    plan = plan_folder(source, config)
    write_folder(plan, {"model.language_model.norm.weight": value}.get, tmp_path / "out")
    expected = tensors_of(source) | {"language_model.model.norm.weight": value.bfloat16()}
    assert_same_tensors(tensors_of(tmp_path / "out"), expected)


def test_another_dtype_may_be_asked_for(tmp_path: Path) -> None:
    source, config = a_folder(tmp_path)
    write_folder(plan_folder(source, config, dtype=torch.float16), lambda name: None, tmp_path / "out")
    assert_same_tensors(tensors_of(tmp_path / "out"), {key: value.half() for key, value in tensors_of(source).items()})
    tree = json.loads((tmp_path / "out" / "config.json").read_text())
    text = (source / "config.json").read_text()
    assert tree == json.loads(text.replace('"bfloat16"', '"float16"')) and '"bfloat16"' in text
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").dtype == torch.float16


def test_seeded_weights_leave_in_the_dtype_that_their_config_names(tmp_path: Path) -> None:
    config = FAMILIES["llava"]()
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path / "in")
    changes = {"dtype": "float64", "output": str(tmp_path / "out")}
    out = exported(run_of(tmp_path / "in", module("0"), module("1"), **changes))
    assert {value.dtype for value in tensors_of(out).values()} == {torch.bfloat16}


def fails(plan: FolderPlan, out: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_folder(plan, lambda name: None, out)
    assert not list(out.parent.glob("out*"))


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, config = a_folder(tmp_path)
    plan = plan_folder(source, config, shard_bytes=30_000)
    usage = writing.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(writing.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        fails(plan, tmp_path / "out", r"out: the model takes 0\.00 GB and the disk has 0\.00 GB free; make room")
    monkeypatch.setattr(writing, "write_shard", full_at_the_third(writing.write_shard))
    fails(plan, tmp_path / "out", r"out: the disk is full \(No space left on device\); make room for 0\.00 GB")


def full_at_the_third(write: Callable[..., None]) -> Callable[..., None]:
    written = []

    def full(file: Path, entries: Any, tensors: Any) -> None:
        written.append(file)
        if len(written) == 3:
            next(iter(tensors))
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        write(file, entries, tensors)

    return full


def test_all_ranks_hear_of_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "write_shard", full_at_the_third(writing.write_shard))
    source, config = a_folder(tmp_path)
    changes = {"weights": "pretrained", "output": str(tmp_path / "out")}
    run = run_of(source, module("0"), module("0-1", pp=2), **changes)

    def work(world: World, run: RunConfig) -> None:
        model = build_model(run, config, world.placements, world.meshes, world.rank, world.device)
        try:
            export_model(world, model, config, run, run.output, 30_000)
        except CheckpointError as error:
            (tmp_path / f"heard-{world.rank}").write_text(str(error))

    launch(run, work)
    assert [(tmp_path / f"heard-{rank}").read_text().split("(")[0] for rank in (0, 1)] == [f"{run.output}: the disk is full "] * 2
    assert not list(tmp_path.glob("out*"))


def test_a_folder_that_is_there_is_replaced_only_where_that_is_asked_for(tmp_path: Path) -> None:
    source, config = a_folder(tmp_path)
    plan = plan_folder(source, config)
    (tmp_path / "out").mkdir()
    write_folder(plan, lambda name: None, tmp_path / "out")
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(source))
    with pytest.raises(CheckpointError, match="out: is there already; name another folder"):
        write_folder(plan, lambda name: None, tmp_path / "out")
    (tmp_path / "out" / "LICENSE").unlink()
    write_folder(plan, lambda name: None, tmp_path / "out", replace=True)
    assert others_of(tmp_path / "out") == others_of(source)
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_a_kill_leaves_no_half_of_a_folder_and_the_next_write_takes_away_what_it_left(tmp_path: Path) -> None:
    source, config = a_folder(tmp_path)
    plan = plan_folder(source, config, shard_bytes=30_000)

    def killed(name: str) -> None:
        if name == plan.names[-1]:
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=write_folder, args=(plan, killed, tmp_path / "out"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("out*")] == ["out.partial"]
    write_folder(plan, lambda name: None, tmp_path / "out")
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(source))
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]
