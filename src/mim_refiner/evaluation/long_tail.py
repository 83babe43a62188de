"""Long-tailed protocol: train on an imbalanced subset; many-, medium-, few-shot accuracy (method section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mim_refiner.core.metrics import accuracy_interval
from mim_refiner.errors import DataError, InputError

GROUPS = ("many", "medium", "few")


@dataclass(frozen=True)
class LongTailSettings:
    """``imbalance``: images of the largest over those of the smallest class; 1 takes the training set as it is.

    ``many`` and ``few``: classes with more than ``many`` training images are many-shot, with fewer than ``few``
    few-shot (the customary 100 and 20). ``methods``: what is trained on the subset.
    """

    imbalance: float = 100.0
    largest: int | None = None  # images of the largest class; None: as many as every class can give
    many: int = 100
    few: int = 20
    methods: Sequence[str] = ("knn", "linear", "finetune")


def imbalanced_subset(
    labels: NDArray[np.int64], *, imbalance: float = 100.0, largest: int | None = None, seed: int = 0
) -> NDArray[np.int64]:
    """Rows of a subset whose class sizes fall exponentially from ``largest`` to ``largest / imbalance``, sorted.

    Which class is large is drawn by ``seed``. Class c in drawn order gets largest * imbalance^(-c / (C - 1)) images,
    at least one (Cao et al., NeurIPS 2019). ``largest`` defaults to the size of the largest class; a class that has
    fewer images than its share gives all. ``imbalance=1`` keeps every row.
    Raises InputError for an imbalance below 1, DataError without labels.
    """
    if imbalance < 1:
        raise InputError(f"long_tail.imbalance must be at least 1, got {imbalance:g}")
    if not len(labels):
        raise DataError("a long-tailed subset needs at least one labelled image")
    if imbalance == 1 and largest is None:
        return np.arange(len(labels))
    rng = np.random.default_rng([seed, 2])
    classes, counts = np.unique(labels, return_counts=True)
    first = largest or int(counts.max())
    order = rng.permutation(len(labels))
    chosen = []
    for position, name in enumerate(rng.permutation(classes)):
        size = max(1, round(first * imbalance ** (-position / max(1, len(classes) - 1))))
        chosen.append(order[labels[order] == name][:size])
    return np.sort(np.concatenate(chosen))


def class_groups(
    train_labels: NDArray[np.int64], test_labels: NDArray[np.int64], settings: LongTailSettings
) -> dict[str, NDArray[np.bool_]]:
    """{"many" | "medium" | "few": which test images [N] belong to such a class}, empty groups left out."""
    counts = np.bincount(train_labels, minlength=int(test_labels.max()) + 1)[test_labels]
    groups = {
        "many": counts > settings.many,
        "medium": (counts <= settings.many) & (counts >= settings.few),
        "few": counts < settings.few,
    }
    return {name: members for name, members in groups.items() if members.any()}


def group_accuracies(
    correct: NDArray[np.bool_], groups: dict[str, NDArray[np.bool_]]
) -> dict[str, tuple[float, float, float]]:
    """Accuracy and its 95 % interval of every group."""
    return {name: accuracy_interval(correct[members]) for name, members in groups.items()}


def check_long_tail(settings: LongTailSettings) -> None:
    """Raise InputError for settings that mean nothing."""
    unknown = [name for name in settings.methods if name not in ("knn", "linear", "finetune")]
    if unknown or not settings.methods:
        raise InputError(f"long_tail.methods: {unknown or 'none'} is unknown; use knn, linear, finetune")
    if settings.imbalance < 1 or settings.few > settings.many:
        raise InputError(
            f"long_tail: imbalance {settings.imbalance:g} must be at least 1, few {settings.few} at most many "
            f"{settings.many}"
        )
