"""Label-free measures against slow loops, and the bootstrap against simulation."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from mim_refiner.analysis.label_free import (
    bootstrap_interval,
    cluster_stability,
    dense_drift,
    label_free_measures,
    neighbor_consistency,
    paired_scores,
    rank_of_rows,
    score_interval,
    view_retrieval,
)
from mim_refiner.core.metrics import accuracy_interval, effective_rank, paired_interval


def views(noise, count=50, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    clean = rng.normal(size=(count, dim)) * np.arange(1, dim + 1) + 2
    return [torch.from_numpy(clean + s * noise * rng.normal(size=clean.shape)).float() for s in (0, 1, 1)]


def unit(x, reference):
    z = (x - reference.mean(0)) / (reference.std(0, ddof=1) + 1e-6)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def test_consistency_and_retrieval_equal_slow_loops():
    clean, first, second = views(1.0)
    arrays = [x.double().numpy() for x in (clean, first, second)]
    gallery, one, two = (unit(x, arrays[0]) for x in arrays)
    shares, hits = [], []
    for i in range(len(gallery)):
        others = [j for j in range(len(gallery)) if j != i]
        near = [set(sorted(others, key=lambda j: -float(v[i] @ gallery[j]))[:4]) for v in (one, two)]
        shares.append(len(near[0] & near[1]) / 4)
        hits.append(sum(np.argmax(b @ a[i]) == i for a, b in ((one, two), (two, one))) / 2)
    assert neighbor_consistency(clean, first, second, neighbors=4).tolist() == pytest.approx(shares)
    assert view_retrieval(clean, first, second).tolist() == pytest.approx(hits)


def test_consistency_falls_with_noise_and_ends_at_chance():
    values = [neighbor_consistency(*views(noise, count=400)).mean() for noise in (0, 0.5, 2, 50)]
    assert values[0] == 1
    assert values[0] > values[1] > values[2] > values[3]
    assert values[3] < 0.1  # chance is 10 of 399, and more where far points attract


def rand_index(a, b):
    """Adjusted Rand index by counting pairs (Hubert and Arabie, 1985)."""
    pairs = list(combinations(range(len(a)), 2))
    same_a, same_b = ([x[i] == x[j] for i, j in pairs] for x in (a, b))
    both, total = sum(p and q for p, q in zip(same_a, same_b, strict=True)), len(pairs)
    expected = sum(same_a) * sum(same_b) / total
    return (both - expected) / ((sum(same_a) + sum(same_b)) / 2 - expected)


def test_stability_is_the_rand_index_of_two_halves():
    clean, *_ = views(0, count=40)
    points = unit(clean.numpy(), clean.numpy()).astype(np.float32)
    order = np.random.default_rng([3, 0]).permutation(40)
    found = [
        KMeans(4, n_init=1, max_iter=30, random_state=side).fit(points[part]).predict(points)
        for side, part in enumerate((order[:20], order[20:]))
    ]
    assert cluster_stability(clean, clusters=4, pairs=1, seed=3)[0] == pytest.approx(rand_index(*found), abs=1e-6)


def test_separate_clusters_are_stable_and_noise_is_not():
    rng = np.random.default_rng(0)
    centres = np.eye(4)[rng.integers(0, 4, 200)] * 20
    clear = cluster_stability(torch.from_numpy(centres + rng.normal(size=(200, 4))).float(), clusters=4, pairs=6)
    noise = cluster_stability(torch.from_numpy(rng.normal(size=(200, 4))).float(), clusters=20, pairs=6)
    assert np.median(clear) > 0.9
    assert noise.mean() < 0.6


def test_rank_of_rows_is_the_effective_rank_of_those_rows():
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 7)) * [9, 5, 3, 1, 0.5, 0.1, 0]).float() + 1
    rows = np.random.default_rng(1).integers(0, 40, 40)
    assert rank_of_rows(x)(np.arange(40)) == pytest.approx(effective_rank(x), abs=1e-4)
    assert rank_of_rows(x)(rows) == pytest.approx(effective_rank(x[rows]), abs=1e-4)
    assert rank_of_rows(x, centred=True)(rows) == pytest.approx(effective_rank(x[rows], centred=True), abs=1e-4)
    assert rank_of_rows(torch.zeros(5, 3))(np.arange(5)) == 0


def test_drift_is_one_minus_the_cosine():
    before, after = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    slow = [
        1 - np.mean([float(b @ a / b.norm() / a.norm()) for b, a in zip(bs, as_, strict=True)])
        for bs, as_ in zip(before, after, strict=True)
    ]
    assert dense_drift(before, after).tolist() == pytest.approx(slow, abs=1e-6)
    assert dense_drift(before, 2 * before).tolist() == pytest.approx([0, 0, 0], abs=1e-7)


def test_the_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        sample = rng.normal(0.3, 1, size=80)
        value, low, high, drawn = bootstrap_interval(
            lambda rows, x=sample: float(x[rows].mean()), 80, replicates=200, seed=trial
        )
        assert value == pytest.approx(sample.mean())
        assert len(drawn) == 200
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.985


def test_the_bootstrap_equals_a_plain_loop():
    x = np.random.default_rng(0).random(30)
    _, low, high, drawn = bootstrap_interval(lambda rows: float(x[rows].mean()), 30, replicates=50, seed=4)
    rng = np.random.default_rng(4)
    slow = [np.mean([x[i] for i in rng.integers(0, 30, 30)]) for _ in range(50)]
    assert drawn.tolist() == pytest.approx(slow)
    assert (low, high) == pytest.approx(tuple(np.quantile(slow, (0.025, 0.975))))


def test_hits_use_the_formula_for_proportions_and_shares_the_bootstrap():
    rng = np.random.default_rng(0)
    before, after = rng.random(60) < 0.4, rng.random(60) < 0.6
    assert paired_scores(before.astype(float), after.astype(float)) == paired_interval(before, after)
    assert score_interval(before.astype(float)) == accuracy_interval(before)[1:]
    shares = rng.random(60)
    value, low, high = paired_scores(shares, shares + 0.25)
    assert (value, low, high) == pytest.approx((0.25, 0.25, 0.25))
    low, high = score_interval(shares)
    assert high - low == pytest.approx(2 * 1.96 * shares.std() / 60**0.5)


def test_every_measure_has_one_number():
    found = label_free_measures(*views(1.0, count=30), seed=0, pairs=2)
    ranks = {"effective rank", "effective rank, centred"}
    assert set(found.summary()) == {"neighbour consistency", "view retrieval", "cluster stability"} | ranks
