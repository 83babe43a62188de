"""Clustering protocol: mini-batch k-means on frozen features, compared with the classes (method section 6)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import (
    adjusted_mutual_info_score,
    adjusted_rand_score,
    davies_bouldin_score,
    normalized_mutual_info_score,
    silhouette_score,
)

from mim_refiner.core.metrics import accuracy_interval, clustering_hits, standardized
from mim_refiner.core.threads import threads_for
from mim_refiner.evaluation.features import FeatureKey, Features
from mim_refiner.evaluation.knn import required_labels
from mim_refiner.evaluation.results import Result
from mim_refiner.reporting import number_of

BATCH = 1024  # images of a step of k-means
SILHOUETTE_ROWS = 5000  # it compares all pairs
FEW_A_CLASS = 10  # images: of fewer many fall into place by chance (0.6 of 15 images of 10 classes)


@dataclass(frozen=True)
class ClusteringScore:
    """``values``: agreement of the clustering of lowest inertia with the classes, in 0-1 (accuracy, nmi; ami and ari
    may be slightly negative), and how separate the classes themselves lie in the features (silhouette, -1 to 1, higher
    is better; davies_bouldin, from 0, lower is better; NaN where there is one class only).

    ``drawn`` holds the agreement of resamples of the images that were clustered and matched anew, where they were
    asked for.
    """

    values: Mapping[str, float]
    inertia: float
    clusters: NDArray[np.int64]  # [N]
    correct: NDArray[np.bool_]  # [N] under the best one-to-one map of clusters to classes
    drawn: Mapping[str, NDArray[np.float64]]  # {measure of agreement: [resamples]}

    def interval(self, metric: str) -> tuple[float, float] | None:
        """95 % interval by the resamples; else of accuracy alone, Wilson's: of the images only, and so too narrow."""
        if metric in self.drawn:
            half, value = 1.96 * float(self.drawn[metric].std(ddof=1)), self.values[metric]
            return max(-1.0, value - half), min(1.0, value + half)
        return accuracy_interval(self.correct)[1:] if metric == "accuracy" else None


def clustering_protocol(
    features: Features, *, num_seeds: int = 100, resamples: int = 0, seed: int = 0
) -> dict[FeatureKey, ClusteringScore]:
    """Cluster ``features`` (the evaluated images themselves) for every (block, pooling).

    k = number of classes. Features are prepared as for k-NN: standardised per dimension, then
    L2-normalised, so that both protocols look at the same geometry. ``num_seeds`` starts; the lowest inertia wins, no
    label is used for that. (The paper is said to use 100 starts: unverified.) ``resamples`` of the images, two or more,
    are each prepared, clustered and matched anew: the uncertainty of the whole procedure. Raises DataError without
    labels.
    """
    labels = required_labels(features, "clustered").numpy()
    k = len(np.unique(labels))
    scores = {}
    for key in features.keys:
        x = standardized(features[key]).numpy()
        clusters, inertia = _best_kmeans(x, k, num_seeds, seed)
        values, correct = agreement(labels, clusters)
        again = []
        for number in range(resamples):  # the same images for every encoder: differences are paired
            rows = np.random.default_rng([seed, 4, number]).integers(0, len(x), len(x))
            found, _ = _best_kmeans(standardized(features[key][rows]).numpy(), k, num_seeds, seed)
            again.append(agreement(labels[rows], found)[0])
        drawn = {name: np.array([each[name] for each in again]) for name in values if again}
        values |= class_separation(x, labels, seed)
        scores[key] = ClusteringScore(values, inertia, clusters, correct, drawn)
    return scores


def said_of_few(results: Iterable[Result]) -> str:
    """A sentence where fewer than ten images a class were clustered, else nothing."""
    for result in results:
        if result.metric == "cluster_accuracy" and result.correct is not None:
            images, classes = len(result.correct), result.settings["clusters"]
            if images < FEW_A_CLASS * classes:
                return (
                    f"Cluster accuracy and NMI of {number_of(images, 'images')} of {number_of(classes, 'classes')} are "
                    f"high by chance: with fewer than {FEW_A_CLASS} images a class they tell little."
                )
    return ""


def agreement(labels: NDArray[np.int64], clusters: NDArray[np.int64]) -> tuple[dict[str, float], NDArray[np.bool_]]:
    """({accuracy, nmi, ami, ari} of clusters [N] with classes [N], hits [N])."""
    correct = clustering_hits(labels, clusters)
    scores = {"nmi": normalized_mutual_info_score, "ami": adjusted_mutual_info_score, "ari": adjusted_rand_score}
    values = {name: float(score(labels, clusters)) for name, score in scores.items()}
    return {"accuracy": float(correct.mean()), **values}, correct


def class_separation(x: NDArray[np.float32], labels: NDArray[np.int64], seed: int = 0) -> dict[str, float]:
    """Silhouette (of at most 5,000 random rows) and Davies-Bouldin index of the classes in features [N, D]."""
    rows = np.sort(np.random.default_rng([seed, 3]).permutation(len(x))[:SILHOUETTE_ROWS])
    if not 1 < len(np.unique(labels[rows])) < len(rows):
        return {"silhouette": float("nan"), "davies_bouldin": float("nan")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # classes that lie in one point divide by zero
        silhouette, index = silhouette_score(x[rows], labels[rows]), davies_bouldin_score(x, labels)
        return {"silhouette": float(silhouette), "davies_bouldin": float(index)}


def _best_kmeans(x: NDArray[np.float32], k: int, num_seeds: int, seed: int) -> tuple[NDArray[np.int64], float]:
    with fitting(BATCH * x.shape[1] * k):
        how = {"n_init": 1, "batch_size": BATCH, "max_iter": 100}
        fitted = (MiniBatchKMeans(k, random_state=seed + number, **how).fit(x) for number in range(num_seeds))
        best = min(fitted, key=lambda found: found.inertia_)  # of all images, not of the last mini-batch
    return best.labels_.astype(np.int64), float(best.inertia_)


@contextmanager
def fitting(multiplications: float) -> Iterator[None]:
    """scikit-learn fits in here, by operations of so many multiplications, and does not warn where it did not converge.

    Collapsed features have fewer distinct points than clusters, and the measures say so; where classes are nearly
    separable the optimum lies far out, and predictions settle long before the weights.
    """
    with warnings.catch_warnings(), threads_for(multiplications):
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
