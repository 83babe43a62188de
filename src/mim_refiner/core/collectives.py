"""World size, rank, gathers, and the rows of a batch; everything is the identity without torch.distributed.

Every draw of a step is made for the whole batch of all processes; a process or a micro-batch takes its rows of it, so
that random draws do not depend on how the batch is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors
from torch.distributed.tensor import DTensor

from mim_refiner.errors import MimRefinerError

T = TypeVar("T")

BUCKET_BYTES = 64 * 2**20  # of gradients sent by one call


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
    """[B, ...] of every rank (B the same) as [world*B, ...] in rank order, without gradient."""
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
    """:func:`all_gather` with gradient. The backward pass sums over the losses of all ranks; :func:`average_gradients`
    then divides parameter gradients by the world size, so the effective loss is the mean over ranks.
    """
    return _AllGather.apply(x) if is_distributed() else x


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over ranks; those of sharded parameters are that already.

    In buckets, after the backward pass: a cached step has several of them, so sending during one would not fit.
    """
    if not is_distributed():
        return
    whole = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    for bucket in _take_tensors(whole, BUCKET_BYTES):
        flat = _flatten_dense_tensors(bucket)
        dist.all_reduce(flat)
        flat /= world_size()
        for gradient, averaged in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
            gradient.copy_(averaged)


@torch.no_grad()
def broadcast_state(modules: Iterable[nn.Module]) -> None:
    """Give every rank the parameters and buffers of rank 0; sharded ones differ by rank and stay."""
    if is_distributed():
        for module in modules:
            for tensor in module.state_dict().values():
                if not isinstance(tensor, DTensor):
                    dist.broadcast(tensor, 0)


def agree(value: float, *, largest: bool = True) -> float:
    """The largest (or smallest) of the ranks' numbers, on every rank; by way of the CPU, without waiting for a GPU."""
    if not is_distributed():
        return value
    agreed = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(agreed, dist.ReduceOp.MAX if largest else dist.ReduceOp.MIN)
    return agreed.item()


def decide_on_rank_0(decide: Callable[[], T]) -> T:
    """What ``decide`` returns on rank 0, on every rank; its MimRefinerError is raised on every rank.

    For all that may come out differently by process: files that are read, memory that is free, what was measured. The
    others do not call ``decide``, so it must not exchange anything; they wait for it, as after writing a file.
    """
    if not is_distributed():
        return decide()
    answer: Any = None
    if rank() == 0:
        try:
            answer = decide()
        except MimRefinerError as error:
            answer = error
    answer = from_rank_0(answer)
    if isinstance(answer, MimRefinerError):
        raise answer
    return answer


def end_together(stop: bool, error: MimRefinerError | None = None) -> None:
    """Raise on every rank the error that any of them met, or KeyboardInterrupt where any is to stop; by one number."""
    word = agree(2.0 if error else float(stop))
    if word == 2:
        raise next(found for found in from_ranks(error) if found)
    if word:
        raise KeyboardInterrupt


def from_rank_0(value: Any) -> Any:
    """Rank 0's value (anything that can be pickled) on every rank."""
    box = [value]
    if is_distributed():
        dist.broadcast_object_list(box, 0)
    return box[0]


def from_ranks(value: Any) -> list[Any]:
    """Every rank's value (anything that can be pickled), in rank order, on every rank."""
    values = [value] * world_size()
    if is_distributed():
        dist.all_gather_object(values, value)
    return values


def gather_rows(x: Tensor) -> Tensor:
    """Every rank's rows [N_r, ...] in rank order, on every rank; the numbers of rows may differ. Without gradient."""
    if not is_distributed():
        return x
    counts = from_ranks(len(x))
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: len(x)] = x
    return torch.cat([part[:count] for part, count in zip(all_gather(padded).chunk(len(counts)), counts, strict=True)])


# --- the rows of a step's batch that a forward pass holds


@dataclass(frozen=True)
class Rows:
    """Samples ``start`` to ``stop - 1`` of a step's ``total`` samples (of all processes together)."""

    start: int
    stop: int
    total: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        return self.count == self.total

    def part(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop - 1`` of these."""
        return Rows(self.start + start, self.start + stop, self.total)

    def take(self, drawn: Tensor) -> Tensor:
        """These rows [views*count, ...] of ``drawn`` [views*total, ...], view-major."""
        by_view = drawn.view(-1, self.total, *drawn.shape[1:])
        return by_view[:, self.start : self.stop].flatten(0, 1)


def process_rows(batch: int) -> Rows:
    """The rows of this process, of which every process has ``batch``."""
    return Rows(rank() * batch, (rank() + 1) * batch, world_size() * batch)


# Not a context variable: recomputation of activations happens in the threads of the backward pass.
_current: list[Rows | None] = [None]


def current_rows() -> Rows | None:
    """The rows that the running forward or backward pass holds; None: the whole batch."""
    return _current[0]


@contextmanager
def use_rows(rows: Rows) -> Iterator[None]:
    """Let random layers inside the block draw for the whole batch and take ``rows``."""
    before, _current[0] = _current[0], rows
    try:
        yield
    finally:
        _current[0] = before
