"""How are weights updated? Written once more from the rules that the run file documents, in plain torch, one parameter at a time.

The run's own optimizer (`train/optimizer.py`) is not used here: what it gets wrong would otherwise be wrong on both sides.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from meshweave.config import RunConfig, TrainConfig


def rate_at(train: TrainConfig, peak: float, step: int) -> float:
    """Learning rate of a step, counted from 0, by the rules of `TrainConfig`."""
    if step < train.warmup_steps:
        return peak * (step + 1) / train.warmup_steps
    left = max(1, train.steps - train.warmup_steps)
    angle = math.pi * min(1.0, (step - train.warmup_steps) / left)
    lowest = peak * train.min_lr_ratio
    return lowest + (peak - lowest) * (1 + math.cos(angle)) / 2


class ReferenceUpdate:
    """Clipping, and AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, with the learning rate as its only schedule).

    State: the step's number, and each parameter's two moments and number of updates.
    """

    def __init__(self, run: RunConfig, parameters: Mapping[str, Iterable[nn.Parameter]]) -> None:
        """Of the parameters of every module of the run."""
        self.run, self.parameters = run, {name: tuple(its) for name, its in parameters.items()}
        self.step = 0
        self._moments: dict[nn.Parameter, tuple[Tensor, Tensor, int]] = {}

    @torch.no_grad()
    def update(self, learned: bool) -> None:
        """One step, with the gradients that the parameters have; where nothing was learned only its number goes on."""
        train = self.run.train
        if learned:
            gradients = [p.grad for its in self.parameters.values() for p in its if p.grad is not None]
            norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
            clip = min(1.0, train.max_grad_norm / (norm + 1e-6)) if train.max_grad_norm is not None else 1.0
            for module, its in self.parameters.items():
                rate = rate_at(train, self.run.modules[module].lr or train.lr, self.step)
                for parameter in its:
                    if parameter.grad is not None:
                        self._adamw(parameter, parameter.grad * clip, rate)
        self.step += 1

    def _adamw(self, parameter: nn.Parameter, gradient: Tensor, rate: float) -> None:
        first, second = self.run.train.betas
        mean, square, updates = self._moments.get(parameter, (torch.zeros_like(gradient), torch.zeros_like(gradient), 0))
        mean, square, updates = first * mean + (1 - first) * gradient, second * square + (1 - second) * gradient**2, updates + 1
        self._moments[parameter] = mean, square, updates
        if parameter.ndim > 1:  # matrices decay; biases and norms do not
            parameter.mul_(1 - rate * self.run.train.weight_decay)
        direction = (mean / (1 - first**updates)) / ((square / (1 - second**updates)).sqrt() + self.run.train.eps)
        parameter.sub_(rate * direction)
