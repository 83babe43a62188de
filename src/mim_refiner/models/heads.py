"""Instance-discrimination head: projector, predictor, neighbour queue and NNA loss (arXiv 2402.10093, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from mim_refiner.core.collectives import (
    all_gather,
    all_gather_with_grad,
    all_reduce_sum,
    is_distributed,
    process_rows,
    world_size,
)
from mim_refiner.core.neighbors import NeighborQueue
from mim_refiner.core.nna import ViewPairing, multi_view_nna_loss
from mim_refiner.errors import InputError


@dataclass(frozen=True)
class HeadConfig:
    """Sizes of a head; the projector has ``projector_layers`` hidden layers of width ``projector_hidden``."""

    projector_hidden: int = 2048
    predictor_hidden: int = 4096
    out_dim: int = 256
    queue_size: int = 65_536
    projector_layers: int = 2


@dataclass(frozen=True)
class Objective:
    """What a head's loss is computed from: the first ``num_global`` views are targets (core.nna says the rest)."""

    temperature: float = 0.2
    view_pairing: ViewPairing = "cross"
    num_global: int = 2
    swap_negatives: bool = False
    swap_positive: bool = True  # False: the target itself, as in plain contrastive learning


@dataclass(frozen=True)
class HeadOutput:
    """What a head returns; the neighbour fields are for the R = G*B target rows, view-major, and carry no gradient."""

    loss: Tensor
    alignment: Tensor  # mean cosine of neighbour and prediction
    neighbor_similarity: Tensor  # [R] cosine of target and neighbour
    neighbor_age: Tensor  # [R]
    neighbor_sample_ids: Tensor  # [R], -1 for entries of the start
    projected: Tensor  # [V, B, out_dim]
    predicted: Tensor  # [V, B, out_dim]


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation over the batch of all ranks.

    (torch's SyncBatchNorm has no CPU kernel and refuses float64; a head's inputs are small next to an encoder's.)
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and is_distributed()):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = _at_least_float32(x)
            total = len(x) * world_size()
            mean = all_reduce_sum(wide.sum(0)) / total
            centred = wide - mean
            variance = all_reduce_sum(centred.square().sum(0)) / total
            self._track(mean.detach(), variance.detach() * (total / (total - 1)))
            output = centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias
        return output.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var), self.momentum)


class RefinerHead(nn.Module):
    """One head on the pooled output of one block.

    Projector: (Linear, BatchNorm, GELU) per hidden layer, then Linear, BatchNorm; predictor the same with one hidden
    layer. Linears have no bias (BatchNorm follows) and Xavier-uniform weights. All views of all ranks pass as one
    batch, so the statistics mix them.
    ``head.queue.top_k`` may be changed between phases.
    """

    def __init__(self, in_dim: int, config: HeadConfig, objective: Objective | None = None, *, top_k: int = 1) -> None:
        super().__init__()
        self.objective = objective or Objective()
        self.projector = _mlp([in_dim, *[config.projector_hidden] * config.projector_layers, config.out_dim])
        self.predictor = _mlp([config.out_dim, config.predictor_hidden, config.out_dim])
        self.queue = NeighborQueue(config.queue_size, config.out_dim, top_k=top_k)

    def forward(
        self,
        features: Tensor,
        sample_ids: Tensor,
        *,
        generator: torch.Generator | None = None,
        choice: Tensor | None = None,
    ) -> HeadOutput:
        """Loss of features [V, B, in_dim] (global views first) of the samples ``sample_ids`` [B].

        In training the look-up excludes entries of the same sample and view 0, gathered over ranks, is enqueued after
        it; in eval mode neither happens. ``choice`` [G*B] replays the draws among the top_k neighbours.
        """
        (num_views, batch), num_global = features.shape[:2], self.objective.num_global
        if not 1 <= num_global <= num_views:
            raise InputError(f"head: num_global must be between 1 and the {num_views} views, got {num_global}")
        projected = self.projector(features.flatten(0, 1))
        predicted = self.predictor(projected)
        # autocast would run similarities and logits in bfloat16, whose 3 digits are too few for cosines
        with torch.autocast(features.device.type, enabled=False):
            projected = _at_least_float32(projected).view(num_views, batch, -1)
            predicted = _at_least_float32(predicted).view(num_views, batch, -1)
            targets = projected[:num_global].detach()
            if choice is None:  # drawn for the rows of all ranks, so that their number changes nothing
                rows = process_rows(batch)
                drawn = self.queue.draw(num_global * rows.total, generator)
                choice = None if drawn is None else rows.take(drawn)
            found = self.queue.lookup(targets.flatten(0, 1), sample_ids, exclude_same=self.training, choice=choice)
            neighbor_ids = self.queue.sample_ids[found.indices]
            result = multi_view_nna_loss(
                predicted,
                targets,
                found.neighbors.to(targets).view_as(targets) if self.objective.swap_positive else targets,
                self.objective.temperature,
                gather=all_gather_with_grad if is_distributed() else None,
                swap_negatives=self.objective.swap_negatives,
                view_pairing=self.objective.view_pairing,
            )
            if self.training:
                self.queue.enqueue(all_gather(targets[0]), all_gather(sample_ids.to(targets.device)))
        return HeadOutput(
            loss=result.loss,
            alignment=result.alignment,
            neighbor_similarity=found.similarity,
            neighbor_age=found.age,
            neighbor_sample_ids=neighbor_ids,
            projected=projected,
            predicted=predicted,
        )


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear-BatchNorm layers through ``widths`` with GELU between them."""
    layers = []
    for index, (width_in, width_out) in enumerate(pairwise(widths)):
        linear = nn.Linear(width_in, width_out, bias=False)
        nn.init.xavier_uniform_(linear.weight)
        layer: list[nn.Module] = [linear, BatchNorm(width_out)]
        layers.append(nn.Sequential(*layer, *([nn.GELU()] if index < len(widths) - 2 else [])))
    return nn.Sequential(*layers)
