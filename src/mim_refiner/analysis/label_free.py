"""How good features are, without a label: four measures of one encoder, with what a paired comparison needs.

Neighbour consistency, view retrieval and effective rank decide (``verdict.py``); cluster stability has no say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from mim_refiner.core.device import in_float64
from mim_refiner.core.metrics import accuracy_interval, effective_rank, paired_interval, standardized
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import Indices, decoded_batches
from mim_refiner.data.photometric import BatchPhotometric, seeded_generator
from mim_refiner.data.views import ViewSpec, crop_batch, draws
from mim_refiner.evaluation.clustering import fitting
from mim_refiner.evaluation.features import CENTRE_CROP, Features, ImageTransform, feature_sets
from mim_refiner.models.backbone import Backbone
from mim_refiner.types import ImageSize, height_width

_ROWS = 1024  # rows of one similarity product


@dataclass(frozen=True)
class LabelFreeMeasures:
    """Measures of one encoder on N images; arrays are per image [N] or per pair of clusterings [P]."""

    consistency: NDArray[np.float64]  # [N] share of neighbours that two views of an image have in common
    retrieval: NDArray[np.float64]  # [N] 0, 0.5 or 1: each view's nearest among the other views is its partner
    stability: NDArray[np.float64]  # [P] adjusted Rand index of clusterings of different halves
    features: Tensor  # [N, D] of the images as they are; effective rank is computed from them

    def summary(self) -> dict[str, float]:
        """One number for each measure."""
        return {
            "neighbour consistency": float(self.consistency.mean()),
            "view retrieval": float(self.retrieval.mean()),
            "effective rank": effective_rank(self.features),
            "effective rank, centred": effective_rank(self.features, centred=True),
            "cluster stability": float(self.stability.mean()),
        }


def label_free_measures(
    clean: Tensor, first: Tensor, second: Tensor, *, pairs: int = 10, seed: int
) -> LabelFreeMeasures:
    """Measure features [N, D] of the images as they are and of two random views of each; of ``MIN_IMAGES`` or more."""
    return LabelFreeMeasures(
        neighbor_consistency(clean, first, second),
        view_retrieval(clean, first, second),
        cluster_stability(clean, pairs=pairs, seed=seed),
        clean,
    )


MIN_IMAGES = 20


@torch.no_grad()
def neighbor_consistency(clean: Tensor, first: Tensor, second: Tensor, *, neighbors: int = 10) -> NDArray[np.float64]:
    """Share [N] of the ``neighbors`` nearest images that both views of an image agree on.

    Neighbours are looked up by cosine among the features ``clean`` [N, D] of the other images, everything standardised
    by the mean and deviation of ``clean``. Chance is about neighbors / N; where all features are equal there are none.
    """
    count = min(neighbors, max(1, (len(clean) - 1) // 2))
    gallery, one, two = _prepared(clean, first, second)
    shares = []
    told = (gallery.any() & one.any(1) & two.any(1)).cpu().numpy()
    for start in range(0, len(gallery), _ROWS):
        products = [x[start : start + _ROWS] @ gallery.T for x in (one, two)]
        for each in products:
            each.diagonal(start).fill_(-2)  # the own one
        a, b = (each.topk(count, dim=1).indices for each in products)
        shares.append((a[:, :, None] == b[:, None, :]).any(2).cpu().double().mean(1))
    return torch.cat(shares).numpy() * told


@torch.no_grad()
def view_retrieval(clean: Tensor, first: Tensor, second: Tensor) -> NDArray[np.float64]:
    """[N]: how often the nearest of all second views is the own one, and the nearest of all first views, averaged."""
    _, one, two = _prepared(clean, first, second)
    hits = torch.zeros(len(one), dtype=torch.float64)
    for queries, gallery in ((one, two), (two, one)):
        for start in range(0, len(queries), _ROWS):
            nearest = (queries[start : start + _ROWS] @ gallery.T).argmax(1).cpu()
            hits[start : start + _ROWS] += 0.5 * (nearest == torch.arange(start, start + len(nearest)))
    return hits.numpy()


def cluster_stability(x: Tensor, *, clusters: int = 20, pairs: int = 10, seed: int = 0) -> NDArray[np.float64]:
    """Adjusted Rand index [P] of two k-means clusterings of all N images, each fitted on one half of them.

    Pair p splits the images by (seed, p): the same halves for every encoder, so that differences are paired by p.
    """
    k = min(clusters, len(x) // 4)
    points = standardized(x).double().cpu().numpy().astype(np.float32)
    scores = []
    with fitting(points.size * k):
        for pair in range(pairs):
            order = np.random.default_rng([seed, pair]).permutation(len(points))
            found = [
                KMeans(k, n_init=1, max_iter=30, random_state=2 * pair + side).fit(points[part]).predict(points)
                for side, part in enumerate(np.split(order, [len(points) // 2]))
            ]
            scores.append(adjusted_rand_score(*found))
    return np.asarray(scores)


def distinct_rows(x: Tensor) -> int:
    """How many of the features [N, D] differ from all before them, by more than rounding."""
    x = x.double()
    near = torch.cdist(x, x) <= 1e-4 * x.norm(dim=1).mean()
    return len(x) - int(near.tril(-1).any(1).sum())


def dense_drift(before: Tensor, after: Tensor) -> NDArray[np.float64]:
    """[B]: 1 - mean cosine of the patch features [B, N, D] of two encoders; 0 for the same, about 1 for unrelated."""
    return (1 - F.cosine_similarity(in_float64(before), in_float64(after), dim=2).mean(1)).cpu().numpy()


def bootstrap_interval(
    statistic: Callable[[NDArray[np.int64]], float], count: int, *, replicates: int = 1000, seed: int = 0
) -> tuple[float, float, float, NDArray[np.float64]]:
    """(value, low, high, replicates [R]): percentile bootstrap at 95 % of ``statistic(rows)`` over ``count`` images.

    The statistic gets row numbers drawn with replacement; one that looks up two encoders by the same rows is paired.
    """
    rng = np.random.default_rng(seed)
    drawn = np.array([statistic(rng.integers(0, count, count)) for _ in range(replicates)])
    low, high = np.quantile(drawn, (0.025, 0.975))
    return statistic(np.arange(count)), float(low), float(high), drawn


def paired_scores(
    before: NDArray[np.float64], after: NDArray[np.float64], *, seed: int = 0
) -> tuple[float, float, float]:
    """(mean difference after - before, low, high) of per-image scores [N] of the same images, at 95 %.

    0/1 scores by the formula for paired proportions (``core.metrics.paired_interval``), shares by the bootstrap.
    """
    if np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all():
        return paired_interval(before, after)
    return paired_means(before, after, seed=seed)


def paired_means(before: NDArray[Any], after: NDArray[Any], *, seed: int = 0) -> tuple[float, float, float]:
    """(mean difference after - before, low, high) of any per-image values [N], by the bootstrap."""
    difference = after - before
    return bootstrap_interval(lambda rows: float(difference[rows].mean()), len(difference), seed=seed)[:3]


def score_interval(scores: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of the mean of per-image scores [N]: Wilson's for 0/1, the normal approximation for shares."""
    if np.isin(scores, (0, 1)).all():
        return accuracy_interval(scores)[1:]
    half = 1.96 * float(scores.std()) / len(scores) ** 0.5
    return float(scores.mean()) - half, float(scores.mean()) + half


