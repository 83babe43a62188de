"""The queue of past projections in which a head looks up nearest neighbours (arXiv 2402.10093, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim_refiner.core.guidance import Guide
from mim_refiner.core.run import ONE_BY_ONE, send
from mim_refiner.errors import InputError
from mim_refiner.types import NeighborResult

_MAX_SIMILARITIES = 2**25  # held at once (128 MiB in float32)
_MAX_ENTRIES = 2**25  # numbers in the queues that are looked through at once


class NeighborQueue(nn.Module):
    """First-in-first-out queue of ``size`` un-normalised entries of width ``dim``.

    ``top_k`` = 1 takes the nearest entry, more draws uniformly among the k nearest; it may be changed at any time.
    Buffers, all in the state dict: ``entries`` [size, dim], random-normal at the start; ``sample_ids`` [size], -1 for
    start entries; ``age`` [size], samples enqueued since and including the entry's own batch; ``pointer`` [1], next
    slot to write. Look up first, then enqueue.
    """

    entries: Tensor
    sample_ids: Tensor
    age: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int, *, top_k: int = 1) -> None:
        super().__init__()
        if not 1 <= top_k <= size:
            raise InputError(f"queue: top_k must be between 1 and the queue size {size}, got {top_k}")
        self.size, self.dim, self.top_k = size, dim, top_k
        self.guide: Guide | None = None  # may be set at any time; part of no state
        self.register_buffer("entries", torch.randn(size, dim))
        self.register_buffer("sample_ids", torch.full((size,), -1, dtype=torch.long))
        self.register_buffer("age", torch.zeros(size, dtype=torch.long))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def lookup(
        self,
        z: Tensor,
        sample_ids: Tensor | None = None,
        *,
        exclude_same: bool = True,
        generator: torch.Generator | None = None,
        choice: Tensor | None = None,
    ) -> NeighborResult:
        """Return a near entry by cosine for every row of z [R, D]; changes nothing.

        sample_ids: [B] with R = G*B rows view-major; with ``exclude_same`` entries of the same sample count as
        similarity -1. Without ids nothing is excluded. For top_k > 1 the rank of the neighbour is drawn from
        ``generator`` (any device) or replayed from ``choice`` [R] or [R, 1]. Raises InputError when shapes do not fit.
        """
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise InputError(f"queue: look-up needs rows of width {self.dim}, got shape {tuple(z.shape)}")
        drawn = self.draw(len(z), generator) if choice is None else choice
        if drawn is not None and drawn.device.type == "cpu":
            drawn = send([drawn], z.device)[0]
        choices = None if drawn is None else drawn.view(1, -1)
        found = look_up([self], z[None], sample_ids if exclude_same else None, choices)
        return NeighborResult(found.neighbors[0], found.indices[0], found.similarity[0], found.age[0])

    @torch.no_grad()
    def enqueue(self, z: Tensor, sample_ids: Tensor) -> None:
        """Overwrite the oldest entries with z [B, D] of the samples ``sample_ids`` [B].

        In a distributed run pass the gathered rows of all ranks in rank order, so that all queues stay equal.
        Raises InputError for a batch larger than the queue, or shapes that do not fit.
        """
        batch = z.shape[0]
        if batch > self.size:
            raise InputError(
                f"queue: a batch of {batch} samples does not fit into a queue of {self.size}; "
                f"use a smaller batch or a queue_size of at least {batch}"
            )
        if z.shape != (batch, self.dim) or sample_ids.shape != (batch,):
            raise InputError(
                f"queue: enqueue needs z [B, {self.dim}] and sample_ids [B], "
                f"got {tuple(z.shape)} and {tuple(sample_ids.shape)}"
            )
        slots = (self.pointer + torch.arange(batch, device=self.pointer.device)) % self.size
        self.entries.index_copy_(0, slots, z.to(self.entries))
        self.sample_ids.index_copy_(0, slots, sample_ids.to(self.sample_ids))
        self.age.index_fill_(0, slots, 0).add_(batch)
        self.pointer.add_(batch).remainder_(self.size)

    def draw(self, rows: int, generator: torch.Generator | None = None) -> Tensor | None:
        """Draw which of the top_k neighbours each row takes, [rows, 1]; None where there is no choice."""
        if self.top_k == 1:
            return None
        device = "cpu" if generator is None else generator.device
        return torch.randint(self.top_k, (rows, 1), generator=generator, device=device)


@torch.no_grad()
def look_up(
    queues: Sequence[NeighborQueue], z: Tensor, sample_ids: Tensor | None = None, choices: Tensor | None = None
) -> NeighborResult:
    """Near entries of K queues, equal in size and top_k, for rows z [K, R, D]; every field is [K, R, ...].

    sample_ids: [B] with R = G*B rows view-major, whose own entries are excluded; None: none is. choices [K, R]: which
    of the top_k neighbours a row takes. Raises InputError when shapes do not fit.
    """
    one, rows = queues[0], z.shape[1]
    most = 1 if z.device.type in ONE_BY_ONE else max(1, _MAX_ENTRIES // one.entries.numel())
    if len(queues) > most:
        parts = [slice(start, start + most) for start in range(0, len(queues), most)]
        found = [look_up(queues[p], z[p], sample_ids, None if choices is None else choices[p]) for p in parts]
        return NeighborResult(*(torch.cat([vars(each)[name] for each in found]) for name in vars(found[0])))
    held = [[getattr(queue, name) for queue in queues] for name in ("entries", "sample_ids", "age")]
    entries, ids, ages = (torch.stack(each) if len(each) > 1 else each[0][None] for each in held)  # one is not copied
    row_ids = None
    if sample_ids is not None:
        if sample_ids.ndim != 1 or len(sample_ids) == 0 or rows % len(sample_ids):
            raise InputError(
                f"queue: {rows} rows to look up must be a whole number of views of sample_ids {tuple(sample_ids.shape)}"
            )
        row_ids = sample_ids.to(ids).repeat(rows // len(sample_ids))
    queries, keys = F.normalize(z.to(entries.dtype), dim=2), F.normalize(entries, dim=2).mT
    step = max(1, _MAX_SIMILARITIES // (len(queues) * one.size))
    nearest: list[tuple[Tensor, Tensor]] = []
    for start in range(0, rows, step):
        similarity = queries[:, start : start + step] @ keys
        if row_ids is not None:
            some = row_ids[start : start + step]
            similarity.masked_fill_(some[:, None] == ids[:, None], -1.0)
            if one.guide is not None:
                similarity = one.guide.bar(similarity, some, ids[:, None])
        # max is much faster than topk on CPU
        best = similarity.max(2, keepdim=True) if one.top_k == 1 else similarity.topk(one.top_k, dim=2)
        nearest.append((best[0], best[1]))
    similarity, indices = (torch.cat(part, dim=1) if len(part) > 1 else part[0] for part in zip(*nearest, strict=True))
    drawn = None if choices is None else choices[:, :, None]
    if one.guide is not None and row_ids is not None:
        ranked_ids = ids.gather(1, indices.flatten(1)).view_as(indices)
        drawn = one.guide.choose(ranked_ids, row_ids, drawn)
    if drawn is not None:
        similarity, indices = (part.gather(2, drawn) for part in (similarity, indices))
    neighbors = entries.gather(1, indices[:, :, :1].expand(-1, -1, one.dim))
    indices = indices[:, :, 0]
    return NeighborResult(neighbors, indices, similarity[:, :, 0], ages.gather(1, indices))
