"""What would an image processor return for a picture of a given size? Everything but the pixels, by its own arithmetic.

One function an image processor of transformers: (processor, options of its call, height, width) → its output, in which tensors of
pixels have a shape and no memory. They raise what the image processor raises of such a size, or anything.
"""

from collections.abc import Callable, Mapping
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size
from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

Outline = Callable[[Any, Mapping[str, Any], int, int], dict[str, Any]]


def _pixels(*shape: int) -> Tensor:
    return torch.zeros(()).expand(*shape)


def _blank(height: int, width: int) -> np.ndarray:
    return np.broadcast_to(np.uint8(0), (3, height, width))


def _fixed(processor: Any, options: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    """One square of one size (CLIP, SigLIP)."""
    images = processor.image_processor
    side = images.crop_size if getattr(images, "do_center_crop", None) else images.size
    return {"pixel_values": _pixels(1, 3, side.height, side.width)}


def _qwen(processor: Any, options: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    """Patches of the picture's own aspect ratio, as many as bounds of its pixels allow."""
    images = processor.image_processor
    patch, bounds = images.patch_size, images.size
    height, width = smart_resize(
        height, width, patch * images.merge_size, min_pixels=bounds.shortest_edge, max_pixels=bounds.longest_edge
    )
    rows, columns = height // patch, width // patch
    return {
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
        "pixel_values": _pixels(rows * columns, 3 * images.temporal_patch_size * patch**2),
    }


def _tiles(processor: Any, options: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    """The picture as a whole, and squares of the resolution that suits it best (LLaVA-NeXT, LLaVA-OneVision)."""
    images = processor.image_processor
    side = (images.crop_size and images.crop_size.height) or images.size.height or images.size.shortest_edge
    best = select_best_resolution((height, width), images.image_grid_pinpoints)
    squares = 1 + ceil(best[0] / side) * ceil(best[1] / side)
    return {
        "pixel_values": _pixels(1, squares, 3, side, side),
        "image_sizes": torch.tensor([[height, width]]),
        "batch_num_images": [1],
    }


def _canvas(processor: Any, options: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    """Squares of the canvas whose aspect ratio is closest, and the picture as a whole (InternVL)."""
    images = processor.image_processor
    squares = images.get_number_of_image_patches(height, width, options)
    return {"pixel_values": _pixels(squares, 3, images.size.height, images.size.width), "num_patches": [squares]}


def _pan_and_scan(processor: Any, options: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    """The picture as a whole, and where it is asked for crops of it (Gemma 3)."""
    images = processor.image_processor
    how = {key: value for key, value in options.items() if key.startswith("pan_and_scan_")}
    crops = len(images.pan_and_scan(image=_blank(height, width), **how)) if options.get("do_pan_and_scan") else 0
    return {"pixel_values": _pixels(1 + crops, 3, images.size.height, images.size.width), "num_crops": [crops]}


def _pooled(processor: Any, options: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    """Patches of the picture's own aspect ratio, as many as there may be (Gemma 4)."""
    images = processor.image_processor
    patch, pool = images.patch_size, images.pooling_kernel_size
    most = images.max_soft_tokens * pool**2
    height, width = get_aspect_ratio_preserving_size(height, width, patch, most, pool)
    tokens = (height // patch) * (width // patch) // pool**2
    return {"pixel_values": _pixels(1, most, 3 * patch**2), "num_soft_tokens_per_image": [tokens]}


def _at_most(processor: Any, options: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    """The picture in its own size, up to a longest edge, and whole patches (Pixtral, Mistral 3)."""
    size = get_resize_output_image_size(
        _blank(height, width),
        size=processor.image_processor.size.longest_edge,
        patch_size=processor.patch_size * processor.spatial_merge_size,
        input_data_format=ChannelDimension.FIRST,
    )
    if not all(size):
        raise ValueError(f"nothing is left of it at {size}")
    return {"pixel_values": _pixels(1, 3, *size), "image_sizes": torch.tensor([size])}


OUTLINES: dict[str, Outline] = {
    "CLIPImageProcessor": _fixed,
    "SiglipImageProcessor": _fixed,
    "Qwen2VLImageProcessor": _qwen,
    "LlavaNextImageProcessor": _tiles,
    "LlavaOnevisionImageProcessor": _tiles,
    "GotOcr2ImageProcessor": _canvas,
    "Gemma3ImageProcessor": _pan_and_scan,
    "Gemma4ImageProcessor": _pooled,
    "PixtralImageProcessor": _at_most,
}


def outline_of(processor: Any) -> Outline | None:
    """That of the processor's image processor, if there is one. Whether it holds for its settings is to be tried."""
    return OUTLINES.get(type(processor.image_processor).__name__.removesuffix("Pil"))
