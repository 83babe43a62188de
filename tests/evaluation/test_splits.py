from __future__ import annotations

import numpy as np
import pytest

from mim_refiner.errors import DataError
from mim_refiner.evaluation.splits import stratified_folds, stratified_split


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_share_holds_in_total_and_in_every_class(share, seed):
    labels = np.random.default_rng(seed).choice(5, 400, p=[0.4, 0.3, 0.2, 0.05, 0.05])
    kept, held = stratified_split(labels, share, seed)
    assert sorted([*kept, *held]) == list(range(400))
    assert abs(len(held) - 400 * share) <= 1
    for number in range(5):
        assert abs((labels[held] == number).sum() - share * (labels == number).sum()) <= 1


def test_depends_on_the_seed_alone():
    labels = np.arange(100) % 4
    first, again, other = (stratified_split(labels, 0.2, seed)[1].tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_a_class_of_one_stays_in_train():
    labels = np.array([0] * 20 + [7])
    for seed in range(20):
        assert 20 in stratified_split(labels, 0.4, seed)[0]


def test_too_few_images():
    with pytest.raises(DataError, match="too few images to hold out"):
        stratified_split(np.array([0]), 0.2, 0)


def test_folds_hold_every_row_once_and_each_class_alike():
    labels = np.repeat(np.arange(4), [50, 30, 7, 2])
    folds = stratified_folds(labels, 3, seed=1)
    assert sorted(np.concatenate(folds)) == list(range(len(labels)))
    for rows in ([len(fold) for fold in folds], *([(labels[fold] == c).sum() for fold in folds] for c in range(4))):
        assert max(rows) - min(rows) <= 1
    assert [fold.tolist() for fold in folds] == [fold.tolist() for fold in stratified_folds(labels, 3, seed=1)]
    assert [fold.tolist() for fold in folds] != [fold.tolist() for fold in stratified_folds(labels, 3, seed=2)]
