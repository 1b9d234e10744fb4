"""What is planned of a picture from its size equals what the stock processor makes of it, at every size, or both refuse it."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.folders import IMAGE_FAMILIES, model_folder

from meshweave.data.footprint import Footprint, footprint_of, process_image
from meshweave.data.outlines import OUTLINES, _qwen
from meshweave.data.processor import load_processor
from meshweave.errors import DataError

OMNI = {"min_pixels": 3136, "max_pixels": 12845056}
TILES = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llava": ({"crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336}}, {"patch_size": 14}),
    "llava_next": (
        {
            "crop_size": {"height": 336, "width": 336},
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
            "size": {"shortest_edge": 336},
        },
        {"patch_size": 14},
    ),
    "llava_onevision": (
        {"image_grid_pinpoints": TILES, "size": {"height": 384, "width": 384}},
        {"num_image_tokens": 729},
    ),
    "qwen2_5_vl": ({"patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056}, {}),
    "qwen3_vl": ({"patch_size": 16, "size": {"shortest_edge": 65536, "longest_edge": 16777216}}, {}),
    "qwen2_5_omni": ({"patch_size": 14} | OMNI, {}),
    "qwen3_omni_moe": ({"patch_size": 16} | OMNI, {}),
    "internvl": ({"size": {"height": 448, "width": 448}, "max_patches": 12}, {"image_seq_length": 256}),
    "gemma3": ({"size": {"height": 896, "width": 896}}, {"image_seq_length": 256}),
    "gemma4": ({"patch_size": 16, "pooling_kernel_size": 3, "max_soft_tokens": 280}, {"image_seq_length": 280}),
    "mistral3": ({"patch_size": 14, "size": {"longest_edge": 1540}}, {"patch_size": 14}),
}
"""The numbers of preprocessor_config.json and processor_config.json as the hub has them; families that are not here have those of
`qwen3_vl` or `gemma4`."""
SIZES = st.tuples(*[st.one_of(st.integers(1, 70), st.integers(1, 700))] * 2)
AWKWARD = ((1, 1), (313, 1), (3, 50), (1, 5000), (199, 1), (200, 1), (201, 1), (15, 17), (64, 65), (2048, 31))


@cache
def processor_of(family: str, published: bool) -> tuple[Any, str, Any]:
    with TemporaryDirectory() as folder:
        changes, processor_changes = PUBLISHED[family] if published else ({}, {})
        processor = load_processor(model_folder(family, Path(folder), processor=processor_changes, **changes))
    placeholder = getattr(processor.tokenizer, "image_token", None) or processor.image_token
    return processor, placeholder, footprint_of(processor, placeholder)


def made(processor: Any, placeholder: str, size: tuple[int, int]) -> Footprint:
    """Of a picture that is not blank: what it shows must not matter."""
    picture = Image.linear_gradient("L").resize((size[1], size[0])).convert("RGB")
    return process_image(processor, picture, placeholder)[1]


def outcome(find: Callable[[], Footprint]) -> Footprint | None:
    """None where it is refused."""
    try:
        return find()
    except DataError as error:
        assert error.kind == "processor"
        return None


def agrees(family: str, size: tuple[int, int], published: bool = False) -> None:
    processor, placeholder, footprint = processor_of(family, published)
    assert outcome(lambda: footprint(size)) == outcome(lambda: made(processor, placeholder, size))


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
    for size in ((1, 1), (313, 1), (3, 50), (1, 5000), (201, 1), (64, 65), (480, 640), (1080, 607), (400, 1700)):
        agrees(family, size, published=True)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("family", PUBLISHED)
def test_no_picture_is_made_to_plan_one(family: str, published: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    processor, _, footprint = processor_of(family, published)
    monkeypatch.setattr(type(processor.image_processor), "preprocess", None)
    assert footprint((4000, 4000)).tokens > 0


def test_a_large_picture_is_planned_from_its_size_alone() -> None:
    found = processor_of("qwen3_vl", published=True)[2]((4000, 4000))
    assert found.grid == (1, 250, 250)
    assert found.tokens == 125 * 125


def test_arithmetic_that_is_wrong_at_a_bound_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: Any) -> dict[str, Any]:
        found = _qwen(*given)
        return found | {"image_grid_thw": found["image_grid_thw"] + 2 * (found["image_grid_thw"] >= 18)}

    monkeypatch.setitem(OUTLINES, "Qwen2VLImageProcessor", wrong)
    processor = load_processor(model_folder("qwen3_vl", tmp_path))
    right = processor_of("qwen3_vl", published=False)[2]
    assert footprint_of(processor, processor.image_token)((900, 1200)) == right((900, 1200))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llava", {"do_center_crop": False}),
        ("llava", {"do_center_crop": False, "size": {"height": 40, "width": 24}}),
        ("llava_next", {"crop_size": {"height": 8, "width": 8}}),
        ("qwen3_vl", {"do_resize": False}),
        ("qwen3_vl", {"merge_size": 1}),
        ("internvl", {"max_patches": 1}),
        ("internvl", {"min_patches": 3}),
        ("gemma3", {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8}),
        ("gemma3", {"do_resize": False}),
        ("mistral3", {"size": {"height": 24, "width": 64}}),
    ],
)
def test_planned_equals_made_under_settings_that_no_published_folder_has(family: str, changes: dict, tmp_path: Path) -> None:
    processor = load_processor(model_folder(family, tmp_path, **changes))
    placeholder = getattr(processor.tokenizer, "image_token", None) or processor.image_token
    footprint = footprint_of(processor, placeholder)
    for size in ((1, 1), (20, 90), (33, 32), (130, 40), (300, 310)):
        assert outcome(partial(footprint, size)) == outcome(partial(made, processor, placeholder, size)), size
