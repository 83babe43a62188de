"""Weighted k-nearest-neighbour classification on features (method section 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mim_refiner.errors import InputError

_BLOCK = 128  # test rows per matrix product; fixed, so that no result depends on chunk_size


@torch.no_grad()
def knn_predict(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    k: int = 10,
    temperature: float = 0.07,
    standardize: bool = True,
    chunk_size: int = 1024,
) -> Tensor:
    """Return the predicted classes [M] of test_x [M, D] from train_x [N, D] with classes train_y [N].

    Features are standardised by the mean and unbiased standard deviation (+ 1e-6) of the train features and
    L2-normalised; the k nearest by cosine vote with weight exp(cosine / temperature); ties go to the smallest class.
    ``temperature=inf`` is a plain majority vote. ``chunk_size`` bounds memory (N similarities per row) and never
    changes the result. Raises InputError when k exceeds N or shapes do not fit.
    """
    _check(train_x, train_y, test_x, k, temperature, chunk_size)
    if standardize:
        mean, std = train_x.mean(0), train_x.std(0) + 1e-6
        train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    train_x, test_x = F.normalize(train_x, dim=1), F.normalize(test_x, dim=1)
    num_classes = int(train_y.max()) + 1
    rows = max(1, chunk_size // _BLOCK) * _BLOCK
    predictions = train_y.new_empty(len(test_x))
    for start in range(0, len(test_x), rows):
        part = slice(start, start + rows)
        predictions[part] = _vote(train_x, train_y, test_x[part], k, temperature, num_classes)
    return predictions


def _vote(train_x: Tensor, train_y: Tensor, queries: Tensor, k: int, temperature: float, num_classes: int) -> Tensor:
    similarity, neighbors = _similarities(queries, train_x).topk(k, dim=1)
    # the factor exp(-max / temperature) cancels in the argmax and avoids overflow at low temperatures
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = weights.new_zeros(len(queries), num_classes).scatter_add_(1, train_y[neighbors], weights)
    return votes.argmax(1)


def _similarities(queries: Tensor, train_x: Tensor) -> Tensor:
    """[M, D] x [N, D] -> [M, N] in products of _BLOCK rows: rounding depends on the shape of the product."""
    result = queries.new_empty(len(queries), len(train_x))
    for start in range(0, len(queries), _BLOCK):
        torch.mm(queries[start : start + _BLOCK], train_x.T, out=result[start : start + _BLOCK])
    return result


def _check(train_x: Tensor, train_y: Tensor, test_x: Tensor, k: int, temperature: float, chunk_size: int) -> None:
    if train_x.ndim != 2 or test_x.ndim != 2 or train_x.shape[1] != test_x.shape[1]:
        raise InputError(f"k-NN needs features [N, D] and [M, D], got {tuple(train_x.shape)} and {tuple(test_x.shape)}")
    if train_y.shape != train_x.shape[:1] or train_y.is_floating_point() or (len(train_y) and int(train_y.min()) < 0):
        raise InputError(f"k-NN needs one class number >= 0 per train row, got labels of shape {tuple(train_y.shape)}")
    if not 1 <= k <= len(train_x):
        raise InputError(f"k-NN: k must be between 1 and the {len(train_x)} train samples, got {k}")
    if not temperature > 0 or chunk_size < 1:
        raise InputError(
            f"k-NN: temperature must be above 0 and chunk_size at least 1, got {temperature}, {chunk_size}"
        )
