"""Deterministic stratified splits, and published ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mim_refiner.errors import DataError


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


def list_name(path: str, among: Sequence[str]) -> str:
    """What a result on a published list is called: the file's name, with its folder's where others share it."""
    stem = Path(path).stem
    shared = sum(Path(other).stem == stem for other in among) > 1
    return "".join(letter if letter.isalnum() else "-" for letter in (f"{Path(path).parent.name}-" * shared) + stem)
