"""What is planned of a picture from its size equals what the stock processor makes of it, at every size, or both refuse it."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.folders import IMAGE_FAMILIES, model_folder

from meshweave.data.footprint import Footprint, footprint_of, process_image
from meshweave.data.processor import load_processor
from meshweave.errors import DataError

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_5_vl": ("qwen2_5_vl", {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056}),
    "qwen3_vl": ("qwen3_vl", {"patch_size": 16, "size": {"shortest_edge": 65536, "longest_edge": 16777216}}),
    "qwen3_5": ("qwen3_5", {"patch_size": 16, "size": {"shortest_edge": 65536, "longest_edge": 16777216}}),
    "llava": ("llava", {"crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336}}),
    "gemma3": ("gemma3", {"size": {"height": 896, "width": 896}}),
    "gemma4": ("gemma4", {"patch_size": 16, "pooling_kernel_size": 3, "max_soft_tokens": 280}),
}
"""With the image processors' numbers as the hub has them, where arithmetic answers and not a blank picture."""
SIZES = st.tuples(*[st.one_of(st.integers(1, 70), st.integers(1, 700))] * 2)
AWKWARD = ((1, 1), (313, 1), (3, 50), (1, 5000), (199, 1), (200, 1), (201, 1), (15, 17), (64, 65), (2048, 31))


@cache
def processor_of(family: str, published: bool) -> tuple[Any, str, Any]:
    with TemporaryDirectory() as folder:
        name, changes = PUBLISHED[family] if published else (family, {})
        processor = load_processor(model_folder(name, Path(folder), **changes))
    placeholder = getattr(processor.tokenizer, "image_token", None) or processor.image_token
    return processor, placeholder, footprint_of(processor, placeholder)


def agrees(family: str, size: tuple[int, int], published: bool = False) -> None:
    processor, placeholder, footprint = processor_of(family, published)

    def made() -> Footprint:
        # A picture that is not blank: what it shows must not matter.
        picture = Image.linear_gradient("L").resize((size[1], size[0])).convert("RGB")
        return process_image(processor, picture, placeholder)[1]

    outcomes: list[Footprint | None] = []
    for find in (lambda: footprint(size), made):
        try:
            outcomes.append(find())
        except DataError as error:
            assert error.kind == "processor"
            outcomes.append(None)
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
@settings(max_examples=25, deadline=None)
@given(size=SIZES)
def test_planned_equals_made_at_any_size(family: str, size: tuple[int, int]) -> None:
    agrees(family, size)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_planned_equals_made_at_awkward_sizes(family: str) -> None:
    for size in AWKWARD:
        agrees(family, size)


@pytest.mark.parametrize("family", PUBLISHED)
def test_planned_equals_made_with_the_numbers_of_published_folders(family: str) -> None:
    assert processor_of(family, published=True)[2].__name__ == "computed"
    for size in ((1, 1), (313, 1), (3, 50), (1, 5000), (201, 1), (64, 65), (480, 640), (1080, 607)):
        agrees(family, size, published=True)


def test_a_large_picture_is_planned_from_its_size_alone() -> None:
    found = processor_of("qwen3_vl", published=True)[2]((4000, 4000))
    assert found.grid == (1, 250, 250)
    assert found.tokens == 125 * 125


def test_arithmetic_that_is_wrong_at_a_bound_is_not_trusted(tmp_path: Path) -> None:
    processor = load_processor(model_folder("qwen3_vl", tmp_path))
    stock = type(processor)._get_num_multimodal_tokens

    def wrong(image_sizes: Any = None, **_: Any) -> Any:
        numbers = stock(processor, image_sizes=image_sizes)
        numbers.num_image_tokens = [tokens + (tokens >= 60) for tokens in numbers.num_image_tokens]
        return numbers

    processor._get_num_multimodal_tokens = wrong
    footprint = footprint_of(processor, processor.image_token)
    assert footprint.__name__ == "measured"
    assert footprint((900, 1200)).tokens == footprint((900, 1200)).text.count(processor.image_token)
