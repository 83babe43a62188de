"""World size, rank and gathers; everything is the identity when torch.distributed is not initialised."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """True when a process group with more than one process is running."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Number of processes (1 without torch.distributed)."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """Index of this process (0 without torch.distributed)."""
    return dist.get_rank() if is_distributed() else 0


def all_gather(x: Tensor) -> Tensor:
    """Gather [B, ...] of every rank to [world*B, ...] in rank order, without gradient.

    Every rank must hold the same B.
    """
    if not is_distributed():
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


class _AllGather(torch.autograd.Function):
    """All-gather whose backward sums, over ranks, the gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return all_gather(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        grad = grad_outputs[0].contiguous().clone()
        dist.all_reduce(grad)
        start = rank() * ctx.rows
        return grad[start : start + ctx.rows]


def all_gather_with_grad(x: Tensor) -> Tensor:
    """Gather [B, ...] of every rank to [world*B, ...] in rank order, with gradient.

    The backward pass sums over the losses of all ranks; DistributedDataParallel then divides parameter gradients by
    the world size, so the effective loss is the mean over ranks. Every rank must hold the same B.
    """
    if not is_distributed():
        return x
    gathered: Tensor = _AllGather.apply(x)
    return gathered
