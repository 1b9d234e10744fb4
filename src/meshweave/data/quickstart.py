"""What does the demo train on: which model folder, and which pictures of handwritten digits?

The pictures are composed on the fly from the 1,797 real handwritten digits (8×8 pixels) that scikit-learn carries, so nothing
is downloaded or stored. The held-out split is by digit image: no training picture shows a held-out digit.
"""

import sys
from dataclasses import dataclass
from functools import cache
from math import cos, sin
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from meshweave.data.dataset import RawSample
from meshweave.errors import DataError

if TYPE_CHECKING:
    from transformers import LlavaConfig, PreTrainedTokenizerFast

Split = Literal["train", "held_out"]

GLYPH = 8  # pixels a side of an original digit
CELL = 16  # pixels a side of the place a digit is drawn in
PICTURE = 2 * CELL  # pixels a side of a picture: four cells, in reading order
PATCH = 8
HELD_OUT_IMAGES = 300

TEXT_ONLY, TWO_PICTURES = 0.1, 0.1  # shares of the samples; the others have one picture
READ_ONE = ("Read the digits.", "Which digits do you see?", "What is written here?")
READ_TWO = ("Read both pictures.", "What do they show?")
AFTER, BEFORE = "What comes after {}?", "What comes before {}?"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# How far a training digit strays: turn (radians), slant, width, height, move right and down (pixels), ink.
LEAST = (-0.15, -0.12, 0.9, 0.9, -0.9, -0.9, 0.8)
MOST = (0.15, 0.12, 1.1, 1.1, 0.9, 0.9, 1.0)
UNCHANGED = (0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0)

