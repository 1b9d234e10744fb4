"""What is the whole value of a sharded tensor?"""

import logging

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

# Gathering FSDP × TP shards takes two steps, which torch finds worth a warning per tensor.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def whole(value: Tensor) -> Tensor:
    """The full tensor, detached; a collective over the ranks that hold it."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else torch.clone(value)
