from __future__ import annotations

import numpy as np
import pytest

from mim_refiner.analysis.verdict import verdict
from mim_refiner.core.metrics import paired_interval
from mim_refiner.errors import InputError


def hits(seed, rate, count=500):
    return np.random.default_rng(seed).random(count) < rate


@pytest.mark.parametrize("seed", range(3))
def test_three_words(seed):
    low, high = hits(seed, 0.4), hits(seed + 10, 0.6)
    better, worse, same = verdict(low, high), verdict(high, low), verdict(low, low)
    assert (better["verdict"], worse["verdict"], same["verdict"]) == ("better", "worse", "no clear change")
    difference, lower, upper = paired_interval(low, high)
    assert (better["knn_difference"], better["ci95"]) == (difference, [lower, upper])
    assert "rose by" in better["reason"]
    assert "fell by" in worse["reason"]
    assert same["reason"].startswith("k-NN accuracy did not move (95 % interval")
    assert set(better) == {"verdict", "knn_difference", "ci95", "reason"}


def test_small_samples_are_not_called_clear():
    before, after = np.array([0] * 5 + [1] * 5), np.array([0] * 4 + [1] * 6)
    found = verdict(before, after)
    assert found["verdict"] == "no clear change"
    assert found["reason"].startswith("k-NN accuracy rose by 10.0 points")
    assert "may be chance" in found["reason"]


def test_different_samples_are_refused():
    with pytest.raises(InputError, match="same samples"):
        verdict(hits(0, 0.5, 10), hits(0, 0.5, 11))
