"""Does a processed sample equal what the model's own processor makes of it, without reading pixels?"""

import json
import logging
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from support.folders import CHATML, IMAGE_FAMILIES, byte_tokenizer, model_folder
from support.ranks import run_ranks
from transformers import LlavaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from meshweave.config import DataConfig
from meshweave.data.dataset import IGNORE, RawSample
from meshweave.data.limits import CUT, REDUCED, REDUCED_TOGETHER, bounded
from meshweave.data.loader import EncoderRole, Loader
from meshweave.data.media.image import ImageFile
from meshweave.data.processed import ProcessedDataset
from meshweave.data.processor import load_processor
from meshweave.data.sources import RecordSource, open_records
from meshweave.errors import DataError, LeftOutError


@cache
def processor_of(family: str) -> Any:
    if family == "siglip, adding a start token":
        text = byte_tokenizer("</s>", "<image>")
        images = SiglipImageProcessorPil(size={"height": 24, "width": 24})
        template = CHATML.replace("IMAGE", "'<image>'").replace("<|im_start|>", "").replace("<|im_end|>", "</s>")
        text.add_bos_token = True
        return LlavaProcessor(images, text, patch_size=8, chat_template=template, vision_feature_select_strategy="full")
    with TemporaryDirectory() as folder:
        return load_processor(model_folder(family, Path(folder)))


CASES = (*IMAGE_FAMILIES, "siglip, adding a start token")


@dataclass
class Picture:
    """A picture in memory that counts how often its pixels are asked for."""

    image: Image.Image
    loads: list[int] = field(default_factory=list)

    def size(self):
        return self.image.height, self.image.width

    def load(self):
        self.loads.append(1)
        return self.image


def picture(width: int, height: int, seed: int = 0) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Picture(Image.fromarray(pixels))


def turn(role: str, *parts: str) -> dict:
    return {
        "role": role,
        "content": [{"type": "image"} if p == "<>" else {"type": "text", "text": p} for p in parts],
    }


SAMPLES = [
    RawSample([turn("user", "What is it?"), turn("assistant", "The answer.")]),
    RawSample([turn("user", "<>", "What is it?"), turn("assistant", "A dig\u00eft \U0001f642.")], [picture(50, 30)]),
    RawSample(
        [
            turn("user", "<>", "<>", "First", "<>"),
            turn("assistant", "A picture"),
            turn("user", "<>", "And this?"),
            turn("assistant", "digits"),
        ],
        [picture(31, 90), picture(16, 16), picture(200, 20), picture(64, 48)],
    ),
]


@pytest.fixture(params=CASES)
def processor(request):
    return processor_of(request.param)


def whole(dataset: ProcessedDataset, sample: RawSample):
    """What the processor itself makes of text and pixels together."""
    processor = dataset.processor
    text = dataset.answers.conversation(sample).text
    written = processor.tokenizer.bos_token is not None and text.startswith(processor.tokenizer.bos_token)
    images = [[item.image for item in sample.media]] if sample.media else None
    return processor(text=[text], images=images, add_special_tokens=not written, return_tensors="pt")


@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_token_ids_grids_and_pixels_equal_the_processors_own(processor, index):
    dataset = ProcessedDataset(SAMPLES, processor)
    if index == 2 and type(processor).__name__ == "LlavaOnevisionProcessor":
        with pytest.raises(DataError, match="takes several pictures of a sample otherwise than each alone"):
            dataset.meta(index)
        return
    expected = whole(dataset, SAMPLES[index])
    meta, (input_ids, labels) = dataset.meta(index), dataset.text(index)
    assert input_ids.tolist() == expected["input_ids"][0].tolist()
    assert labels.shape == input_ids.shape
    assert meta.tokens == len(input_ids)
    assert [item.module for item in meta.media] == ["vision"] * len(SAMPLES[index].media)
    placeholder = processor.tokenizer.convert_tokens_to_ids(dataset.placeholder)
    assert sum(item.tokens for item in meta.media) == (input_ids == placeholder).sum()
    places = [place for item in meta.media for first, count in item.runs for place in range(first, first + count)]
    assert places == (input_ids == placeholder).nonzero().flatten().tolist()
    assert [sum(count for _, count in item.runs) for item in meta.media] == [item.tokens for item in meta.media]
    if SAMPLES[index].media:
        items = [dataset.media(index, slot) for slot in range(len(meta.media))]
        for key in items[0]:
            theirs = expected[key]
            if theirs.ndim == 5:
                theirs = torch.cat([image[: len(item[key])] for image, item in zip(theirs, items, strict=True)])
            if key == "pixel_values" and theirs.ndim == 4 and len({item[key].shape[1:] for item in items}) > 1:
                continue  # Pixtral pads to the largest, as `join_media` does
            assert torch.equal(torch.cat([item[key] for item in items]), theirs)
        if "image_sizes" in expected:
            assert [list(item.size) for item in meta.media] == expected["image_sizes"].tolist()
        if "image_grid_thw" in expected:
            assert [list(item.grid) for item in meta.media] == expected["image_grid_thw"].tolist()


