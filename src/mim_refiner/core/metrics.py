"""Measures of features, clusterings and accuracy differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import t as student_t
from torch import Tensor

from mim_refiner.errors import InputError

Interval = tuple[float, float, float]  # value, lower and upper end of its 95 % interval
_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def standardized(x: Tensor, reference: Tensor | None = None) -> Tensor:
    """Features [N, D] as k-NN compares them: by dimension with the mean and (unbiased, + 1e-6) deviation of the
    reference, or of ``x`` itself, then of length one.
    """
    known = x if reference is None else reference
    deviation = known.std(0, correction=min(1, len(known) - 1))
    return F.normalize((x - known.mean(0)) / (deviation + 1e-6), dim=1)


def clustering_accuracy(y_true: ArrayLike | Tensor, y_pred: ArrayLike | Tensor) -> float:
    """Share of samples (0-1) right under the best one-to-one map of clusters to classes (Hungarian algorithm).

    Labels may be any integers; with more clusters than classes the surplus clusters count as wrong.
    Raises InputError when the two have no samples or different lengths.
    """
    return float(clustering_hits(y_true, y_pred).mean())


def clustering_hits(y_true: ArrayLike | Tensor, y_pred: ArrayLike | Tensor) -> NDArray[np.bool_]:
    """Which samples [N] are right under that map."""
    truth, predicted = _array(y_true), _array(y_pred)
    if len(truth) != len(predicted) or len(truth) == 0:
        raise InputError(f"clustering needs equally many classes and clusters, got {len(truth)} and {len(predicted)}")
    classes, truth = np.unique(truth, return_inverse=True)
    clusters, predicted = np.unique(predicted, return_inverse=True)
    counts = np.zeros((len(clusters), len(classes)), dtype=np.int64)
    np.add.at(counts, (predicted, truth), 1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    mapped = np.full(len(clusters), -1)
    mapped[rows] = columns
    return np.equal(mapped[predicted], truth)


@torch.no_grad()
def effective_rank(features: Tensor, *, centred: bool = False) -> float:
    """RankMe (Garrido et al., ICML 2023) of features [N, D]: exp of the entropy of the singular values, 1 to min(N, D).

    As published without centring, so that a mean far from zero counts as one large direction; ``centred`` takes the
    mean off first. Computed in float64; 0.0 for features that are all zero. Raises InputError for NaN or infinity.
    """
    if features.ndim != 2 or not bool(torch.isfinite(features).all()):
        raise InputError(f"effective rank needs finite features [N, D], got shape {tuple(features.shape)}")
    x = features.double()
    singular = torch.linalg.svdvals(x - x.mean(0) if centred and len(x) else x)
    if not singular.numel() or float(singular.sum()) == 0:
        return 0.0
    share = singular / singular.sum()
    return math.exp(float(-torch.xlogy(share, share).sum()))


def accuracy_interval(correct: ArrayLike | Tensor) -> Interval:
    """Return (accuracy, low, high): 95 % Wilson score interval for independent samples ``correct`` [N] of 0/1."""
    hits = _zero_one(correct)
    n, rate = len(hits), float(hits.mean())
    centre = (rate + _Z95**2 / (2 * n)) / (1 + _Z95**2 / n)
    half = _Z95 / (1 + _Z95**2 / n) * math.sqrt(rate * (1 - rate) / n + _Z95**2 / (4 * n * n))
    # the formula may miss an accuracy of 0 or 1 by the last bit
    return rate, min(rate, max(0.0, centre - half)), max(rate, min(1.0, centre + half))


def paired_interval(correct_before: ArrayLike | Tensor, correct_after: ArrayLike | Tensor) -> Interval:
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


def crossed_interval(values: ArrayLike | Tensor) -> Interval:
    """Return (mean, low, high), 95 %, of ``values`` [S, N]: S draws of training images, judged on N test images.

    Both are random: the variance is that of the image means over N plus that of the draw means over S (two-way random
    effects; a little conservative), the degrees of freedom are Satterthwaite's. With S = 1 only the test images count.
    Values may be 0/1 or differences of such (a paired comparison). Raises InputError for an empty or 1-d array.
    """
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise InputError(f"a crossed interval needs values [draws, images], got shape {array.shape}")
    draws, images = array.shape
    of_images = array.mean(0).var(ddof=1) / images if images > 1 else 0.0
    of_draws = array.mean(1).var(ddof=1) / draws if draws > 1 else 0.0
    variance, mean = of_images + of_draws, float(array.mean())
    if variance == 0:
        return mean, mean, mean
    freedom = variance**2 / (of_images**2 / max(1, images - 1) + of_draws**2 / max(1, draws - 1))
    half = float(student_t.ppf(0.975, freedom)) * math.sqrt(variance)
    return mean, mean - half, mean + half


def best_of_many_interval(differences: ArrayLike, *, draws: int = 5000, seed: int = 0) -> Interval:
    """Return (mean, low, high), 95 %, of the row with the largest mean of paired ``differences`` [K, N] in -1 to 1.

    It allows for that row being the best of K: the width is that of simultaneous intervals for all K means (max-t:
    Hothorn, Bretz and Westfall, Biometrical Journal 50, 2008), with the correlations of the rows. One gain and one
    loss are added to each row, as in :func:`paired_interval`, so that few images give no interval of zero width.
    """
    rows = np.asarray(differences, dtype=np.float64)
    ends = np.broadcast_to([1.0, -1.0], (len(rows), 2))
    padded = np.concatenate([rows, ends], axis=1)
    error = padded.std(1) / math.sqrt(padded.shape[1])
    drawn = np.random.default_rng(seed).multivariate_normal(
        np.zeros(len(rows)), np.atleast_2d(np.corrcoef(padded)), draws, method="eigh"
    )
    best = int(rows.mean(1).argmax())
    half = float(np.quantile(np.abs(drawn).max(1), 0.95) * error[best])
    centre = float(padded[best].mean())
    return float(rows[best].mean()), max(centre - half, -1.0), min(centre + half, 1.0)


def mean_iou(confusion: ArrayLike) -> float:
    """Mean over classes of intersection / union, from pixel counts [..., C (truth), C (predicted)] in sum, without
    classes that neither occur nor are predicted; 0.0 when there is none.
    """
    ratios = class_iou(np.asarray(confusion))
    return float(np.nanmean(ratios)) if np.isfinite(ratios).any() else 0.0


def class_iou(confusion: NDArray[Any]) -> NDArray[np.float64]:
    """Intersection / union of every class [C]; NaN where the union is empty."""
    counts = confusion.reshape(-1, *confusion.shape[-2:]).sum(0).astype(np.float64)
    shared = np.diagonal(counts)
    union = counts.sum(0) + counts.sum(1) - shared
    return np.divide(shared, union, out=np.full(len(union), np.nan), where=union > 0)


def mean_iou_interval(
    confusions: ArrayLike, minus: ArrayLike | None = None, *, resamples: int = 1000, seed: int = 0
) -> Interval:
    """(mIoU, low, high): 95 % bootstrap interval over images, from pixel counts [N, C, C] of each image; with ``minus``
    (the counts of another model on the same images) of the paired difference to it.
    """
    first = np.asarray(confusions, dtype=np.float64)
    pair = [first] if minus is None else [first, np.asarray(minus, dtype=np.float64)]
    if first.ndim != 3 or not len(first) or any(counts.shape != first.shape for counts in pair):
        raise InputError(f"an mIoU interval needs pixel counts [images, classes, classes], got {first.shape}")
    rng, count = np.random.default_rng(seed), len(first)

    def value(weights: NDArray[Any]) -> float:
        scores = [mean_iou(np.tensordot(weights, counts, 1)) for counts in pair]
        return scores[0] - (scores[1] if len(scores) == 2 else 0.0)

    drawn = [value(rng.multinomial(count, np.full(count, 1 / count))) for _ in range(resamples)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return value(np.ones(count)), float(low), float(high)


def _array(values: ArrayLike | Tensor) -> NDArray[Any]:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values).reshape(-1)


def _zero_one(values: ArrayLike | Tensor) -> NDArray[np.float64]:
    array = _array(values)
    if len(array) == 0 or not np.isin(array, (0, 1)).all():
        raise InputError("an accuracy interval needs at least one sample and values that are 0 or 1")
    return array.astype(np.float64)
