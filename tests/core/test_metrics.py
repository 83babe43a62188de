from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from mim_refiner.core.metrics import (
    accuracy_interval,
    best_of_many_interval,
    clustering_accuracy,
    crossed_interval,
    effective_rank,
    mean_iou_interval,
    paired_interval,
)
from mim_refiner.errors import InputError


def test_clustering_accuracy_equals_trying_every_map() -> None:
    generator = np.random.default_rng(2)
    for clusters in (3, 4, 5):
        truth, predicted = generator.integers(4, size=40), generator.integers(clusters, size=40)
        labels = max(4, clusters)
        best = max(
            np.mean([mapping[p] == t for p, t in zip(predicted, truth, strict=True)])
            for mapping in itertools.permutations(range(labels))
        )
        assert clustering_accuracy(truth, predicted) == pytest.approx(best, abs=1e-12)


def test_clustering_scores_ignore_the_names_of_clusters() -> None:
    truth = torch.tensor([0, 0, 1, 1, 7])
    renamed = [5, 5, -3, -3, 0]
    assert clustering_accuracy(truth, renamed) == 1.0
    assert clustering_accuracy([0, 0, 0, 1], [0, 1, 2, 3]) == 0.5


def test_effective_rank_of_known_spectra() -> None:
    rotation = torch.linalg.qr(torch.randn(20, 20))[0]
    for values in ([1.0, 1.0, 1.0, 1.0], [4.0, 2.0, 1.0], [3.0]):
        features = (rotation[:, : len(values)] * torch.tensor(values)) @ rotation[: len(values)]
        share = [v / sum(values) for v in values]
        expected = math.exp(-sum(s * math.log(s) for s in share))
        assert effective_rank(features) == pytest.approx(expected, rel=1e-4)
        assert effective_rank(1e6 * features) == pytest.approx(expected, rel=1e-4)
        centred = features - features.mean(0)
        assert effective_rank(features + 7, centred=True) == pytest.approx(effective_rank(centred), rel=1e-4)
    assert effective_rank(torch.zeros(5, 3)) == 0.0


@pytest.mark.parametrize(("lost", "gained"), [(0.1, 0.1), (0.05, 0.15), (0.0, 0.02)])
def test_paired_interval_covers_the_true_difference(lost: float, gained: float) -> None:
    generator = np.random.default_rng(4)
    covered, runs = 0, 600
    for _ in range(runs):
        draw = generator.random(300)
        before, after = draw < 0.5 + lost, (draw >= lost) & (draw < 0.5 + lost + gained)
        _, low, high = paired_interval(before, after)
        covered += low <= gained - lost <= high
    assert 0.93 <= covered / runs <= 0.99


def test_paired_interval_of_known_counts() -> None:
    before = np.r_[np.zeros(30), np.ones(10), np.ones(60)]
    after = np.r_[np.ones(30), np.zeros(10), np.ones(60)]
    difference, low, high = paired_interval(torch.tensor(before), after)
    half = 1.959964 * math.sqrt((42 / 102 - (20 / 102) ** 2) / 102)
    assert difference == pytest.approx(0.2)
    assert (low, high) == pytest.approx((20 / 102 - half, 20 / 102 + half), rel=1e-6)
    same, low, high = paired_interval([1] * 50, [1] * 50)
    assert same == 0
    assert low < 0 < high


def test_accuracy_interval_is_wilsons() -> None:
    # published example of the Wilson score interval: 81 of 263
    rate, low, high = accuracy_interval([1] * 81 + [0] * 182)
    assert (rate, low, high) == pytest.approx((0.3080, 0.2553, 0.3662), abs=5e-5)
    assert accuracy_interval(torch.ones(10, dtype=torch.bool))[2] == pytest.approx(1.0)


def test_unusable_input_is_refused() -> None:
    with pytest.raises(InputError, match="equally many"):
        clustering_accuracy([0, 1], [0])
    with pytest.raises(InputError, match="same samples"):
        paired_interval([0, 1], [1])
    with pytest.raises(InputError, match="0 or 1"):
        accuracy_interval([0.5, 1.0])
    with pytest.raises(InputError, match="finite"):
        effective_rank(torch.full((3, 3), float("nan")))


