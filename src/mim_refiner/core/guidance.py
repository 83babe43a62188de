"""Guidance by partial labels: which neighbours an image may take where its label is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Guide:
    """``labels`` int64 [images], -1 where unknown.

    ``restrict``: neighbours are the nearest entries of the image's own class, where the queue has any; otherwise such
    entries come first among the nearest of all. Images without a label look up as ever.
    """

    labels: Tensor
    restrict: bool

    def same(self, row_ids: Tensor, entry_ids: Tensor) -> Tensor:
        """Whether entries are of another image of the row's class: bool [..., R, S] of ids [R] and [..., R or 1, S]."""
        own, images = self.labels[row_ids][:, None], entry_ids.clamp(min=0)
        known = (own >= 0) & (entry_ids >= 0)
        return known & (self.labels[images] == own) & (entry_ids != row_ids[:, None])

    def bar(self, similarity: Tensor, row_ids: Tensor, entry_ids: Tensor) -> Tensor:
        """``similarity`` [..., R, S] with what restriction rules out below every cosine."""
        if not self.restrict:
            return similarity
        same = self.same(row_ids, entry_ids)
        return similarity.masked_fill(same.any(-1, keepdim=True) & ~same, -2.0)

    def choose(self, ranked_ids: Tensor, row_ids: Tensor, drawn: Tensor | None) -> Tensor:
        """Which of the k nearest [..., R, k] each row takes, [..., R, 1]: one of its class if any is among them.

        ``drawn`` [..., R, 1] below k picks evenly among those in question; None takes the nearest.
        """
        same, k = self.same(row_ids, ranked_ids), ranked_ids.shape[-1]
        count = same.sum(-1, keepdim=True)
        order = (~same).to(torch.uint8).argsort(dim=-1, stable=True)  # those of the class first; as it is where none is
        of = torch.where(count > 0, count, k)
        return order.gather(-1, torch.zeros_like(count) if drawn is None else drawn * of // k)


def known_labels(labels: NDArray[np.int64], share: float, seed: int) -> Tensor:
    """``labels`` with all but a ``share`` of every class (one image at least) made -1, drawn from ``seed``."""
    rng, kept = np.random.default_rng(seed), np.full(len(labels), -1, dtype=np.int64)
    for number in np.unique(labels[labels >= 0]):
        rows = rng.permutation(np.flatnonzero(labels == number))
        kept[rows[: max(1, round(share * len(rows)))]] = number
    return torch.from_numpy(kept)
