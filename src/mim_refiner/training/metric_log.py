"""Losses and metrics between two log lines, kept on the device: nobody waits for it until a line is written."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from mim_refiner.core.collectives import agree, world_size
from mim_refiner.models.heads import HeadOutput
from mim_refiner.models.refiner import RefinerOutput


class MetricLog:
    """Sums of scalars, the images a second, and the first step of the phase whose loss was not finite."""

    def __init__(self, device: torch.device) -> None:
        self._wide = torch.float32 if device.type == "mps" else torch.float64  # an Apple GPU has no float64
        self._bad = torch.full((), torch.inf, dtype=self._wide, device=device)
        self.reset()

    def reset(self) -> None:
        """Begin a new line."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}  # of the steps that have the scalar
        self._images = 0
        self.seen: dict[str, float] = {}  # k-NN and the guard's measures since the last line
        self._since = time.perf_counter()

    def add(self, step: int, loss: Tensor, metrics: Mapping[str, Tensor], images: int) -> None:
        """Note a step: what it minimises, scalars (a "loss" among them is the one to log), this process's images."""
        loss = loss.detach()
        for key, value in {"loss": loss, **metrics}.items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value
            self._counts[key] = self._counts.get(key, 0) + 1
        self._images += images * world_size()
        self._bad = torch.minimum(self._bad, torch.where(torch.isfinite(loss), torch.inf, float(step)).to(self._bad))

    def first_non_finite(self) -> int | None:
        """The first step so far whose loss was NaN or infinite on any rank; waits for the device."""
        first = agree(self._bad.item(), largest=False)
        return None if first == torch.inf else int(first)

    def means(self) -> dict[str, float]:
        """The mean of every scalar over ranks and the steps that have it; waits for the device once."""
        if not self._sums:
            return {}
        values = torch.stack([(value / self._counts[key]).to(self._wide) for key, value in self._sums.items()]).cpu()
        if world_size() > 1:
            torch.distributed.all_reduce(values)
            values /= world_size()
        return dict(zip(self._sums, values.tolist(), strict=True))

    def images_per_second(self) -> float:
        """Since the last line."""
        return round(self._images / (time.perf_counter() - self._since), 1)


def metrics_of(output: RefinerOutput, sample_ids: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """What the heads saw, {"<name>/<block>": scalar}."""
    metrics: dict[str, Tensor] = {}
    for block, head in output.heads.items():
        metrics[f"loss/{block}"] = head.loss.detach()
        metrics[f"alignment/{block}"] = head.alignment.detach()
        metrics[f"neighbor_similarity/{block}"] = head.neighbor_similarity.mean()
        metrics[f"neighbor_age/{block}"] = head.neighbor_age.float().mean()
        if labels is not None:
            metrics[f"neighbor_accuracy/{block}"] = neighbor_accuracy(head, sample_ids, labels)
    return metrics


def neighbor_accuracy(head: HeadOutput, sample_ids: Tensor, labels: Tensor) -> Tensor:
    """Share of the targets' neighbours that are of the image's class, among those that are images."""
    own = labels[sample_ids].repeat(len(head.neighbor_sample_ids) // len(sample_ids))
    neighbor = labels[head.neighbor_sample_ids.clamp(min=0)]
    known = head.neighbor_sample_ids >= 0  # entries of the random start have no label
    return ((own == neighbor) & known).sum() / known.sum().clamp(min=1)
