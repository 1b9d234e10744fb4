"""A folder as the hub publishes it has a processor, whatever layout its files have, and whatever of it cannot be had."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from support.folders import CHATML, IMAGE_FAMILIES, model_folder

from meshweave.data.footprint import Footprint, process_image
from meshweave.data.processor import load_processor
from meshweave.errors import ConfigError

MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
]


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_every_family_is_read_from_its_published_files_by_stock_classes(family: str, tmp_path: Path) -> None:
    processor = load_processor(model_folder(family, tmp_path))
    placeholder = getattr(processor.tokenizer, "image_token", None) or processor.image_token
    text = processor.apply_chat_template(MESSAGES)
    assert text.count(processor.image_token) == 1
    picture = Image.new("RGB", (70, 40))
    raw, found = process_image(processor, picture, placeholder)
    whole = processor(text=[text], images=[[picture]], return_tensors="pt")
    token = processor.tokenizer.convert_tokens_to_ids(placeholder)
    assert int((whole["input_ids"] == token).sum()) == found.tokens > 0
    assert raw["pixel_values"].equal(whole["pixel_values"])


def edit(file: Path, **changes: object) -> None:
    tree = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({key: value for key, value in (tree | changes).items() if value is not None}))


HUB = {
    "llava_onevision": ({}, {"tokenizer_class": "Qwen2Tokenizer"}),
    "qwen2_5_vl": ({}, {"tokenizer_class": "Qwen2Tokenizer"}),
    "qwen3_vl": ({"image_processor_type": "Qwen2VLImageProcessorFast"}, {"tokenizer_class": "Qwen2Tokenizer"}),
    "internvl": (
        {"image_processor_type": "GotOcr2ImageProcessorFast", "crop_size": None, "data_format": "channels_first", "device": None},
        {"tokenizer_class": "Qwen2Tokenizer"},
    ),
    "gemma3": ({"do_pan_and_scan": None, "do_convert_rgb": None, "pan_and_scan_min_crop_size": None}, {}),
    "mistral3": (
        {"image_processor_type": "PixtralImageProcessorFast", "do_pad": None},
        {"tokenizer_class": "LlamaTokenizerFast"},
    ),
}
"""Family to keys of preprocessor_config.json and tokenizer_config.json as the hub has them, that others write otherwise."""


@pytest.mark.parametrize("family", HUB)
def test_names_of_classes_and_empty_keys_of_the_hub_change_nothing(family: str, tmp_path: Path) -> None:
    folder = model_folder(family, tmp_path)
    expected = made(load_processor(folder))
    for file, changes in zip(("preprocessor_config.json", "tokenizer_config.json"), HUB[family], strict=True):
        tree = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(tree | changes))
    assert made(load_processor(folder)) == expected


def made(processor) -> tuple[list[int], Footprint]:
    placeholder = getattr(processor.tokenizer, "image_token", None) or processor.image_token
    _, found = process_image(processor, Image.new("RGB", (70, 40)), placeholder)
    return processor.tokenizer(processor.apply_chat_template(MESSAGES))["input_ids"], found


def test_parts_are_found_in_the_processors_own_file(tmp_path: Path) -> None:
    """As Gemma 4's folders, and those that this transformers saves."""
    folder = model_folder("gemma4", tmp_path)
    expected = made(load_processor(folder))
    images = folder / "preprocessor_config.json"
    videos = {"video_processor_type": "Gemma4VideoProcessor"}
    sounds = {"feature_extractor_type": "Gemma4AudioFeatureExtractor"}
    edit(
        folder / "processor_config.json",
        image_processor=json.loads(images.read_text()),
        video_processor=videos,
        feature_extractor=sounds,
    )
    images.unlink()
    (folder / "video_preprocessor_config.json").unlink()
    assert made(load_processor(folder)) == expected


def test_the_class_is_the_models_own_also_where_transformers_wants_torchvision_for_it(tmp_path: Path) -> None:
    stock = type(load_processor(model_folder("mistral3", tmp_path))).__mro__[1]
    assert (stock.__module__, stock.__name__) == ("transformers.models.pixtral.processing_pixtral", "PixtralProcessor")
    image_processor = sys.modules.get("transformers.models.pixtral.image_processing_pixtral")
    assert image_processor is None or image_processor.__name__.endswith(".image_processing_pixtral")


