"""What is asked of any module: its mode, its device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mim_refiner.core.device import eagerly


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, compiled blocks run eagerly; afterwards every submodule has the mode it had."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with eagerly():
            yield
    finally:
        for part, training in modes.items():
            part.training = training


def device_of(module: nn.Module) -> torch.device:
    """Where its parameters are; the CPU for a module without any."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
