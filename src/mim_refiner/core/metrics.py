"""Measures of features, clusterings and accuracy differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from mim_refiner.errors import InputError

_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def clustering_accuracy(y_true: ArrayLike | Tensor, y_pred: ArrayLike | Tensor) -> float:
    """Share of samples (0-1) right under the best one-to-one map of clusters to classes (Hungarian algorithm).

    Labels may be any integers; with more clusters than classes the surplus clusters count as wrong.
    Raises InputError when the two have no samples or different lengths.
    """
    truth, predicted = _same_length(y_true, y_pred)
    classes, truth = np.unique(truth, return_inverse=True)
    clusters, predicted = np.unique(predicted, return_inverse=True)
    counts = np.zeros((len(clusters), len(classes)), dtype=np.int64)
    np.add.at(counts, (predicted, truth), 1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, columns].sum() / len(truth))


def normalized_mutual_information(y_true: ArrayLike | Tensor, y_pred: ArrayLike | Tensor) -> float:
    """Mutual information of classes and clusters over the mean of their entropies (0-1)."""
    truth, predicted = _same_length(y_true, y_pred)
    return float(normalized_mutual_info_score(truth, predicted))


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """RankMe (Garrido et al., ICML 2023) of features [N, D]: exp of the entropy of the singular values, 1 to min(N, D).

    Computed in float64, without centring; 0.0 for features that are all zero. Raises InputError for NaN or infinity.
    """
    if features.ndim != 2 or not bool(torch.isfinite(features).all()):
        raise InputError(f"effective rank needs finite features [N, D], got shape {tuple(features.shape)}")
    singular = torch.linalg.svdvals(features.double())
    if not singular.numel() or float(singular.sum()) == 0:
        return 0.0
    share = singular / singular.sum()
    return math.exp(float(-torch.xlogy(share, share).sum()))


def accuracy_interval(correct: ArrayLike | Tensor) -> tuple[float, float, float]:
    """Return (accuracy, low, high): 95 % Wilson score interval for independent samples ``correct`` [N] of 0/1."""
    hits = _zero_one(correct)
    n, rate = len(hits), float(hits.mean())
    centre = (rate + _Z95**2 / (2 * n)) / (1 + _Z95**2 / n)
    half = _Z95 / (1 + _Z95**2 / n) * math.sqrt(rate * (1 - rate) / n + _Z95**2 / (4 * n * n))
    return rate, max(0.0, centre - half), min(1.0, centre + half)


def paired_interval(
    correct_before: ArrayLike | Tensor, correct_after: ArrayLike | Tensor
) -> tuple[float, float, float]:
    """Return (difference, low, high) of the accuracies after - before on the same N samples, with a 95 % interval.

    Adjusted Wald interval for paired proportions (Bonett and Price, J. Educ. Behav. Stat. 37, 2012): normal
    approximation on the two kinds of changed samples, each count raised by one; never of zero width.
    The samples of the test set are the only randomness it covers, not the seeds of training.
    """
    before, after = _zero_one(correct_before), _zero_one(correct_after)
    if len(before) != len(after):
        raise InputError(f"paired interval needs the same samples twice, got {len(before)} and {len(after)}")
    n = len(before)
    gained, lost = float((after > before).sum()), float((after < before).sum())
    p_gained, p_lost = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    centre = p_gained - p_lost
    half = _Z95 * math.sqrt((p_gained + p_lost - centre**2) / (n + 2))
    return (gained - lost) / n, max(-1.0, centre - half), min(1.0, centre + half)


def _array(values: ArrayLike | Tensor) -> NDArray[Any]:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values).reshape(-1)


def _zero_one(values: ArrayLike | Tensor) -> NDArray[np.float64]:
    array = _array(values)
    if len(array) == 0 or not np.isin(array, (0, 1)).all():
        raise InputError("an accuracy interval needs at least one sample and values that are 0 or 1")
    return array.astype(np.float64)


def _same_length(y_true: ArrayLike | Tensor, y_pred: ArrayLike | Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    truth, predicted = _array(y_true), _array(y_pred)
    if len(truth) != len(predicted) or len(truth) == 0:
        raise InputError(f"clustering needs equally many classes and clusters, got {len(truth)} and {len(predicted)}")
    return truth, predicted
