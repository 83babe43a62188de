"""Nearest Neighbour Alignment, the loss of MIM-Refiner (arXiv 2402.10093, section 3).

Per head: p = predictor(projector(x)) of every view, t = stop-gradient(projector(x)) of the global views, and n the
queue entry nearest to t. Gradients are not stopped in here: pass targets and neighbours detached, as the head does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mim_refiner.core.collectives import rank
from mim_refiner.errors import InputError
from mim_refiner.reporting import number_of
from mim_refiner.types import NNAOutput

Gather = Callable[[Tensor], Tensor]  # [B, D] -> [world*B, D], rank order, with gradient
ViewPairing = Literal["cross", "reference"]


def nna_loss(
    predicted: Tensor,
    targets: Tensor,
    neighbors: Tensor,
    temperature: float,
    *,
    gather: Gather | None = None,
    swap_negatives: bool = False,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Return the NNA loss of one view pair; with p, t, n L2-normalised and j over the images of all ranks::

        L_i = -log exp(n_i . p_i / T) / [ exp(n_i . p_i / T) + sum_{j != i} exp(t_i . p_j / T) ]

    Only the positive uses the neighbour n; ``swap_negatives=True`` uses it for the negatives too (NNCLR).
    predicted, targets, neighbors: [B, D], not normalised; leading dimensions are broadcast (one pair each).
    ``gather`` (:func:`~mim_refiner.core.collectives.all_gather_with_grad`) adds the predictions of the other ranks as
    negatives; targets and neighbors stay the rows of this rank. Returns the mean, or [..., B] with "none".
    """
    p, t, n = (F.normalize(x, dim=-1) for x in (predicted, targets, neighbors))
    batch, candidates = p.shape[-2], p  # [..., world*B, D]
    own = torch.arange(batch, device=p.device)
    if gather is not None:  # one call on [B, (...)*D]
        rows_first = p.movedim(-2, 0)
        candidates = gather(rows_first.flatten(1)).reshape(-1, *rows_first.shape[1:]).movedim(0, -2)
        own += rank() * batch
    positive = (n * p).sum(-1, keepdim=True) / temperature  # [..., B, 1]
    logits = (n if swap_negatives else t) @ candidates.mT / temperature  # [..., B, world*B]
    logits = logits.scatter(-1, own[:, None].expand_as(positive), positive)
    losses = logits.logsumexp(-1) - positive.squeeze(-1)
    return losses.mean() if reduction == "mean" else losses


def multi_view_nna_loss(
    predicted: Tensor,
    targets: Tensor,
    neighbors: Tensor,
    temperature: float,
    *,
    gather: Gather | None = None,
    swap_negatives: bool = False,
    view_pairing: ViewPairing = "cross",
) -> NNAOutput:
    """Mean NNA loss over all pairs (target of a global view, prediction of another view).

    predicted: [V, B, D], the G global views first; targets, neighbors: [G, B, D]; with [K, ...] before all three the
    results are K numbers, each of its own loss. ``view_pairing``: "cross" pairs each
    global target with every other view, never its own; "reference" repeats the indexing of the published code
    (ml-jku/MIM-Refiner cc57423), see :func:`view_pair_weights`. ``alignment`` is the mean cosine of neighbour and
    prediction over the same pairs. Raises InputError when no pair exists or the shapes do not fit.
    """
    num_views, num_global = predicted.shape[-3], targets.shape[-3]
    fitting = *predicted.shape[:-3], num_global, *predicted.shape[-2:]
    if not targets.shape == neighbors.shape == fitting or temperature <= 0:
        raise InputError(
            f"NNA loss needs predicted [V,B,D], targets and neighbors [G,B,D] and a temperature above 0; got "
            f"{tuple(predicted.shape)}, {tuple(targets.shape)}, {tuple(neighbors.shape)} and {temperature}"
        )
    weights = view_pair_weights(num_global, num_views, view_pairing, predicted.device).to(predicted)
    losses = nna_loss(  # every pair at once: [..., G, V, B]
        predicted.unsqueeze(-4),
        targets.unsqueeze(-3),
        neighbors.unsqueeze(-3),
        temperature,
        gather=gather,
        swap_negatives=swap_negatives,
        reduction="none",
    )
    with torch.no_grad():
        cosine = torch.einsum("...gbd,...vbd->...gv", F.normalize(neighbors, dim=-1), F.normalize(predicted, dim=-1))
        alignment = (weights * cosine).sum((-2, -1)) / (weights.sum() * predicted.shape[-2])
    return NNAOutput(loss=(weights * losses.mean(-1)).sum((-2, -1)) / weights.sum(), alignment=alignment)


def view_pair_weights(
    num_global: int, num_views: int, view_pairing: ViewPairing = "cross", device: torch.device | None = None
) -> Tensor:
    """Return [G, V]: how often the pair (target of global view g, prediction of view v) counts.

    "cross": once, but never a view with itself. "reference": the published loop takes predictions 0..L-1 for its L
    local views, not G..V-1: same-view pairs count once, cross-global pairs twice, the last G local views never.
    """
    if not 1 <= num_global <= num_views or num_views < 2:
        raise InputError(
            f"NNA loss needs at least two views, the global ones first; got {number_of(num_views, 'views')} of which "
            f"{num_global} global: use 2 global views"
        )
    other = 1.0 - torch.eye(num_global, num_views, device=device)
    if view_pairing == "cross":
        return other
    if view_pairing == "reference":
        other[:, num_global:] = 0
        other[:, : num_views - num_global] += 1
        return other
    raise InputError(f"unknown view_pairing {view_pairing!r}; use 'cross' or 'reference'")
