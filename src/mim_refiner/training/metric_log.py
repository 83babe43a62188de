"""Losses and metrics between two log lines, kept on the device: nobody waits for it until a line is written."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from mim_refiner.core.collectives import agree, world_size


class MetricLog:
    """Sums of scalars, the images a second, and the first step of the phase whose loss was not finite."""

    def __init__(self, device: torch.device) -> None:
        self._bad = torch.full((), torch.inf, dtype=torch.float64, device=device)
        self.reset()

    def reset(self) -> None:
        """Begin a new line."""
        self._sums: dict[str, Tensor] = {}
        self._steps = self._images = 0
        self.seen: dict[str, float] = {}  # k-NN and the guard's measures since the last line
        self._since = time.perf_counter()

    def add(self, step: int, loss: Tensor, metrics: Mapping[str, Tensor], images: int) -> None:
        """Note a step: its loss, other scalars, and the images of this process."""
        loss = loss.detach()
        for key, value in {"loss": loss, **metrics}.items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value
        self._steps += 1
        self._images += images * world_size()
        self._bad = torch.minimum(self._bad, torch.where(torch.isfinite(loss), torch.inf, float(step)).to(self._bad))

    def first_non_finite(self) -> int | None:
        """The first step so far whose loss was NaN or infinite on any rank; waits for the device."""
        first = agree(self._bad.item(), largest=False)
        return None if first == torch.inf else int(first)

    def means(self) -> dict[str, float]:
        """The mean of every scalar over steps and ranks; waits for the device once."""
        if not self._sums:
            return {}
        values = torch.stack([(value / self._steps).double() for value in self._sums.values()]).cpu()
        if world_size() > 1:
            torch.distributed.all_reduce(values)
            values /= world_size()
        return dict(zip(self._sums, values.tolist(), strict=True))

    def images_per_second(self) -> float:
        """Since the last line."""
        return round(self._images / (time.perf_counter() - self._since), 1)
