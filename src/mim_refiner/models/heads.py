"""Instance-discrimination head: projector, predictor, neighbour queue and NNA loss (arXiv 2402.10093, section 3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mim_refiner.core.collectives import all_gather, all_gather_with_grad, is_distributed, process_rows
from mim_refiner.core.neighbors import NeighborQueue, look_up
from mim_refiner.core.nna import ViewPairing, multi_view_nna_loss
from mim_refiner.core.run import ONE_BY_ONE, send


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
        self.projector = mlp([in_dim, *[config.projector_hidden] * config.projector_layers, config.out_dim])
        self.predictor = mlp([config.out_dim, config.predictor_hidden, config.out_dim])
        self.queue = NeighborQueue(config.queue_size, config.out_dim, top_k=top_k)

    def forward(self, features: Tensor, sample_ids: Tensor, *, choice: Tensor | None = None) -> HeadOutput:
        """:func:`run_heads` of one head, on features [V, B, in_dim]."""
        return run_heads([self], features[None], sample_ids, None if choice is None else [choice])[0]


def run_heads(
    heads: Sequence[RefinerHead], features: Tensor, sample_ids: Tensor, choices: Sequence[Tensor] | None = None
) -> list[HeadOutput]:
    """Losses of K heads on features [K, V, B, in_dim] (global views first) of samples [B].

    The heads are equal in size and objective. In training the look-up excludes entries of the same sample, and view 0,
    gathered over ranks, is enqueued after it; in eval mode neither happens. ``choices`` K times [G*B]: which of the
    top_k neighbours each target takes (:func:`draw_choices`); None: the nearest.
    """
    (_, views, batch), objective, training = features.shape[:3], heads[0].objective, heads[0].training
    num_global = objective.num_global
    projected = run_mlps([head.projector for head in heads], features.flatten(1, 2))
    predicted = run_mlps([head.predictor for head in heads], projected)
    # autocast would run similarities and logits in bfloat16, whose 3 digits are too few for cosines
    with torch.autocast(features.device.type, enabled=False):
        half = (torch.float16, torch.bfloat16)
        wide = (x.float() if x.dtype in half else x for x in (projected, predicted))
        projected, predicted = (x.unflatten(1, (views, batch)) for x in wide)
        targets = projected[:, :num_global].detach()
        queues, ids = [head.queue for head in heads], sample_ids.to(targets.device)
        drawn = None if choices is None else torch.stack([choice.flatten() for choice in choices])
        found = look_up(queues, targets.flatten(1, 2), ids if training else None, drawn)
        result = multi_view_nna_loss(
            predicted,
            targets,
            found.neighbors.to(targets).view_as(targets) if objective.swap_positive else targets,
            objective.temperature,
            gather=all_gather_with_grad if is_distributed() else None,
            swap_negatives=objective.swap_negatives,
            view_pairing=objective.view_pairing,
        )
        neighbor_ids = torch.stack([queue.sample_ids for queue in queues]).gather(1, found.indices)
        if training:
            ids = all_gather(ids)
            for queue, rows in zip(queues, all_gather(targets[:, 0].transpose(0, 1)).unbind(1), strict=True):
                queue.enqueue(rows, ids)
    queue_facts = (found.similarity, found.age, neighbor_ids)
    fields = (result.loss, result.alignment, *queue_facts, projected, predicted)
    return [HeadOutput(*(field[number] for field in fields)) for number in range(len(heads))]


def draw_choices(
    heads: Sequence[RefinerHead], num_global: int, batch: int, generator: torch.Generator | None, device: torch.device
) -> list[Tensor] | None:
    """Which nearest neighbours the heads' targets take, [G*B] each, drawn for all ranks' rows; None: the nearest."""
    rows = process_rows(batch)
    drawn = [head.queue.draw(num_global * rows.total, generator) for head in heads]
    taken = [rows.take(own) for own in drawn if own is not None]
    return send(taken, device) if taken else None


# --- several equal multilayer perceptrons at once; parameters are stacked for the length of a pass


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear-BatchNorm layers through ``widths`` with GELU between them; Xavier-uniform weights without bias."""
    layers = []
    for index, (width_in, width_out) in enumerate(pairwise(widths)):
        linear = nn.Linear(width_in, width_out, bias=False)
        nn.init.xavier_uniform_(linear.weight)
        gelu = [nn.GELU()] if index < len(widths) - 2 else []
        layers.append(nn.Sequential(linear, nn.BatchNorm1d(width_out), *gelu))
    return nn.Sequential(*layers)


