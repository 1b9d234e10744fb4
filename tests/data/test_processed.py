"""Does a processed sample equal what the model's own processor makes of it, without reading pixels?"""

import json
import logging
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from support.ranks import run_ranks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Gemma3Processor, LlavaNextProcessor, LlavaProcessor, PreTrainedTokenizerFast, Qwen3VLProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from meshweave.data.dataset import RawSample
from meshweave.data.loader import EncoderRole, Loader
from meshweave.data.media.image import ImageFile
from meshweave.data.processed import ProcessedDataset
from meshweave.data.sources.llava_json import LlavaJson
from meshweave.errors import ConfigError, DataError

PLAIN = (
    "{% for m in messages %}{{ m.role | upper }}:{% for p in m.content %}"
    "{% if p.type == 'image' %} <image>{% else %} {{ p.text }}{% endif %}{% endfor %}"
    "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (  # writes every turn but the last in capitals
    "{% for m in messages %}{% set text = m.content[0].text %}{{ text if loop.last else text | upper }}{% endfor %}"
)


BARE = (  # nothing stands between an image and the answer
    "{% for m in messages %}{% for p in m.content %}"
    "{{ '<|image_pad|>' if p.type == 'image' else p.text }}{% endfor %}{% endfor %}"
)


def tokenizer(special: list[str], adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with some merges."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False)
    model.train_from_iterator(["What is in this image? The answer is a picture of digits."] * 3, trainer)
    if adds_bos:
        model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", model.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token="<|im_end|>",
        additional_special_tokens=special,
        **({"bos_token": "<s>"} if adds_bos else {}),
    )


def llava(images, template=PLAIN, adds_bos=False, **kwargs) -> LlavaProcessor:
    text = tokenizer(["<image>"], adds_bos)
    return LlavaProcessor(images, text, patch_size=8, chat_template=template, **kwargs)


def clip() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def llava_next() -> LlavaNextProcessor:
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]]
    )
    return LlavaNextProcessor(
        images, tokenizer(["<image>"]), patch_size=8, chat_template=PLAIN, vision_feature_select_strategy="full"
    )


def gemma3() -> Gemma3Processor:
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    text = tokenizer(["<start_of_image>", "<image_soft_token>", "<end_of_image>"])
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    for name, mark in marks.items():
        setattr(text, name, mark)
        setattr(text, f"{name}_id", text.convert_tokens_to_ids(mark))
    return Gemma3Processor(images, text, chat_template=PLAIN.replace("<image>", "<start_of_image>"), image_seq_length=4)