def test_wilson_interval_covers_the_true_accuracy() -> None:
    """Exactly, by summing the binomial distribution over the counts whose interval holds the true rate."""
    from scipy.stats import binom

    coverage = []
    for n in (50, 200):
        intervals = np.array([accuracy_interval(np.r_[np.ones(k), np.zeros(n - k)])[1:] for k in range(n + 1)])
        for rate in np.linspace(0.1, 0.95, 40):
            inside = (intervals[:, 0] <= rate) & (rate <= intervals[:, 1])
            coverage.append(binom.pmf(np.arange(n + 1), n, rate)[inside].sum())
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.005)
    assert min(coverage) > 0.92


@pytest.mark.parametrize(("draws", "images"), [(1, 300), (3, 300), (3, 2000), (10, 300)])
def test_crossed_interval_covers_the_expected_accuracy(draws: int, images: int) -> None:
    """Images of different difficulty, training draws of different quality; truth is the mean over both populations."""
    rng = np.random.default_rng(2)
    covered, runs, spread = 0, 800, 0.0 if draws == 1 else 0.05
    for _ in range(runs):
        chance = rng.uniform(0.2, 0.9, images)[None] + spread * rng.normal(size=(draws, 1))
        correct = rng.random((draws, images)) < chance
        _, low, high = crossed_interval(correct)
        covered += low <= 0.55 <= high
    assert 0.93 <= covered / runs <= 0.99  # a little conservative, as it says


def test_crossed_interval_of_paired_differences_and_of_constants() -> None:
    rng = np.random.default_rng(3)
    difference = rng.choice([-1.0, 0.0, 1.0], size=(1, 400))
    mean, low, high = crossed_interval(difference)
    half = 1.966 * difference.std(ddof=1) / 20
    assert (mean, low, high) == pytest.approx((difference.mean(), mean - half, mean + half), abs=1e-4)
    assert crossed_interval(np.ones((3, 5))) == (1, 1, 1)
    with pytest.raises(InputError, match="draws, images"):
        crossed_interval([1, 0])


def test_mean_iou_interval_covers_and_pairs() -> None:
    """Two classes; every image has its own share of right pixels. The true value comes from very many images."""
    rng = np.random.default_rng(4)

    def images(count: int, rng: np.random.Generator) -> np.ndarray:
        right = rng.beta(8, 3, (count, 2)) * 50
        counts = np.zeros((count, 2, 2))
        for truth in range(2):
            counts[:, truth, truth], counts[:, truth, 1 - truth] = right[:, truth], 50 - right[:, truth]
        return counts.round()

    from mim_refiner.core.metrics import mean_iou

    true_value = mean_iou(images(20_000, rng))
    runs = 80
    covered = 0
    for seed in range(runs):
        value, low, high = mean_iou_interval(images(60, rng), resamples=200, seed=seed)
        assert low <= value <= high
        covered += low <= true_value <= high
    assert 0.87 <= covered / runs <= 0.99
    first = images(60, rng)
    better = first.copy()
    moved = np.minimum(better[:, 0, 1], 3)
    better[:, 0, 1] -= moved
    better[:, 0, 0] += moved
    difference, low, high = mean_iou_interval(better, first, resamples=200)
    assert difference == pytest.approx(mean_iou(better) - mean_iou(first))
    assert 0 < low < difference < high
    assert mean_iou_interval(first, first, resamples=20) == (0, 0, 0)


def test_best_of_many_interval_is_as_wide_as_the_bootstrap_of_the_largest_t() -> None:
    rng = np.random.default_rng(3)
    rows = (rng.random((5, 400)) < 0.5).astype(float) - (rng.random(400) < 0.4)  # correlated by the shared second term
    value, low, high = best_of_many_interval(rows)
    best = int(rows.mean(1).argmax())
    error = rows.std(1) / 20
    largest = []
    for _ in range(1000):
        drawn = rows[:, rng.integers(0, 400, 400)]
        largest.append(max(abs(drawn[k].mean() - rows[k].mean()) / error[k] for k in range(5)))
    assert value == rows[best].mean()
    assert (high - low) / 2 == pytest.approx(np.quantile(largest, 0.95) * error[best], rel=0.06)
    assert low < value < high


def test_best_of_many_interval_of_one_row_is_the_paired_one() -> None:
    before, after = np.arange(60) % 3 == 0, np.arange(60) % 2 == 0
    found = best_of_many_interval([after.astype(float) - before], draws=200_000)
    assert found == pytest.approx(paired_interval(before, after), abs=2e-3)
