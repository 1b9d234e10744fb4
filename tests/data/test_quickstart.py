"""Are the demo's samples honest and repeatable, and is its model folder an ordinary Hugging Face folder?"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from meshweave.data.dataset import Source
from meshweave.data.processed import ProcessedDataset
from meshweave.data.quickstart import (
    CELL,
    END,
    NUMBERS,
    PATCH,
    PICTURE,
    DigitsSource,
    Picture,
    Split,
    build_model_folder,
    digits,
    split_images,
)
from meshweave.errors import DataError

TOKENS = (PICTURE // PATCH) ** 2  # a picture's media tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits") / "model"
    build_model_folder(path)
    return path


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder, backend="pil")


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder)


def pictures(source: Source, index: int) -> list[Picture]:
    return [media for media in source[index].media if isinstance(media, Picture)]


def spoken(source: Source, index: int) -> tuple[str, str]:
    """Question and answer of a sample."""
    question, answer = source[index].messages
    return question["content"][0]["text"], answer["content"][0]["text"]


def test_no_training_picture_shows_a_held_out_digit() -> None:
    train, held_out = split_images("train"), split_images("held_out")
    assert len(held_out) == 300
    assert sorted([*train, *held_out]) == list(range(1797))
    assert set(digits()[1][held_out]) == set(range(10))
    splits: list[tuple[Split, np.ndarray]] = [("train", train), ("held_out", held_out)]
    for split, allowed in splits:
        source = DigitsSource(split, 2000)
        shown = {image for index in range(2000) for picture in pictures(source, index) for image in picture.images}
        assert shown <= set(allowed)
        assert len(shown) > 0.8 * len(allowed)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_sample_depends_on_split_seed_and_index_alone(split: Split) -> None:
    one, other = DigitsSource(split, 40, seed=3), DigitsSource(split, 50, seed=3)
    for index in (39, 0, 17):
        assert one[index] == other[index]
        for first, second in zip(one[index].media, other[index].media, strict=True):
            assert np.array_equal(np.array(first.load()), np.array(second.load()))
    assert any(one[index] != DigitsSource(split, 40, seed=4)[index] for index in range(5))
    assert len({str(one[index]) for index in range(40)}) > 30


def test_an_index_outside_the_source_is_refused() -> None:
    for index in (-1, 5):
        with pytest.raises(DataError, match=f"no sample {index}; it has samples 0 to 4"):
            DigitsSource("train", 5)[index]


def test_the_answer_names_the_digits_in_reading_order() -> None:
    source, (glyphs, labels) = DigitsSource("held_out", 300), digits()
    for index in range(300):
        read = []
        for picture in pictures(source, index):
            pixels = np.array(picture.load().convert("L"), dtype=float)
            assert pixels.shape == picture.size() == (PICTURE, PICTURE)
            cells = pixels.reshape(2, CELL, 2, CELL).swapaxes(1, 2).reshape(4, CELL, CELL)
            for cell in cells:
                if cell.any():  # shrunk to 8×8 it must be the digit image it came from
                    shrunk = cell.reshape(8, 2, 8, 2).mean((1, 3))
                    likeness = [np.corrcoef(shrunk.ravel(), glyphs[image].ravel())[0, 1] for image in picture.images]
                    assert max(likeness) > 0.95
                    read.append(str(labels[picture.images[int(np.argmax(likeness))]]))
        if source[index].media:
            assert " ".join(read) == spoken(source, index)[1]


def test_only_training_digits_stray() -> None:
    train, held_out = DigitsSource("train", 20), DigitsSource("held_out", 20)
    assert all(picture.stray is None for index in range(20) for picture in pictures(held_out, index))
    strays = [picture.stray for index in range(20) for picture in pictures(train, index)]
    assert len(set(strays)) == len(strays) and None not in strays


def test_one_sample_in_ten_has_no_picture_and_one_in_ten_has_two() -> None:
    source = DigitsSource("train", 2000)
    counts = Counter(len(source[index].media) for index in range(2000))
    assert counts.keys() == {0, 1, 2}
    assert 150 < counts[0] < 250
    assert 150 < counts[2] < 250
    lengths = Counter(len(spoken(source, index)[1].split()) for index in range(2000) if len(source[index].media) == 1)
    assert lengths.keys() == {1, 2, 3, 4}
    assert min(lengths.values()) > 300


def test_questions_without_picture_have_the_right_answer() -> None:
    source = DigitsSource("train", 2000)
    asked = {spoken(source, index) for index in range(2000) if not source[index].media}
    for question, answer in asked:
        *_, direction, number = question.rstrip("?").split()
        assert int(answer) == NUMBERS.index(number) + {"after": 1, "before": -1}[direction]
    assert len(asked) == 18


def test_placeholders_equal_the_tokens_that_the_model_makes_of_the_pictures(model: Any, processor: Any) -> None:
    source = DigitsSource("train", 40)
    for index in {len(source[index].media): index for index in range(40)}.values():
        sample = source[index]
        text = processor.apply_chat_template(list(sample.messages), tokenize=False)
        inputs = processor(text=text, images=[picture.load() for picture in sample.media] or None, return_tensors="pt")
        placeholders = int((inputs["input_ids"] == model.config.image_token_id).sum())
        assert placeholders == TOKENS * len(sample.media)
        if sample.media:
            features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
            assert sum(len(tokens) for tokens in features) == placeholders
        assert model(**inputs).logits.isfinite().all()


def test_every_word_has_a_token_and_the_targets_are_the_answer_and_its_end(processor: Any) -> None:
    dataset = ProcessedDataset(DigitsSource("train", 200), processor)
    for index in range(200):
        input_ids, labels = dataset.text(index)
        assert processor.tokenizer.unk_token_id not in input_ids
        targets = processor.tokenizer.decode(labels[labels >= 0])
        assert targets == f"{spoken(dataset.source, index)[1]} {END}"
        meta = dataset.meta(index)
        assert meta.tokens == len(input_ids)
        assert [item.tokens for item in meta.media] == [TOKENS] * len(dataset.source[index].media)


def test_every_weight_gets_a_gradient(model: Any, processor: Any) -> None:
    dataset = ProcessedDataset(DigitsSource("train", 1), processor)
    input_ids, labels = dataset.text(0)
    model(input_ids=input_ids[None], labels=labels[None], **dataset.media(0, 0)).loss.backward()
    idle = {name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()}
    # CLIP's last norm serves its pooled output, which LLaVA does not use.
    assert {name.split(".")[-2] for name in idle} == {"post_layernorm"}


def test_tensor_parallel_sizes_2_and_4_divide_the_model(model: Any) -> None:
    config = model.config
    text, vision = config.text_config, config.vision_config
    for size in (2, 4):
        for part in (text.num_key_value_heads, text.num_attention_heads, vision.num_attention_heads, text.vocab_size):
            assert part % size == 0
        assert text.intermediate_size % size == vision.intermediate_size % size == 0


def test_generation_ends_with_the_answer(model: Any, processor: Any) -> None:
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id


def test_the_seed_decides_the_weights_and_nothing_else_changes(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    build_model_folder(tmp_path / "same", seed=0)
    assert torch.rand(1) == expected
    build_model_folder(tmp_path / "other", seed=1)
    weights = "model.safetensors"
    assert (folder / weights).read_bytes() == (tmp_path / "same" / weights).read_bytes()
    assert (folder / weights).read_bytes() != (tmp_path / "other" / weights).read_bytes()