class ImagesOnly(Qwen3VLProcessor):
    """Qwen3-VL's processor without the video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def qwen(template=CHATML) -> ImagesOnly:
    images = Qwen2VLImageProcessorPil(
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64},
    )
    marks = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    return ImagesOnly(images, tokenizer(marks), None, chat_template=template)


CASES = {
    "llava with clip": lambda: llava(clip(), vision_feature_select_strategy="default", num_additional_image_tokens=1),
    "llava with clip's class token": lambda: llava(clip(), vision_feature_select_strategy="full", num_additional_image_tokens=1),
    "llava with siglip, whose processor has no crop size": lambda: llava(
        SiglipImageProcessorPil(size={"height": 24, "width": 24}), vision_feature_select_strategy="full"
    ),
    "a tokenizer that adds a start token": lambda: llava(clip(), adds_bos=True, vision_feature_select_strategy="full"),
    "a template that writes the start token": lambda: llava(
        clip(), "{{ bos_token }}" + PLAIN, adds_bos=True, vision_feature_select_strategy="full"
    ),
    "qwen3-vl": qwen,
    "llava-next, in squares": llava_next,
    "gemma 3, whose placeholder is not its image token": gemma3,
}


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
    RawSample([turn("user", "What is it?", "<>"), turn("assistant", "A dig\u00eft \U0001f642.")], [picture(50, 30)]),
    RawSample(
        [
            turn("system", "Be short."),
            turn("user", "First", "<>", "<>", "and then", "<>"),
            turn("assistant", "A picture"),
            turn("user", "And this?", "<>"),
            turn("assistant", "digits"),
        ],
        [picture(31, 90), picture(16, 16), picture(200, 20), picture(64, 48)],
    ),
]


@pytest.fixture(params=CASES)
def processor(request):
    return CASES[request.param]()


def whole(processor, sample: RawSample):
    """What the processor itself makes of text and pixels together."""
    text = processor.apply_chat_template(sample.messages, tokenize=False)
    written = processor.tokenizer.bos_token is not None and text.startswith(processor.tokenizer.bos_token)
    images = [item.image for item in sample.media] or None
    return processor(text=text, images=images, add_special_tokens=not written, return_tensors="pt")


@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_token_ids_grids_and_pixels_equal_the_processors_own(processor, index):
    dataset, expected = ProcessedDataset(SAMPLES, processor), whole(processor, SAMPLES[index])
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
            assert torch.equal(torch.cat([item[key] for item in items]), theirs)
        if "image_sizes" in expected:
            assert [list(item.size) for item in meta.media] == expected["image_sizes"].tolist()
            assert [item.grid[0] for item in meta.media] == [len(item["pixel_values"]) for item in items]
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


@pytest.mark.parametrize("case", ["llava with clip", "qwen3-vl"])
def test_where_the_processors_arithmetic_holds_not_even_a_blank_image_is_processed(case, monkeypatch):
    processor = CASES[case]()
    dataset = ProcessedDataset(SAMPLES, processor)
    monkeypatch.setattr(type(processor.image_processor), "preprocess", None)
    assert dataset.meta(2).tokens == len(dataset.text(2)[0])


@pytest.mark.parametrize(
    ("make", "index", "targets"),
    [
        (CASES["llava with clip"], 0, [" The answer.<|im_end|>"]),
        (CASES["llava with clip"], 1, [" A dig\u00eft \U0001f642.<|im_end|>"]),
        (CASES["a tokenizer that adds a start token"], 2, [" A picture<|im_end|>", " digits<|im_end|>"]),
        (CASES["a template that writes the start token"], 2, [" A picture<|im_end|>", " digits<|im_end|>"]),
        (qwen, 0, ["The answer.<|im_end|>\n"]),
        (lambda: qwen(BARE), 1, ["A dig\u00eft \U0001f642."]),
        (qwen, 2, ["A picture<|im_end|>\n", "digits<|im_end|>\n"]),
    ],
)
def test_only_what_the_assistant_says_is_a_target(make, index, targets):
    processor = make()
    input_ids, labels = ProcessedDataset(SAMPLES, processor).text(index)
    wanted = labels != -100
    assert torch.equal(labels[wanted], input_ids[wanted])
    runs = torch.tensor_split(input_ids, torch.nonzero(wanted[1:] != wanted[:-1]).flatten() + 1)
    spoken = [processor.tokenizer.decode(run) for run in runs[1::2]]
    assert not wanted[0]
    assert spoken == targets


def test_encoding_cost_is_a_function_of_the_item():
    dataset = ProcessedDataset(SAMPLES, qwen())
    assert [item.cost for item in dataset.meta(2).media] == [np.prod(m.grid) for m in dataset.meta(2).media]
    squared = ProcessedDataset(SAMPLES, qwen(), cost=lambda item: float(item.tokens**2))
    assert [item.cost for item in squared.meta(2).media] == [m.tokens**2 for m in dataset.meta(2).media]


def test_a_dummy_item_looks_like_a_real_one(processor):
    dataset = ProcessedDataset(SAMPLES, processor)
    real, dummy = dataset.media(1, 0), dataset.dummy_media("vision")
    assert dataset.dummy_meta("vision").tokens > 0
    if "image_grid_thw" in dummy:
        assert [list(dataset.dummy_meta("vision").grid)] == dummy["image_grid_thw"].tolist()
    assert {key: (v.dtype, v.shape[1:]) for key, v in dummy.items()} == {key: (v.dtype, v.shape[1:]) for key, v in real.items()}


def read_folder(rank: int, folder):
    """One step: the samples in it, how many were skipped, the files decoded by this rank, its log lines."""
    decoded, lines = [], []
    load = ImageFile.load
    ImageFile.load = lambda image: decoded.append(image.path.name) or load(image)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("meshweave").addHandler(handler)
    loader = Loader(
        ProcessedDataset(LlavaJson(folder / "data.json", folder), qwen()),
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


def test_what_the_processor_refuses_is_a_data_error():
    ribbon = RawSample([turn("user", "<>"), turn("assistant", "a")], [picture(300, 1)])
    with pytest.raises(DataError, match=r"refuses .*\(1, 300\).*aspect ratio"):
        ProcessedDataset([ribbon], qwen()).meta(0)
    spelled = RawSample([turn("user", "what is <image> for?"), turn("assistant", "a")])
    with pytest.raises(DataError, match="'<image>' 1 times for 0 images"):
        ProcessedDataset([spelled], llava(clip(), vision_feature_select_strategy="full")).meta(0)
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('start with user') }}{% endif %}"
    backwards = RawSample([turn("assistant", "a")])
    with pytest.raises(DataError, match=r"refuses the turns \['assistant'\]: start with user"):
        ProcessedDataset([backwards], qwen(strict)).meta(0)
    unstable = RawSample([turn("assistant", "a"), turn("assistant", "b")])
    with pytest.raises(DataError, match="turn 0: the chat template writes this turn differently"):
        ProcessedDataset([unstable], qwen(FORGETFUL)).text(0)


def test_a_processor_that_cannot_serve_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="LlavaProcessor has no chat template"):
        ProcessedDataset(SAMPLES, llava(clip(), template=None))
