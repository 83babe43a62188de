"""What every computation of a command needs beside its input: where, how exactly, with which seed, and who listens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from mim_refiner.reporting import Reporter

ONE_BY_ONE = {"cpu"}  # devices on which heads run one by one: to copy what they hold together costs more than it saves


@dataclass(frozen=True)
class Run:
    """Device, precision of forward passes ("fp32" or "bf16"), seed, and the receiver of progress."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"
    seed: int = 0
    reporter: Reporter = field(default_factory=Reporter)

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision for a forward pass."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors on the device: in one copy from page-locked memory, so that the host need not wait for it."""
    if device.type == "cpu" or not tensors:
        return list(tensors)
    starts = list(accumulate((-(-tensor.nbytes // 16) * 16 for tensor in tensors), initial=0))
    packed = torch.empty(starts.pop(), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    places = [slice(start, start + tensor.nbytes) for start, tensor in zip(starts, tensors, strict=True)]
    for place, tensor in zip(places, tensors, strict=True):
        packed[place] = tensor.contiguous().view(-1).view(torch.uint8)
    there = packed.to(device, non_blocking=True)
    return [there[place].view(t.dtype).view(t.shape) for place, t in zip(places, tensors, strict=True)]