PAD, UNKNOWN, IMAGE, END, USER, ASSISTANT = "<|pad|>", "<|unknown|>", "<|image|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' }}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text if part.type == 'text' else '<|image|>' }}{% endfor %}{% endif %}"
    "{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Every handwritten digit: images [1797, 8, 8] uint8, bright ink on black, and labels [1797] int64.

    From the UCI repository's optical recognition of handwritten digits, as scikit-learn carries it.
    """
    from sklearn.datasets import load_digits  # an extra that only the demo needs

    images, labels = load_digits(return_X_y=True)
    return np.round(images.reshape(-1, GLYPH, GLYPH) * (255 / 16)).astype(np.uint8), labels


@cache
def split_images(split: Split) -> np.ndarray:
    """The digit images that pictures of `split` may show, as ascending indices into `digits()`."""
    order = np.random.default_rng(0).permutation(len(digits()[1]))
    return np.sort(order[:HELD_OUT_IMAGES] if split == "held_out" else order[HELD_OUT_IMAGES:])


@dataclass(frozen=True)
class Picture:
    """A 32×32 picture of one to four digits: a `MediaRef` that is drawn where others are read."""

    images: tuple[int, ...]
    """The digits in reading order, as indices into `digits()`."""
    cells: tuple[int, ...]
    """The cell of each digit, ascending: 0 top left, 1 top right, 2 bottom left, 3 bottom right."""
    stray: tuple[int, ...] | None = None
    """Seed of the digits' random turns, moves, sizes and ink; None draws them as they are."""

    def size(self) -> tuple[int, int]:
        return PICTURE, PICTURE

    def load(self) -> Image.Image:
        changes = np.tile(UNCHANGED, (len(self.images), 1))
        if self.stray is not None:
            changes = np.random.default_rng(self.stray).uniform(LEAST, MOST, changes.shape)
        picture = Image.new("L", self.size())
        for image, cell, change in zip(self.images, self.cells, changes, strict=True):
            row, column = divmod(cell, PICTURE // CELL)
            picture.paste(_drawn(digits()[0][image], *change), (column * CELL, row * CELL))
        return picture.convert("RGB")


def _drawn(
    glyph: np.ndarray, turn: float, slant: float, width: float, height: float, right: float, down: float, ink: float
) -> Image.Image:
    """One digit, enlarged to a cell."""
    # Pillow wants the way back: (x, y) of the cell to the (x, y) of the glyph that is seen there.
    shrink = GLYPH / CELL
    a, b = shrink * cos(turn) / width, shrink * (sin(turn) + slant) / width
    d, e = -shrink * sin(turn) / height, shrink * cos(turn) / height
    x, y = CELL / 2 + right, CELL / 2 + down
    back = (a, b, GLYPH / 2 - a * x - b * y, d, e, GLYPH / 2 - d * x - e * y)
    faded = Image.fromarray((glyph * ink).astype(np.uint8))
    return faded.transform((CELL, CELL), Image.Transform.AFFINE, back, Image.Resampling.BILINEAR)


@dataclass(frozen=True)
class DigitsSource:
    """A `Source`: questions about pictures of handwritten digits, and some about numbers alone.

    It has as many samples as wanted; sample `index` depends on (`split`, `seed`, `index`) and nothing else. Only training
    digits stray. Most samples have one picture of 1 to 4 digits, some have two pictures of one digit each, some none.
    """

    split: Split
    samples: int
    seed: int = 0

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> RawSample:
        if not 0 <= index < self.samples:
            raise DataError(f"digits source: there is no sample {index}; it has samples 0 to {self.samples - 1}")
        key = (self.seed, int(self.split == "held_out"), index)
        rng = np.random.default_rng(key)
        kind = rng.random()
        if kind < TEXT_ONLY:
            return _neighbour(rng)
        if kind < TEXT_ONLY + TWO_PICTURES:
            questions, counts = [*READ_TWO], [1, 1]
        else:
            questions, counts = [*READ_ONE], [int(rng.integers(1, 5))]
        pictures = tuple(self._picture(rng, count, (*key, slot)) for slot, count in enumerate(counts))
        labels = digits()[1]
        answer = " ".join(str(labels[image]) for picture in pictures for image in picture.images)
        return _sample(questions[rng.integers(len(questions))], answer, pictures)

    def _picture(self, rng: np.random.Generator, count: int, stray: tuple[int, ...]) -> Picture:
        images = rng.choice(split_images(self.split), count)
        cells = np.sort(rng.permutation((PICTURE // CELL) ** 2)[:count])
        return Picture(tuple(images.tolist()), tuple(cells.tolist()), stray if self.split == "train" else None)


def _neighbour(rng: np.random.Generator) -> RawSample:
    """A question without picture: which digit comes after (or before) another?"""
    lower = int(rng.integers(9))
    if rng.random() < 0.5:
        return _sample(AFTER.format(NUMBERS[lower]), str(lower + 1))
    return _sample(BEFORE.format(NUMBERS[lower + 1]), str(lower))


def _sample(question: str, answer: str, pictures: tuple[Picture, ...] = ()) -> RawSample:
    # The question comes first: from answer to picture it is then the same distance whatever the wording, which is learned sooner.
    asked: list[dict[str, Any]] = [{"type": "text", "text": question}, *({"type": "image"} for _ in pictures)]
    told = [{"type": "text", "text": answer}]
    return RawSample(({"role": "user", "content": asked}, {"role": "assistant", "content": told}), pictures)


def build_model_folder(path: str | Path, seed: int = 0) -> None:
    """Writes an untrained LLaVA (CLIP tower, Qwen3 language model), its tokenizer and its processor to the folder `path`.

    An ordinary Hugging Face folder, which the Auto classes load. `seed` determines the weights; torch's global random state
    stays as it is.
    """
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # needs no torchvision

    tokenizer = _tokenizer()
    edges = {"height": PICTURE, "width": PICTURE}
    processor = LlavaProcessor(
        # Black becomes about 0 and ink varies by about 1: with black at -1 learning takes twice as long to set in.
        image_processor=CLIPImageProcessorPil(size=edges, crop_size=edges, image_mean=[0.1] * 3, image_std=[0.3] * 3),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy takes away again
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlavaForConditionalGeneration(_config(tokenizer)).save_pretrained(path)
    processor.save_pretrained(path)


def _config(tokenizer: "PreTrainedTokenizerFast") -> "LlavaConfig":
    """Three layers of width 96 in each module; `tp` 2 and 4 divide heads, widths and vocabulary."""
    from transformers import CLIPVisionConfig, LlavaConfig, Qwen3Config

    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        projection_dim=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=PICTURE,
        patch_size=PATCH,
        initializer_range=0.2,  # with the factor: 0.1 for patches and positions
        initializer_factor=0.5,
    )
    text = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        initializer_range=0.1,  # 1 / √96; Qwen3's 0.02 is for widths in the thousands
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()[IMAGE],
        image_seq_length=(PICTURE // PATCH) ** 2,
        vision_feature_layer=-1,  # LLaVA's -2 would leave the last layer without gradient
        tie_word_embeddings=False,
    )


def _tokenizer() -> "PreTrainedTokenizerFast":
    """A token for every word that `DigitsSource` writes, in lower case."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    lower, split = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    written = " ".join((*READ_ONE, *READ_TWO, AFTER.format(""), BEFORE.format(""), *NUMBERS, *"0123456789"))
    words = sorted({word for word, _ in split.pre_tokenize_str(lower.normalize_str(written))})
    tokens = (PAD, UNKNOWN, IMAGE, END, USER, ASSISTANT, *words)
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = lower, split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE, "user_token": USER, "assistant_token": ASSISTANT},
    )


if __name__ == "__main__":
    build_model_folder(sys.argv[1])
    print(f"wrote an untrained LLaVA for handwritten digits to {sys.argv[1]}")