def test_no_pixel_is_read_for_metadata_and_text(processor):
    sample = RawSample(SAMPLES[1].messages, [picture(50, 30)])
    dataset = ProcessedDataset([sample], processor)
    dataset.meta(0)
    dataset.text(0)
    assert sample.media[0].loads == []
    dataset.media(0, 0)
    assert sample.media[0].loads == [1]


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3", "gemma4"])
def test_where_the_processors_arithmetic_holds_not_even_a_blank_image_is_processed(family, monkeypatch):
    processor = processor_of(family)
    dataset = ProcessedDataset(SAMPLES, processor)
    monkeypatch.setattr(type(processor.image_processor), "preprocess", None)
    assert dataset.meta(2).tokens == len(dataset.text(2)[0])


def test_encoding_cost_is_a_function_of_the_item():
    dataset = ProcessedDataset(SAMPLES, processor_of("qwen3_vl"))
    assert [item.cost for item in dataset.meta(2).media] == [np.prod(m.grid) for m in dataset.meta(2).media]
    squared = ProcessedDataset(SAMPLES, processor_of("qwen3_vl"), cost=lambda item: float(item.tokens**2))
    assert [item.cost for item in squared.meta(2).media] == [m.tokens**2 for m in dataset.meta(2).media]


def test_a_dummy_item_looks_like_a_real_one(processor):
    dataset = ProcessedDataset(SAMPLES, processor)
    real, dummy = dataset.media(1, 0), dataset.dummy_media("vision")
    assert dataset.dummy_meta("vision").tokens > 0
    if "image_grid_thw" in dummy:
        assert [list(dataset.dummy_meta("vision").grid)] == dummy["image_grid_thw"].tolist()
    padded = type(processor).__name__ == "PixtralProcessor"
    shapes = [{key: (v.dtype, v.shape[1:] if not padded else ()) for key, v in item.items()} for item in (real, dummy)]
    assert shapes[0] == shapes[1]


def limited(**limits: Any) -> DataConfig:
    return DataConfig(source="synthetic", **limits)


def test_pictures_are_read_in_the_size_that_limits_allow():
    sizes = [(400, 300), (10, 10), (20, 30)]
    assert bounded(sizes, limited()) == (sizes, [])
    found, effects = bounded(sizes, limited(min_pixels=400, max_pixels=30000))
    assert effects == [REDUCED, "pictures enlarged to data.min_pixels"]
    assert found == [(200, 150), (20, 20), (20, 30)]
    found, effects = bounded([(100, 100), (200, 50)], limited(max_sample_pixels=5000))
    assert effects == [REDUCED_TOGETHER]
    assert found == [(50, 50), (100, 25)]
    sample = RawSample(SAMPLES[1].messages, [picture(300, 400)])
    dataset = ProcessedDataset([sample], processor_of("qwen3_vl"), limits=limited(max_pixels=1200))
    assert dataset.pictures(0)[0].size() == (40, 30) == dataset.pictures(0)[0].load().size[::-1]
    assert dataset.media(0, 0)["image_grid_thw"].tolist() == [list(dataset.meta(0).media[0].grid)]
    assert dataset.effects(0) == (REDUCED,)


@pytest.mark.parametrize("size", [(1, 1), (1, 150), (7, 3), (4000, 30), (333, 777)])
def test_limits_hold_for_every_size(size):
    (height, width), *_ = bounded([size], limited(max_pixels=1000))[0]
    assert height * width <= max(1000, min(size[0] * size[1], 1000))
    (height, width), *_ = bounded([size], limited(min_pixels=2000))[0]
    assert height * width >= 2000


LONG = RawSample([turn("user", "<>", "What?"), turn("assistant", "cat " * 60)], [picture(50, 30)])


def test_a_sample_that_is_too_long_is_left_out_or_its_text_cut():
    processor = processor_of("qwen3_vl")
    whole_ids, whole_labels = ProcessedDataset([LONG], processor).text(0)
    with pytest.raises(LeftOutError, match=r"it has \d+ tokens, more than data.max_length=80") as caught:
        ProcessedDataset([LONG], processor, limits=limited(max_length=80)).meta(0)
    assert caught.value.kind == "too long"
    dataset = ProcessedDataset([LONG], processor, limits=limited(max_length=80, too_long="cut"))
    ids, labels = dataset.text(0)
    assert (ids.tolist(), labels.tolist()) == (whole_ids[:80].tolist(), whole_labels[:80].tolist())
    assert dataset.meta(0).tokens == 80
    assert dataset.effects(0) == (CUT,)
    assert processor.tokenizer.eos_token_id not in labels.tolist()