def rank_of_rows(x: Tensor, *, centred: bool = False) -> Callable[[NDArray[np.int64]], float]:
    """``effective_rank`` of chosen rows of ``x`` [N, D] (repetition allowed), from D x D products: quick enough to
    bootstrap.
    """
    x = x.double()

    def rank(rows: NDArray[np.int64]) -> float:
        weights = torch.from_numpy(np.bincount(rows, minlength=len(x))).double()
        mean = weights @ x / weights.sum()
        product = x.T @ (weights[:, None] * x) - centred * weights.sum() * torch.outer(mean, mean)
        squares = torch.linalg.eigvalsh(product).clamp(min=0)
        share = squares.sqrt() / squares.sqrt().sum()
        return float(torch.exp(-torch.xlogy(share, share).sum())) if squares.any() else 0.0

    return rank


def _prepared(clean: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return standardized(clean), standardized(first, clean), standardized(second, clean)


# --- two random views of the same images, as inputs of the same extraction (and cache) as all other features

# Crops of at least 40 % of the area and the paper's colour changes: strong enough that a copy of the pixels is no
# help, mild enough that both views mostly show the same thing.
VIEW = ViewSpec("label-free", 1, scale=(0.4, 1.0), gray_prob=0.2, blur_prob=0.25, blur_sigma=(0.1, 1.0))
BLUR_REFERENCE = 32  # pixels; the blur grows with the image


class PairedViews(NamedTuple):
    """Features of the images as they are, and of two random views of each; rows correspond. Keys: norm applied?"""

    clean: Mapping[bool, Features]
    first: Mapping[bool, Features]
    second: Mapping[bool, Features]


def paired_views(backbone: Backbone, images: ImageSet, run: Run, *, what: str = "", **options: Any) -> PairedViews:
    """Features of the centre crop and of two random views, one forward pass each.

    ``options`` go to ``feature_sets`` (blocks, poolings, norms, indices, image_size, cache). The
    draws depend on (seed, position) alone: every encoder sees the same views, and so comparisons are paired.
    """
    transforms = {
        "images": CENTRE_CROP,
        "first views": augmented_view(run.seed, 0),
        "second views": augmented_view(run.seed, 1),
    }
    return PairedViews(
        *(
            feature_sets(backbone, images, run=run, transform=how, phase=f"features of the {name}{what}", **options)
            for name, how in transforms.items()
        )
    )


def augmented_view(seed: int, number: int) -> ImageTransform:
    """Every image changed at random as ``VIEW`` says; ``number`` tells the views apart."""

    def batches(
        images: ImageSet, size: ImageSize, batch_size: int, indices: Indices
    ) -> Iterator[tuple[Tensor, Tensor]]:
        spec, start = scaled_view(size), 0
        for loaded, chosen in decoded_batches(images, indices, batch_size, lambda pixels: pixels):
            readable = {row: pixels for row, pixels in enumerate(loaded) if pixels is not None}
            if kept := list(readable):
                # random numbers belong to the position in the set asked for, whether or not others are readable
                whole = [readable.get(row, readable[kept[0]]) for row in range(len(loaded))]
                crops = crop_batch(whole, spec, draws(seed, 0, number, start, len(whole)))
                channels = crops.shape[1]
                photometric = BatchPhotometric(spec, (0.0,) * channels, (1.0,) * channels)  # normalised after rounding
                views = photometric(crops, seeded_generator(seed, number, start))
                pixels = views.clamp_(0, 1).mul_(255).round_().to(torch.uint8)
                yield pixels[kept], torch.from_numpy(chosen[kept])
            start += len(chosen)

    return ImageTransform(f"random view {number} of seed {seed}: {VIEW}", batches)


def scaled_view(size: ImageSize) -> ViewSpec:
    """The view at ``size`` pixels, its blur as wide in proportion."""
    low, high = VIEW.blur_sigma
    factor = max(1.0, max(height_width(size)) / BLUR_REFERENCE)
    return replace(VIEW, size=size, blur_sigma=(low, high * factor))
