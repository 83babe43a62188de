"""What every computation of a command needs beside its input: where, how exactly, with which seed, and who listens."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

from mim_refiner.reporting import NullReporter, Reporter


@dataclass(frozen=True)
class Run:
    """Device, precision of forward passes ("fp32" or "bf16"), seed, and the receiver of progress."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"
    seed: int = 0
    reporter: Reporter = field(default_factory=NullReporter)

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision for a forward pass."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")
