"""AdamW over parameter groups: a learning-rate scale and a weight decay each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

NO_DECAY_TOKENS = ("cls_token", "reg_token", "mask_token", "pos_embed")


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float, scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters by (lr_scale, weight_decay), those of blocks apart from the rest. Biases, 1-d parameters and
    learned tokens are not decayed. ``scales``: {name: learning-rate scale} (core.layer_decay); absent names get 1.
    """
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and not name.endswith(NO_DECAY_TOKENS)
        in_block = "blocks" in name.split(".")  # may be sharded; fused AdamW takes no mixture of whole and sharded
        key = ((scales or {}).get(name, 1.0), weight_decay if decayed else 0.0, in_block)
        group = groups.setdefault(key, {"params": [], "lr_scale": key[0], "weight_decay": key[1]})
        group["params"].append(parameter)
    return list(groups.values())


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW, eps 1e-8; :func:`set_learning_rate` gives each group its rate before every step."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Layer decay: each group's rate is the schedule's value times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
