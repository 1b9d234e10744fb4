"""How do media items become one encoder input? Concatenated along dim 0; where sizes differ, padded to the largest first."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional


def join_media(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One input of every key of the items, which all have the same keys.

    Padding is zero and at the end of each dim, as transformers' processors pad a batch of images or spectrograms of several
    sizes; a mask or the sizes among the inputs tell the model what is padding.
    """
    return {key: torch.cat(_padded([item[key] for item in items])) for key in (items[0] if items else ())}


def _padded(tensors: list[Tensor]) -> list[Tensor]:
    shapes = {tensor.shape[1:] for tensor in tensors}
    if len(shapes) == 1:
        return tensors
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    # functional.pad counts dims from the last.
    pads = [
        [n for most, size in zip(largest[::-1], tensor.shape[:0:-1], strict=True) for n in (0, most - size)] for tensor in tensors
    ]
    return [functional.pad(tensor, pad) for tensor, pad in zip(tensors, pads, strict=True)]
