"""Parts of labelled images: stratified, published, and long-tailed (method section 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from mim_refiner.errors import DataError
from mim_refiner.settings import FrozenSettings, Listed, PositiveInt

Method = Literal["knn", "linear", "finetune"]


def stratified_split(labels: NDArray[np.int64], share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (kept, held out) row numbers, sorted; ``share`` of the rows of every class (within one row) is held out.

    Depends on the labels, the share and the seed alone. A class with a single row keeps it; a share of 0 holds nothing
    out. Raises DataError when either part would be empty.
    """
    if not share:
        return np.arange(len(labels)), np.arange(0)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    # every time the running count passes a whole number, that row is held out: exact in total, fair per class
    passed = np.floor(np.arange(1, len(labels) + 1) * share + rng.random())
    held = by_class[np.diff(passed, prepend=0.0) > 0]
    classes, counts = np.unique(labels, return_counts=True)
    held = held[~np.isin(labels[held], classes[counts == 1])]
    kept = np.setdiff1d(np.arange(len(labels)), held)
    if not len(kept) or not len(held):
        raise DataError(f"too few images to hold out a share of {share:g}: {len(labels)}; give more, or a test set")
    return kept, np.sort(held)


def stratified_folds(labels: NDArray[np.int64], count: int, seed: int) -> list[NDArray[np.int64]]:
    """Row numbers in ``count`` sorted parts that differ by at most one row, as do those of every class in them.

    Raises DataError when a part would be empty.
    """
    if len(labels) < count:
        raise DataError(f"too few images to hold each of {count} parts out once: {len(labels)}; give more")
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return [np.sort(by_class[number::count]) for number in range(count)]


def first_of_classes(
    labels: NDArray[np.int64], order: NDArray[np.int64], sizes: Mapping[int, int]
) -> NDArray[np.int64]:
    """The first ``sizes[class]`` rows of every class in ``order``, sorted; all of a class that has fewer."""
    return np.sort(np.concatenate([order[labels[order] == name][:size] for name, size in sizes.items()]))


def list_name(path: str, among: Sequence[str]) -> str:
    """What a result on a published list is called: the file's name, with its folder's where others share it."""
    stem = Path(path).stem
    shared = sum(Path(other).stem == stem for other in among) > 1
    return "".join(letter if letter.isalnum() else "-" for letter in (f"{Path(path).parent.name}-" * shared) + stem)


class LongTailSettings(FrozenSettings):
    """``imbalance``: images of the largest over those of the smallest class; 1 takes the training set as it is.

    ``many`` and ``few``: classes with more than ``many`` training images are many-shot, with fewer than ``few``
    few-shot (the customary 100 and 20). ``methods``: what is trained on the subset.
    """

    imbalance: Annotated[float, Field(ge=1, le=1e9)] = 100.0
    largest: PositiveInt | None = None  # images of the largest class; None: as many as every class can give
    many: PositiveInt = 100
    few: PositiveInt = 20
    methods: Annotated[tuple[Method, ...], Field(min_length=1), Listed] = get_args(Method)

    @model_validator(mode="after")
    def _few_are_fewer(self) -> LongTailSettings:
        if self.few > self.many:
            raise ValueError(f"few ({self.few}) must be at most many ({self.many})")
        return self


def imbalanced_subset(
    labels: NDArray[np.int64], *, imbalance: float = 100.0, largest: int | None = None, seed: int = 0
) -> NDArray[np.int64]:
    """Rows of a subset whose class sizes fall exponentially from ``largest`` to ``largest / imbalance``, sorted.

    Which class is large is drawn by ``seed``. Class c in drawn order gets largest * imbalance^(-c / (C - 1)) images,
    at least one (Cao et al., NeurIPS 2019). ``largest`` defaults to the size of the largest class; a class that has
    fewer images than its share gives all. ``imbalance=1`` keeps every row.
    """
    if imbalance == 1 and largest is None:
        return np.arange(len(labels))
    rng = np.random.default_rng([seed, 2])
    classes, counts = np.unique(labels, return_counts=True)
    first = largest or int(counts.max())
    order = rng.permutation(len(labels))
    falling = [max(1, round(first * imbalance ** (-rank / max(1, len(classes) - 1)))) for rank in range(len(classes))]
    return first_of_classes(labels, order, dict(zip(rng.permutation(classes).tolist(), falling, strict=True)))


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
