"""Weighted k-nearest-neighbour classification on features (method section 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from mim_refiner.core.search import Bank, nearest, search_dtype
from mim_refiner.errors import InputError
from mim_refiner.reporting import number_of


@torch.no_grad()
def knn_predict(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    k: int = 10,
    temperature: float = 0.07,
    standardize: bool = True,
    chunk_size: int = 16384,
) -> Tensor:
    """The predicted classes [M] of test_x [M, D] from train_x [N, D] with classes train_y [N].

    Features (of any float type, half precision too) are standardised by the mean and unbiased standard deviation
    (+ 1e-6) of the train features and L2-normalised; the k nearest by cosine vote with weight exp(cosine /
    temperature); ties go to the smallest class. ``temperature=inf`` is a plain majority vote.
    ``chunk_size`` test rows share one pass over the train rows; beside the inputs they cost 6 D bytes a row and about
    100 MB in all. It changes no prediction. Raises InputError when k exceeds N or shapes do not fit.
    """
    _check(train_x, train_y, test_x, k, temperature, chunk_size)
    if not len(test_x):
        return train_y.new_empty(0)
    bank = Bank.of(train_x, standardize)
    indices, cosines = nearest(bank, test_x, k, dtype=search_dtype(train_x), chunk_size=chunk_size)
    num_classes = int(train_y.max()) + 1
    predictions = []
    for near, cosine in zip(indices.split(chunk_size), cosines.split(chunk_size), strict=True):
        # the factor exp(-max / temperature) cancels in the argmax and avoids overflow at low temperatures
        weights = ((cosine - cosine[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(near), num_classes).scatter_add_(1, train_y[near], weights)
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def _check(train_x: Tensor, train_y: Tensor, test_x: Tensor, k: int, temperature: float, chunk_size: int) -> None:
    if train_x.ndim != 2 or test_x.ndim != 2 or train_x.shape[1] != test_x.shape[1]:
        raise InputError(f"k-NN needs features [N, D] and [M, D], got {tuple(train_x.shape)} and {tuple(test_x.shape)}")
    if train_y.shape != train_x.shape[:1] or train_y.is_floating_point() or (len(train_y) and int(train_y.min()) < 0):
        raise InputError(f"k-NN needs one class number >= 0 per train row, got labels of shape {tuple(train_y.shape)}")
    if not 1 <= k <= len(train_x):
        most = f"{len(train_x)} or less" if len(train_x) > 1 else "1"
        raise InputError(f"k-NN: k is {k}, with {number_of(len(train_x), 'train images')}; set knn_k to {most}")
    if not temperature > 0 or chunk_size < 1:
        raise InputError(
            f"k-NN: temperature must be above 0 and chunk_size at least 1, got {temperature}, {chunk_size}"
        )
