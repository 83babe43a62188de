"""AdamW over parameter groups (learning-rate scale x weight decay), and the phase's learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mim_refiner.core.schedules import peak_learning_rate, warmup_cosine
from mim_refiner.training.recipe import Phase

NO_DECAY_TOKENS = ("cls_token", "reg_token", "mask_token", "pos_embed")


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float, scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Group trainable parameters by (lr_scale, weight_decay), those of blocks apart from the rest.

    Biases, 1-d parameters and learned tokens are not decayed. ``scales`` maps parameter names to learning-rate
    scales (layer decay, core.layer_decay); absent names get 1.
    """
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and not name.endswith(NO_DECAY_TOKENS)
        in_block = "blocks" in name.split(".")  # may be sharded; fused AdamW takes no mixture of whole and sharded
        key = ((scales or {}).get(name, 1.0), weight_decay if decayed else 0.0, in_block)
        group = groups.setdefault(key, {"params": [], "names": [], "lr_scale": key[0], "weight_decay": key[1]})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW, eps 1e-8; the loop sets each group's rate before every step."""
    groups = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)


def phase_schedule(phase: Phase, batch_size: int, steps_per_epoch: int) -> Callable[[int], float]:
    """Linear warm-up, then cosine to ``end_lr``; a function of the finished steps of the phase."""
    total = phase.epochs * steps_per_epoch
    warmup = min(round(phase.warmup_epochs * steps_per_epoch), total)
    peak = peak_learning_rate(phase.base_lr, batch_size)

    def rate(step: int) -> float:
        return warmup_cosine(step, total_steps=total, warmup_steps=warmup, peak=peak, end=phase.end_lr)

    return rate