def run_mlps(networks: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Outputs [K, R, out] of K networks of :func:`mlp`, equal in size, on rows [K, R, in], each network on its own."""
    networks = list(networks)
    if x.device.type in ONE_BY_ONE and len(networks) > 1 and not is_distributed():
        return torch.cat([run_mlps([network], rows) for network, rows in zip(networks, x.split(1), strict=True)])
    for layers in zip(*networks, strict=True):
        weights = [layer[0].weight for layer in layers]
        x = F.linear(x, *weights) if len(weights) == 1 else torch.bmm(x, torch.stack(weights).mT)
        x = batch_norm([layer[1] for layer in layers], x)
        x = F.gelu(x) if len(layers[0]) == 3 else x
    return x


def batch_norm(norms: Sequence[nn.BatchNorm1d], x: Tensor) -> Tensor:
    """Normalise rows [K, R, C] over R, of all processes together in training, and track the statistics of each norm.

    (torch's SyncBatchNorm has no CPU kernel and refuses float64; a head's inputs are small next to an encoder's.)
    """
    one, (heads, rows, channels) = norms[0], x.shape
    flat = x.transpose(0, 1).reshape(rows, heads * channels)
    weight, bias = (torch.cat([getattr(norm, name) for norm in norms]) for name in ("weight", "bias"))
    mean, variance = (torch.cat([getattr(norm, f"running_{name}") for norm in norms]) for name in ("mean", "var"))
    momentum = one.momentum or 0.0
    if one.training and is_distributed():
        with torch.autocast(x.device.type, enabled=False):
            wide = flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat
            normed, own_mean, own_variance = _Normalize.apply(wide, one.eps)
            mean.lerp_(own_mean.to(mean), momentum)
            variance.lerp_(own_variance.to(variance), momentum)
            output = (normed * weight + bias).to(flat.dtype)
    else:
        output = F.batch_norm(flat, mean, variance, weight, bias, one.training, momentum, one.eps)
    if one.training:
        kept: list[list[Any]] = [[n.running_mean, n.running_var, n.num_batches_tracked] for n in norms]
        means, variances, counts = zip(*kept, strict=True)
        torch._foreach_copy_(means, mean.split(channels))
        torch._foreach_copy_(variances, variance.split(channels))
        torch._foreach_add_(counts, 1)
    return output.view(rows, heads, channels).transpose(0, 1)


class _Normalize(torch.autograd.Function):
    """(x - mean) / deviation of rows [R, C], with mean and variance over the rows of all processes.

    Every process's loss depends on every row, so the gradient is that of the sum of the processes' losses.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        own_mean = x.mean(0)
        own = torch.stack([own_mean, (x - own_mean).square().sum(0), torch.full_like(own_mean, len(x))])
        means, squares, counts = all_gather(own[None]).unbind(1)  # [processes, C] each
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        squares = (squares + counts * (means - mean).square()).sum(0)
        scale = torch.rsqrt(squares / total + eps)
        normed = (x - mean) * scale
        ctx.save_for_backward(normed, scale, total)
        unbiased = squares / (total - 1)
        ctx.mark_non_differentiable(mean, unbiased)
        return normed, mean, unbiased

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        grad, (normed, scale, total) = grads[0], ctx.saved_tensors
        sums = torch.stack([grad.sum(0), (grad * normed).sum(0)])
        dist.all_reduce(sums)
        return scale * (grad - (sums[0] + normed * sums[1]) / total), None
