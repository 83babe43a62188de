"""Several equal multilayer perceptrons at once: one batched product a layer, one BatchNorm over [K, rows, channels].

Every network keeps its own parameters and buffers; they are stacked for the length of a pass. Over several processes a
BatchNorm sends one message forward and one backward, whatever the number of networks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mim_refiner.core.collectives import all_gather, is_distributed


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
    for layers in zip(*networks, strict=True):
        weights = torch.stack([layer[0].weight for layer in layers])
        x = batch_norm([layer[1] for layer in layers], torch.bmm(x, weights.mT))
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
