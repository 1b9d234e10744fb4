"""How are parameters updated? AdamW with a learning rate per module, linear warm-up and cosine decay."""

import math
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from meshweave.config import RunConfig, TrainConfig


def build_optimizer(run: RunConfig, parameters: Mapping[str, Mapping[str, nn.Parameter]]) -> AdamW:
    """AdamW over module name → parameter name → parameter; weight decay on matrices only.

    Parameters of one group share a device mesh, because a fused update cannot mix meshes.
    """
    groups: dict[tuple[Any, ...], list[nn.Parameter]] = defaultdict(list)
    for name, named in parameters.items():
        for parameter in named.values():
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups[name, parameter.ndim > 1, mesh].append(parameter)
    return AdamW(
        [
            {
                "params": members,
                "lr": peak_rate(run, name),
                "weight_decay": run.train.weight_decay if matrix else 0.0,
            }
            for (name, matrix, _), members in groups.items()
        ]
        or [{"params": []}],  # an idle rank: AdamW wants a group
        betas=run.train.betas,
        eps=run.train.eps,
        fused=True,
    )


def build_schedule(run: RunConfig, optimizer: AdamW, done: int = 0) -> LambdaLR:
    """Scales every group's peak rate by `rate_factor`, from the step on that follows `done` ones."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return LambdaLR(optimizer, partial(rate_factor, run.train), last_epoch=done - 1)


def peak_rate(run: RunConfig, module: str) -> float:
    """Peak learning rate of a module."""
    return run.modules[module].lr or run.train.lr


def rate_factor(train: TrainConfig, step: int) -> float:
    """Share of the peak rate at a step: linear warm-up, then cosine decay to `min_lr_ratio` after the last step."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    progress = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return train.min_lr_ratio + (1 - train.min_lr_ratio) * cosine
