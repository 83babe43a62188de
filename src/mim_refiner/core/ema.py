"""Exponential moving average of a model's weights, kept for evaluation only."""

from __future__ import annotations

import copy

import torch
from torch import nn

from mim_refiner.core.sharding import local


class ExponentialMovingAverage(nn.Module):
    """Averaged copy of a model in ``module``; it takes no gradient and stays in eval mode."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """Move the average to ``decay * average + (1 - decay) * model``; buffers are copied, not averaged."""
        average, current = dict(self.module.named_parameters()), dict(model.named_parameters())
        own = [local(parameter) for parameter in average.values()]
        moved = [local(current[name].detach()).to(mine) for name, mine in zip(average, own, strict=True)]
        torch._foreach_lerp_(own, moved, 1 - decay)  # exact where nothing moved
        buffers = dict(model.named_buffers())
        for name, buffer in self.module.named_buffers():
            buffer.copy_(buffers[name])

    def train(self, mode: bool = True) -> ExponentialMovingAverage:
        """Stay in eval mode whatever the surrounding module does."""
        return super().train(False)
