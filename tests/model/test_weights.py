"""Parameters and buffers come out as transformers has them, from one file or many, under any key names it knows."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILIES
from support.models import CONFIGS, EXPERT_CONFIGS, write_model_folder
from support.published import LAYER_0, write_published
from transformers import AutoModelForImageTextToText, PreTrainedModel

from meshweave.errors import CheckpointError
from meshweave.model.blueprint import auto_class, blueprint_of, read_model_config
from meshweave.model.weights import check_weights, fill_pretrained, fill_seeded, materialise


def filled(folder: Path, seed: int | None) -> PreTrainedModel:
    config = read_model_config(folder)
    model = blueprint_of(config, torch.float32)
    materialise(model, torch.device("cpu"))
    targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    blueprint = blueprint_of(config, torch.float32)
    if seed is None:
        fill_pretrained(targets, blueprint, folder)
    else:
        fill_seeded(targets, blueprint, seed)
    return model


def assert_same(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    buffers = dict(theirs.named_buffers())
    assert dict(ours.named_buffers()).keys() == buffers.keys()
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name


@pytest.mark.parametrize("family", CONFIGS | EXPERT_CONFIGS)
@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_a_folder_loads_as_from_pretrained_loads_it(family: str, shard: str, tmp_path: Path) -> None:
    write_model_folder((CONFIGS | EXPERT_CONFIGS)[family](), tmp_path / "one", weights=True)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "one", dtype=torch.float32)
    stock.save_pretrained(tmp_path / "many", max_shard_size=shard)
    assert (len(list((tmp_path / "many").glob("*.safetensors"))) > 1) == (shard == "40KB")
    assert_same(filled(tmp_path / "many", None), stock)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - CONFIGS.keys() - {"qwen3_vl_moe", "qwen3_omni_moe"}))
def test_a_folder_of_any_family_loads_as_from_pretrained_loads_it(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]()
    write_model_folder(config, tmp_path, weights=True)
    assert_same(filled(tmp_path, None), auto_class(config).from_pretrained(tmp_path, dtype=torch.float32))


def test_the_key_names_of_older_llava_checkpoints_are_understood(tmp_path: Path) -> None:
    write_model_folder(CONFIGS["llava"](), tmp_path, weights=True)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    tensors = {}
    for name, value in stock.state_dict().items():
        old = name.replace("model.language_model.", "language_model.model.").replace("model.multi_modal", "multi_modal")
        old = old.replace("lm_head", "language_model.lm_head").replace("model.vision_tower.", "vision_tower.vision_model.")
        tensors[old] = value.contiguous()
    assert "language_model.model.embed_tokens.weight" in tensors
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(filled(tmp_path, None), AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32))
    assert_same(filled(tmp_path, None), stock)


@pytest.mark.parametrize("family", CONFIGS | EXPERT_CONFIGS)
def test_a_seed_gives_transformers_initialisation_scale_and_buffers(family: str, tmp_path: Path) -> None:
    folder = write_model_folder((CONFIGS | EXPERT_CONFIGS)[family](), tmp_path)
    first, again, other = (filled(folder, seed) for seed in (0, 0, 1))
    assert_same(first, again)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        stock = AutoModelForImageTextToText.from_config(read_model_config(folder), dtype=torch.float32)
    for name, buffer in stock.named_buffers():
        assert torch.equal(dict(first.named_buffers())[name], buffer), name
    changed = 0
    for name, parameter in stock.named_parameters():
        ours = first.get_parameter(name)
        assert ours.std().item() == pytest.approx(parameter.std().item(), rel=0.35, abs=1e-6), name
        changed += not torch.equal(ours, other.get_parameter(name))
    assert changed > 10


def test_what_a_folder_lacks_is_named(tmp_path: Path) -> None:
    folder = write_model_folder(CONFIGS["llava"](), tmp_path, weights=True)
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "mlp.fc1.bias" in name)
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"no tensor for model\.vision_tower\.encoder\.layers\.\d\.mlp\.fc1\.bias \(shape \(64,\)\)"
    ):
        check_weights(blueprint_of(CONFIGS["llava"](), torch.float32), folder)


def test_an_expert_that_a_folder_lacks_is_named(tmp_path: Path) -> None:
    folder = write_model_folder(EXPERT_CONFIGS["llava_moe"](), tmp_path, weights=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if "experts.2.up_proj" in name)]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"of the 4 experts around .*, piece 1 is there for 3, without number 2"):
        check_weights(blueprint_of(EXPERT_CONFIGS["llava_moe"](), torch.float32), folder)


def test_matrices_of_an_expert_with_another_width_are_refused(tmp_path: Path) -> None:
    folder = write_model_folder(EXPERT_CONFIGS["llava_moe"](), tmp_path, weights=True)
    tensors = load_file(folder / "model.safetensors")
    wide = next(name for name in tensors if "experts.2.up_proj" in name)
    tensors[wide] = torch.zeros(25, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has shape .*, the model's config says \(4, 48, 32\)"):
        check_weights(blueprint_of(EXPERT_CONFIGS["llava_moe"](), torch.float32), folder)


@pytest.mark.parametrize("family", sorted(LAYER_0))
def test_a_published_folder_is_read_as_the_model_that_it_holds(family: str, tmp_path: Path) -> None:
    """For Qwen3-VL-MoE that is of the sizes that transformers reads wrongly: `gate_up_proj` is square."""
    stock = write_published((EXPERT_CONFIGS | FAMILIES)[family](), family, tmp_path)
    assert_same(filled(tmp_path, None), stock)


@pytest.mark.parametrize("inner", [16, 24, 32], ids=["gate_up_proj is square", "none is", "down_proj is square"])
@pytest.mark.parametrize("turned", [True, False], ids=["published", "transformers 5"])
def test_experts_are_turned_where_the_folder_holds_them_turned(inner: int, turned: bool, tmp_path: Path) -> None:
    config = EXPERT_CONFIGS["qwen3_vl_moe"]()
    config.text_config.moe_intermediate_size = inner
    stock = write_published(config, "qwen3_vl_moe", tmp_path, turned=turned)
    assert_same(filled(tmp_path, None), stock)


def test_experts_of_two_forms_in_one_folder_are_refused(tmp_path: Path) -> None:
    write_published(EXPERT_CONFIGS["qwen3_vl_moe"](), "qwen3_vl_moe", tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        changed = {key: value.transpose(1, 2).contiguous() for key, value in tensors.items() if ".layers.1.mlp.experts" in key}
        save_file(tensors | changed, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.\S+ is stored turned, as published, but \S+layers\.1\.\S+ is not; take both"
    ):
        filled(tmp_path, None)


def test_a_tied_weight_may_be_stored_under_either_name(tmp_path: Path) -> None:
    stock = write_published(CONFIGS["llava"](tied=True), "llava", tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        embedding = tensors.pop("language_model.model.embed_tokens.weight", None)
        found = {} if embedding is None else {"language_model.lm_head.weight": embedding}
        save_file(tensors | found, file, metadata={"format": "pt"})
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_same(filled(tmp_path, None), stock)


def test_two_tensors_of_one_parameter_are_refused(tmp_path: Path) -> None:
    write_published(CONFIGS["llava"](), "llava", tmp_path)
    norm = {"model.language_model.norm.weight": torch.zeros(32)}
    save_file(norm, tmp_path / "more.safetensors", metadata={"format": "pt"})
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(
        CheckpointError,
        match=r": language_model\.model\.norm\.weight and model\.language_model\.norm\.weight are both model\.language",
    ):
        filled(tmp_path, None)


@pytest.mark.parametrize("same", [True, False])
def test_tied_weights_that_differ_in_the_folder_are_refused(same: bool, tmp_path: Path) -> None:
    stock = write_published(CONFIGS["llava"](tied=True), "llava", tmp_path)
    head = stock.get_input_embeddings().weight.detach().clone()
    head[-1] += 0 if same else 1
    save_file({"language_model.lm_head.weight": head}, tmp_path / "more.safetensors", metadata={"format": "pt"})
    (tmp_path / "model.safetensors.index.json").unlink()
    if same:
        check_weights(blueprint_of(CONFIGS["llava"](tied=True), torch.float32), tmp_path)
    else:
        with pytest.raises(
            CheckpointError, match=r"ties lm_head\.weight to model\.language_model\.embed_tokens\.weight, but the two"
        ):
            check_weights(blueprint_of(CONFIGS["llava"](tied=True), torch.float32), tmp_path)