@pytest.mark.parametrize(
    ("most", "kind", "message"), [(10, "too long", "a picture lies behind them"), (41, "no target", "no token of it is a target")]
)
def test_nothing_is_cut_inside_media_and_no_sample_stays_without_target(most, kind, message):
    dataset = ProcessedDataset([LONG], processor_of("qwen3_vl"), limits=limited(max_length=most, too_long="cut"))
    tokens = ProcessedDataset([LONG], processor_of("qwen3_vl")).meta(0).media[0]
    assert tokens.runs[0][0] + tokens.tokens < 41
    with pytest.raises(LeftOutError, match=message) as caught:
        dataset.meta(0)
    assert caught.value.kind == kind


def test_samples_with_too_many_pictures_are_left_out():
    dataset = ProcessedDataset(SAMPLES, processor_of("qwen3_vl"), limits=limited(max_images=2))
    assert dataset.meta(1).media
    with pytest.raises(LeftOutError, match=r"it has 4 pictures, more than data.max_images=2") as caught:
        dataset.meta(2)
    assert caught.value.kind == "too many images"


def read_folder(rank: int, folder):
    """One step: the samples in it, how many were skipped, the files decoded by this rank, its log lines."""
    decoded, lines = [], []
    load = ImageFile.load
    ImageFile.load = lambda image: decoded.append(image.path.name) or load(image)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("meshweave").addHandler(handler)
    loader = Loader(
        ProcessedDataset(RecordSource(open_records(folder / "data.json"), "auto", folder), processor_of("qwen3_vl")),
        batch_size=8,
        microbatches=1,
        language_lanes=2,
        language_lane=rank,
        encoders={"vision": EncoderRole(2, rank)},
        rank=rank,
        world=2,
        group=dist.new_group(backend="gloo"),
    )
    step = loader.step(0)
    samples = sorted(s.sample for lane in step.plan.microbatches[0].lanes for s in lane)
    return samples, step.skipped, decoded, lines


def test_two_ranks_share_a_folder_with_a_missing_and_a_cut_off_image(tmp_path):
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A picture."}]
    entries = [{"image": f"{number}.png", "conversations": talk} for number in range(8)]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    for number in range(8):
        picture(40 + 8 * number, 30, seed=number).image.save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").unlink()
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:2000])
    first, second = run_ranks(2, read_folder, tmp_path)
    assert first[:2] == second[:2] == ([0, 1, 3, 4, 6, 7], 2)
    for decoded in (
        first[2],
        second[2],
    ):  # some files moved to the other rank when 5.png turned out to be bad
        assert 3 <= len(set(decoded)) == len(decoded) < 7
    assert "2.png: no such image" in first[3][0]
    assert "5.png: the image is broken or cut off" in first[3][1]
    assert (len(first[3]), len(second[3])) == (2, 0)


def test_a_picture_that_is_too_elongated_leaves_its_sample_out_by_name():
    ribbon = RawSample([turn("user", "<>"), turn("assistant", "a")], [picture(300, 1)])
    with pytest.raises(DataError, match=r"a picture 300 wide and 1 high is more than 200 times as long") as caught:
        ProcessedDataset([ribbon], processor_of("qwen3_vl")).meta(0)
    assert caught.value.kind == "processor"


def test_a_template_that_does_not_write_an_image_leaves_its_sample_out_by_name():
    processor = processor_of("llava")
    silent = [*SAMPLES[1].messages[:1], *SAMPLES[1].messages[1:]]
    silent[0] = {"role": "system", "content": silent[0]["content"][::-1]}  # LLaVA's template writes a system turn's text alone
    with pytest.raises(DataError, match=r"'<image>' 0 times for 1 images") as caught:
        ProcessedDataset([RawSample(silent, SAMPLES[1].media)], processor).meta(0)
    assert caught.value.kind == "chat template"


def test_what_is_no_target_is_ignored_and_targets_are_the_tokens_themselves(processor):
    dataset = ProcessedDataset(SAMPLES, processor)
    ids, labels = dataset.text(1)
    assert labels[0] == IGNORE
    wanted = labels != IGNORE
    assert torch.equal(labels[wanted], ids[wanted])
    assert not (ids[wanted] == processor.tokenizer.convert_tokens_to_ids(dataset.placeholder)).any()
    said = processor.tokenizer.decode(ids[wanted])
    assert "A dig\u00eft \U0001f642." in said
