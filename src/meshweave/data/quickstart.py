"""What does the demo train on: which model folder, and which pictures of handwritten digits?

The pictures are composed on the fly from scikit-learn's 1,797 real handwritten digits (8×8 pixels each). Sample `index`
of a (split, seed) is always the same sample, so there is nothing to download, store or shuffle. The held-out split is
by digit image: no held-out handwriting appears in any training picture.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import cos, sin
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from meshweave.data.dataset import RawSample
from meshweave.errors import DataError

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

IMAGE_SIZE = 32  # pixels a side; four cells of 16×16, each room for one digit
CELL = IMAGE_SIZE // 2
GLYPH = 8  # pixels a side of an original digit
PATCH = 8
HELD_OUT_IMAGES = 300

TEXT_ONLY = 0.10  # shares of the samples; the rest have one picture
TWO_PICTURES = 0.05
TWO_MOST = 2
ZOOM = 1.0

READ_ONE = ("Read the digits.", "Which digits do you see?", "What is written here?")
READ_TWO = ("Read both pictures.", "Which digits are in both pictures?")
AUG = ((-0.25, 0.85, 0.85, -0.2, -1.5, -1.5, 0.7), (0.25, 1.15, 1.15, 0.2, 1.5, 1.5, 1.0))
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NEIGHBOURS: Mapping[str, int] = {"What comes after {}?": 1, "What comes before {}?": -1}

PAD, UNKNOWN, IMAGE, END, USER, ASSISTANT = SPECIALS = (
    "<|pad|>", "<|unknown|>", "<|image|>", "<|end|>", "<|user|>", "<|assistant|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message.role + '|>' -}}"
    "{%- if message.role == 'assistant' -%}"
    "{%- generation -%}{{- body(message) -}}{%- endgeneration -%}"
    "{%- else -%}{{- body(message) -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
BODY_MACRO = (
    "{%- macro body(message) -%}"
    "{%- if message.content is string -%}{{- message.content -}}"
    "{%- else -%}{%- for part in message.content -%}"
    "{{- '<|image|>' if part.type == 'image' else part.text -}}"
    "{%- endfor -%}{%- endif -%}{{- '<|end|>' -}}"
    "{%- endmacro -%}"
)


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Every handwritten digit, as `(images [1797, 8, 8] uint8, labels [1797] int64)`."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.round(bunch.images * (255 / 16)).astype(np.uint8), bunch.target


@cache
def split_images(split: Split) -> np.ndarray:
    """The digit images that `split` may use, as ascending indices into `digits()`."""
    order = np.random.default_rng(0).permutation(len(digits()[1]))
    return np.sort(order[:HELD_OUT_IMAGES] if split == "held_out" else order[HELD_OUT_IMAGES:])


@dataclass(frozen=True)
class Picture:
    """A 32×32 picture of one to four digits: a media reference that is drawn rather than read."""

    images: tuple[int, ...]
    """Indices into `digits()`, in reading order."""
    cells: tuple[int, ...]
    """The cell of each digit: 0 top left, 1 top right, 2 bottom left, 3 bottom right; ascending."""
    augment: tuple[int, ...] | None = None
    """Seed of the random shifts, rotations, scales and contrasts; None draws every digit upright and centred."""

    def size(self) -> tuple[int, int]:
        return IMAGE_SIZE, IMAGE_SIZE

    def load(self) -> Image.Image:
        rng = None if self.augment is None else np.random.default_rng(self.augment)
        picture = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
        for image, cell in zip(self.images, self.cells, strict=True):
            row, column = divmod(cell, IMAGE_SIZE // CELL)
            picture.paste(_draw(digits()[0][image], rng), (column * CELL, row * CELL))
        return picture.convert("RGB")


def _draw(glyph: np.ndarray, rng: np.random.Generator | None) -> Image.Image:
    """One digit enlarged to a cell; with `rng`, moved, turned, resized and faded a little first."""
    angle, zoom_x, zoom_y, shear, shift_x, shift_y, ink = (
        (0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0) if rng is None else rng.uniform(*AUG)
    )
    # Pillow wants the inverse map: from a pixel of the cell to the place in the digit it shows.
    shrink = GLYPH / CELL / ZOOM
    a, b = shrink * cos(angle) / zoom_x, shrink * (sin(angle) + shear) / zoom_x
    d, e = -shrink * sin(angle) / zoom_y, shrink * cos(angle) / zoom_y
    x, y = CELL / 2 + shift_x, CELL / 2 + shift_y
    inverse = (a, b, GLYPH / 2 - a * x - b * y, d, e, GLYPH / 2 - d * x - e * y)
    source = Image.fromarray((glyph * ink).astype(np.uint8))
    return source.transform((CELL, CELL), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)


@dataclass(frozen=True)
class DigitsSource:
    """Questions about pictures of handwritten digits, and a few about numbers alone: a `Source` of any length."""

    split: Split
    samples: int
    seed: int = 0

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> RawSample:
        if not 0 <= index < self.samples:
            raise DataError(f"sample {index} of the digits source, which has samples 0 to {self.samples - 1}")
        key = (self.seed, SPLITS.index(self.split), index)
        rng = np.random.default_rng(key)
        kind = rng.random()
        if kind < TEXT_ONLY:
            return _sample(*_neighbour(rng), ())
        if kind < TEXT_ONLY + TWO_PICTURES:
            pictures = tuple(self._picture(rng, TWO_MOST, (*key, slot)) for slot in range(2))
            question = READ_TWO[rng.integers(len(READ_TWO))]
        else:
            pictures = (self._picture(rng, 4, (*key, 0)),)
            question = READ_ONE[rng.integers(len(READ_ONE))]
        labels = digits()[1]
        return _sample(question, " ".join(str(labels[i]) for p in pictures for i in p.images), pictures)

    def _picture(self, rng: np.random.Generator, most: int, augment: tuple[int, ...]) -> Picture:
        count = int(rng.integers(1, most + 1))
        cells = np.sort(rng.permutation((IMAGE_SIZE // CELL) ** 2)[:count])
        images = rng.choice(split_images(self.split), count)
        return Picture(tuple(images.tolist()), tuple(cells.tolist()), augment if self.split == "train" else None)


def _neighbour(rng: np.random.Generator) -> tuple[str, str]:
    """A question about the number after or before another, and its one-digit answer."""
    template, step = list(NEIGHBOURS.items())[rng.integers(len(NEIGHBOURS))]
    answer = int(rng.integers(max(0, step), min(9, 9 + step) + 1))
    return template.format(NUMBERS[answer - step]), str(answer)


def _sample(question: str, answer: str, pictures: tuple[Picture, ...]) -> RawSample:
    content: list[dict[str, Any]] = [{"type": "image"} for _ in pictures]
    content.append({"type": "text", "text": question})
    messages = (
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    )
    return RawSample(messages, pictures)


def build_model_folder(path: str | PathLike[str], seed: int = 0) -> None:
    """Write an untrained LLaVA (CLIP tower, Qwen3 language model) to `path`, with its tokenizer and processor.

    It is an ordinary Hugging Face folder: `AutoModelForImageTextToText` and `AutoProcessor` load it. The weights are
    seeded with `seed`; torch's global random state is left as it was.
    """
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = Path(path)
    tokenizer = _tokenizer()
    edge = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = LlavaProcessor(
        # Pillow's processor: torchvision is not needed.
        image_processor=CLIPImageProcessorPil(size=edge, crop_size=edge, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the "default" strategy drops again
        chat_template=BODY_MACRO + CHAT_TEMPLATE,
        image_token=IMAGE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlavaForConditionalGeneration(model_config(tokenizer)).save_pretrained(folder)
    processor.save_pretrained(folder)


def model_config(tokenizer: Any) -> Any:
    """The demo model's `LlavaConfig`: three layers of width 96 in each module, heads that any `tp` up to 4 divides."""
    from transformers import CLIPVisionConfig, LlavaConfig, Qwen3Config

    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
            projection_dim=96,
        ),
        text_config=Qwen3Config(
            vocab_size=-(-len(tokenizer) // 8) * 8,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=24,
            max_position_embeddings=256,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )


def _tokenizer() -> Any:
    """A word-level tokenizer over the words that `DigitsSource` uses, lower case."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    texts = (*READ_ONE, *READ_TWO, *NEIGHBOURS, *NUMBERS, " ".join("0123456789"))
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text.format("")))}
    vocabulary = {token: number for number, token in enumerate((*SPECIALS, *sorted(words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE, "user_token": USER, "assistant_token": ASSISTANT},
    )
