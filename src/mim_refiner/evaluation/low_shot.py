"""Low-shot protocol: logistic regression on the frozen features of 1, 2 or 5 images a class (method section 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mim_refiner.core.metrics import crossed_interval
from mim_refiner.evaluation.clustering import fitting
from mim_refiner.evaluation.features import FeatureKey, Features
from mim_refiner.evaluation.knn import AccuracyScore, required_labels
from mim_refiner.evaluation.splits import first_of_classes
from mim_refiner.settings import Files, FrozenSettings, Listed, Positive, PositiveInt


class LowShotSettings(FrozenSettings):
    """The paper's values. ``split_files``, published lists of file names, stand in the place of shots and splits.

    ``penalty`` is N times the published lambda = 0.00025 / N of a mean loss over N images.

    ``scoring``: "same" prepares the test features as the training features; "reference" scores them as they are, as
    the published evaluation does (it centres and normalises the training features only).
    """

    shots: Annotated[tuple[PositiveInt, ...], Field(min_length=1), Listed] = (1, 2, 5)
    splits: PositiveInt = 3
    split_files: Files = ()
    penalty: Positive = 0.00025
    max_iter: PositiveInt = 300
    scoring: Literal["same", "reference"] = "same"


def low_shot_protocol(
    train: Features,
    test: Features,
    settings: LowShotSettings | None = None,
    *,
    seed: int = 0,
    drawn: Mapping[int, Sequence[NDArray[np.int64]]] | None = None,
) -> dict[tuple[FeatureKey, int], AccuracyScore]:
    """Score every ((block, pooling), shots). The splits are nested: the 1-shot image is among the 2-shot images.

    ``correct`` is [splits, N], and ``ci95`` covers the drawn training images and the test images. A class with fewer
    images gives all it has. ``drawn``: {shots: rows of each split} that are published. DataError without labels.
    """
    settings = settings or LowShotSettings()
    labels, truth = required_labels(train, "train").numpy(), required_labels(test, "test").numpy()
    if drawn is None:
        drawn = {
            shots: [draw_shots(labels, shots, seed=seed, split=split) for split in range(settings.splits)]
            for shots in settings.shots
        }
    scores = {}
    for key in train.keys:
        prepared = row_normalized(train[key])
        queries = test[key].double() if settings.scoring == "reference" else row_normalized(test[key])
        for shots, splits in drawn.items():
            correct = []
            for rows in splits:
                weights, classes = fit_logistic(prepared[rows].numpy(), labels[rows], settings)
                correct.append(classes[(queries.numpy() @ weights).argmax(1)] == truth)
            hits = np.stack(correct)
            accuracy, low, high = crossed_interval(hits)
            scores[key, shots] = AccuracyScore(accuracy, (max(0.0, low), min(1.0, high)), hits)
    return scores


def fit_logistic(
    x: NDArray[np.float64], y: NDArray[np.int64], settings: LowShotSettings
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(weights [D, C], classes [C]) of least mean cross-entropy + penalty / 2N ||W||²; no intercept, by L-BFGS."""
    classes = np.unique(y)
    if len(classes) == 1:
        return np.zeros((x.shape[1], 1)), classes
    # scikit-learn weighs the sum of losses with C = 1 / (N lambda). For two classes it fits one vector, the
    # difference of two opposite ones: its squared length is twice the sum of theirs.
    strength = (2 if len(classes) == 2 else 1) / settings.penalty
    model = LogisticRegression(C=strength, fit_intercept=False, max_iter=settings.max_iter, tol=1e-5)
    with fitting(x.size * len(classes)):
        model.fit(x, y)
    matrix = np.vstack([-model.coef_, model.coef_]) / 2 if len(classes) == 2 else model.coef_
    return matrix.T.astype(np.float64), classes


def row_normalized(x: Tensor) -> Tensor:
    """Subtract from every row [D] of x [N, D] its own mean and scale it to length 1, in float64."""
    x = x.double()
    return torch.nn.functional.normalize(x - x.mean(1, keepdim=True), dim=1)


def draw_shots(labels: NDArray[np.int64], shots: int, *, seed: int, split: int) -> NDArray[np.int64]:
    """Rows of ``shots`` random images of every class, sorted; fewer where a class has fewer."""
    order = np.random.default_rng([seed, split]).permutation(len(labels))
    return first_of_classes(labels, order, dict.fromkeys(np.unique(labels).tolist(), shots))
