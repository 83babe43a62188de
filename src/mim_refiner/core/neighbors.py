"""The queue of past projections in which a head looks up nearest neighbours (arXiv 2402.10093, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim_refiner.core.guidance import Guide
from mim_refiner.core.run import send
from mim_refiner.errors import InputError
from mim_refiner.types import NeighborResult

_MAX_SIMILARITIES = 2**25  # similarities held at once (128 MiB in float32)


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
        rows = z.shape[0]
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise InputError(f"queue: look-up needs rows of width {self.dim}, got shape {tuple(z.shape)}")
        row_ids = self._row_ids(sample_ids, rows) if exclude_same and sample_ids is not None else None
        queries = F.normalize(z.to(self.entries.dtype), dim=1)
        keys = F.normalize(self.entries, dim=1).T
        step = max(1, _MAX_SIMILARITIES // self.size)
        nearest: list[tuple[Tensor, Tensor]] = []
        for start in range(0, rows, step):
            similarity = queries[start : start + step] @ keys
            if row_ids is not None:
                similarity.masked_fill_(row_ids[start : start + step, None] == self.sample_ids, -1.0)
                if self.guide is not None:
                    similarity = self.guide.bar(similarity, row_ids[start : start + step], self.sample_ids)
            # max is much faster than topk on CPU
            best = similarity.max(1, keepdim=True) if self.top_k == 1 else similarity.topk(self.top_k, dim=1)
            nearest.append((best[0], best[1]))
        ranked_similarity, ranked = torch.cat([b[0] for b in nearest]), torch.cat([b[1] for b in nearest])
        drawn = self.draw(rows, generator) if choice is None else choice.view(rows, 1)
        if drawn is not None:
            drawn = send([drawn], z.device)[0] if drawn.device.type == "cpu" else drawn
        if self.guide is not None and row_ids is not None:
            drawn = self.guide.choose(self.sample_ids[ranked], row_ids, drawn)
        if drawn is not None:
            ranked, ranked_similarity = ranked.gather(1, drawn), ranked_similarity.gather(1, drawn)
        indices, similarity = ranked[:, 0], ranked_similarity[:, 0]
        return NeighborResult(self.entries[indices], indices, similarity, self.age[indices])

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

    def _row_ids(self, sample_ids: Tensor, rows: int) -> Tensor:
        if sample_ids.ndim != 1 or len(sample_ids) == 0 or rows % len(sample_ids):
            raise InputError(
                f"queue: {rows} rows to look up must be a whole number of views of sample_ids {tuple(sample_ids.shape)}"
            )
        return sample_ids.to(self.sample_ids).repeat(rows // len(sample_ids))

    def draw(self, rows: int, generator: torch.Generator | None = None) -> Tensor | None:
        """Draw which of the top_k neighbours each row takes, [rows, 1]; None where there is no choice."""
        if self.top_k == 1:
            return None
        device = "cpu" if generator is None else generator.device
        return torch.randint(self.top_k, (rows, 1), generator=generator, device=device)

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}, top_k={self.top_k}"
