"""k-NN protocol: how well the labels of the nearest train images predict those of the test images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mim_refiner.core.knn import knn_predict
from mim_refiner.core.metrics import accuracy_interval
from mim_refiner.core.run import Run
from mim_refiner.errors import DataError
from mim_refiner.evaluation.features import FeatureKey, Features


@dataclass(frozen=True)
class AccuracyScore:
    """Top-1 accuracy (0-1) with its 95 % Wilson interval over test images."""

    accuracy: float
    ci95: tuple[float, float]
    correct: NDArray[np.bool_]  # [N] per test image, [draws, N] of several training sets

    @classmethod
    def of(cls, correct: Tensor) -> AccuracyScore:
        """Score of a boolean tensor [N]."""
        hits = correct.cpu().numpy()
        accuracy, low, high = accuracy_interval(hits)
        return cls(accuracy, (low, high), hits)


def knn_protocol(
    train: Features, test: Features, run: Run | None = None, **how: Any
) -> dict[FeatureKey, AccuracyScore]:
    """Score every (block, pooling) of ``train`` (the bank) by the paper's settings (method section 6).

    ``how``: k, temperature, standardize of ``knn_predict``. Raises DataError without labels, InputError when k exceeds
    the bank.
    """
    run = run or Run()
    train_y, test_y = required_labels(train, "train").to(run.device), required_labels(test, "test")
    scores = {}
    for done, key in enumerate(train.keys, 1):
        predicted = knn_predict(train[key].to(run.device), train_y, test[key].to(run.device), **how)
        scores[key] = AccuracyScore.of(predicted.cpu() == test_y)
        run.reporter.progress(done, {})
    return scores


def required_labels(features: Features, what: str) -> Tensor:
    """Labels int64 [N]; DataError when there are none."""
    if features.labels is None:
        raise DataError(
            f"the {what} images have no labels and this protocol needs them; give class folders or a label column"
        )
    return features.labels