def test_code_of_a_folder_is_not_run_and_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder("qwen3_vl", tmp_path)
    own = {"auto_map": {"AutoImageProcessor": "own.OwnImageProcessor"}, "image_processor_type": "OwnImageProcessor"}
    edit(folder / "preprocessor_config.json", **own)
    (folder / "config.json").write_text(json.dumps({"model_type": "own"}))
    (folder / "own.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(ConfigError, match=r"transformers cannot read preprocessor_config\.json"):
        load_processor(folder)


def in_tokenizer_config(folder: Path) -> None:
    template = folder / "chat_template.jinja"
    edit(folder / "tokenizer_config.json", chat_template=template.read_text())
    template.unlink()


def in_json(folder: Path) -> None:
    template = folder / "chat_template.jinja"
    edit(folder / "chat_template.json", chat_template=template.read_text())
    template.unlink()


def named(folder: Path) -> None:
    template = folder / "chat_template.jinja"
    several = [{"name": "default", "template": template.read_text()}, {"name": "tool_use", "template": "tools"}]
    edit(folder / "tokenizer_config.json", chat_template=several)
    template.unlink()


@pytest.mark.parametrize("older", [in_tokenizer_config, in_json, named])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_templates_are_found_where_older_folders_have_them(family: str, older, tmp_path: Path) -> None:
    folder = model_folder(family, tmp_path)
    expected = load_processor(folder).apply_chat_template(MESSAGES)
    older(folder)
    assert load_processor(folder).apply_chat_template(MESSAGES) == expected


@pytest.mark.parametrize(
    ("keys", "tokens"),
    [
        ({"size": None, "min_pixels": 256, "max_pixels": 1024}, 16),
        ({"size": None, "max_pixels": 1024}, 16),
        ({"size": {"shortest_edge": 256, "longest_edge": 2048}}, 32),
        ({"size": {"shortest_edge": 256, "longest_edge": 2048}, "min_pixels": 256, "max_pixels": 2048}, 32),
        # Where they differ, the stock class takes the pixels.
        ({"size": {"shortest_edge": 256, "longest_edge": 2048}, "min_pixels": 256, "max_pixels": 1024}, 16),
    ],
)
def test_bounds_of_pixels_are_read_as_the_stock_class_reads_them(keys: dict, tokens: int, tmp_path: Path) -> None:
    processor = load_processor(model_folder("qwen2_5_vl", tmp_path, **{"min_pixels": None, "max_pixels": None} | keys))
    _, found = process_image(processor, Image.new("RGB", (512, 512)), processor.image_token)
    assert 0.7 * tokens <= found.tokens <= tokens


def without(*files: str):
    def change(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return change


def text_of(file: str, text: str):
    return lambda folder: (folder / file).write_text(text)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (without("chat_template.jinja"), "has no chat template; save a chat_template.jinja there"),
        (without("preprocessor_config.json"), "cannot read preprocessor_config.json"),
        (without("tokenizer.json"), "cannot read tokenizer.json, tokenizer_config.json"),
        (text_of("preprocessor_config.json", "{"), "cannot read preprocessor_config.json"),
        (text_of("preprocessor_config.json", "[]"), "preprocessor_config.json holds no JSON object"),
        (text_of("chat_template.jinja", "{% for m in messages %}"), "chat template of .* is broken at line 1"),
        (lambda folder: edit(folder / "tokenizer_config.json", processor_class="NoSuchProcessor"), "'NoSuchProcessor'"),
    ],
)
def test_a_broken_folder_gets_one_message(broken, message: str, tmp_path: Path) -> None:
    folder = model_folder("qwen3_vl", tmp_path)
    edit(folder / "preprocessor_config.json", processor_class=None)
    broken(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        load_processor(folder)
    assert str(folder) in str(caught.value)


def test_a_folder_that_names_no_processor_has_that_of_its_model(tmp_path: Path) -> None:
    folder = model_folder("qwen3_vl", tmp_path)
    for file in ("preprocessor_config.json", "tokenizer_config.json"):
        edit(folder / file, processor_class=None)
    assert type(load_processor(folder)).__name__ == "Qwen3VLProcessor"


def test_templates_of_which_none_is_the_default_are_named(tmp_path: Path) -> None:
    folder = model_folder("qwen3_vl", tmp_path)
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", chat_template=[{"name": "rag", "template": CHATML}])
    with pytest.raises(ConfigError, match="templates named rag, but none is the default"):
        load_processor(folder)
