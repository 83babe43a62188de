"""Clustering against scikit-learn's full k-means, and scores against their definitions."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.preprocessing import StandardScaler, normalize

from mim_refiner.core.metrics import accuracy_interval, standardized
from mim_refiner.errors import DataError
from mim_refiner.evaluation.clustering import (
    FEW_A_CLASS,
    ClusteringScore,
    agreement,
    class_separation,
    clustering_protocol,
    said_of_few,
)


def test_finds_separated_classes(make_features):
    scores = clustering_protocol(make_features(200, shift=8.0), num_seeds=5)
    assert list(scores) == [(1, "cls"), (2, "mean")]
    for score in scores.values():
        assert [score.values[name] for name in ("accuracy", "nmi", "ari")] == pytest.approx([1.0, 1.0, 1.0])
        assert score.correct.all()
        assert score.interval("accuracy")[0] > 0.97


def test_inertia_is_close_to_full_k_means(make_features):
    features = make_features(400, shift=1.5)
    x = features[1, "cls"].numpy()
    prepared = normalize(StandardScaler().fit_transform(x))
    best = KMeans(4, n_init=20, random_state=0).fit(prepared).inertia_
    score = clustering_protocol(features, num_seeds=10)[1, "cls"]
    assert score.inertia == pytest.approx(best, rel=0.02)
    centres = np.stack([prepared[score.clusters == cluster].mean(0) for cluster in range(4)])
    assert score.inertia >= ((prepared - centres[score.clusters]) ** 2).sum() * 0.99  # of all images, not of a batch


def test_the_lowest_inertia_wins(make_features):
    features = make_features(150, shift=0.5, classes=6)
    alone = [clustering_protocol(features, num_seeds=1, seed=seed)[1, "cls"].inertia for seed in range(4)]
    assert clustering_protocol(features, num_seeds=4, seed=0)[1, "cls"].inertia == min(alone)
    assert len(set(alone)) > 1


def test_scores_equal_their_definitions():
    rng = np.random.default_rng(0)
    labels, clusters = rng.integers(0, 4, 60), rng.integers(0, 4, 60)
    values, correct = agreement(labels, clusters)
    score = ClusteringScore(values, 0.0, clusters, correct, {})
    best = max(np.mean(np.array(order)[clusters] == labels) for order in itertools.permutations(range(4)))
    assert values["accuracy"] == pytest.approx(best)
    assert score.correct.mean() == pytest.approx(best)
    low, high = score.interval("accuracy")
    assert low < best < high
    assert score.interval("nmi") is None
    assert values["nmi"] == pytest.approx(normalized_mutual_info_score(labels, clusters))
    assert values["ari"] == pytest.approx(adjusted_rand_score(labels, clusters))
    assert -0.1 < values["ami"] < values["nmi"]  # chance agreement is taken off


def test_class_separation_equals_its_definitions():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 12)
    x = rng.normal(size=(36, 4)) + labels[:, None] * np.array([2.0, 0, 1, 0])
    silhouette, davies_bouldin = class_separation(x, labels).values()
    distance = np.linalg.norm(x[:, None] - x[None], axis=2)
    widths = []
    for row in range(36):
        means = {c: distance[row][(labels == c) & (np.arange(36) != row)].mean() for c in range(3)}
        own = means.pop(labels[row])
        widths.append((min(means.values()) - own) / max(min(means.values()), own))
    assert silhouette == pytest.approx(np.mean(widths))
    centres = np.stack([x[labels == c].mean(0) for c in range(3)])
    spread = [np.linalg.norm(x[labels == c] - centres[c], axis=1).mean() for c in range(3)]
    ratios = [
        max((spread[i] + spread[j]) / np.linalg.norm(centres[i] - centres[j]) for j in range(3) if j != i)
        for i in range(3)
    ]
    assert davies_bouldin == pytest.approx(np.mean(ratios))
    assert np.isnan([*class_separation(x, np.zeros(36, int)).values()]).all()


def test_collapsed_features_score_like_one_cluster(make_features):
    features = make_features(40)
    flat = dataclasses.replace(features, values={key: torch.ones(40, 8) for key in features.keys})
    score = clustering_protocol(flat, num_seeds=2)[1, "cls"]  # and no warning
    assert score.values["accuracy"] == pytest.approx(0.25)
    assert score.values["nmi"] == pytest.approx(0.0)


def test_prepare_is_what_k_nn_does_to_its_bank(make_features):
    x = make_features()[1, "cls"].double()
    expected = (x - x.mean(0)) / (x.std(0) + 1e-6)
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(standardized(x), expected)
    assert torch.isfinite(standardized(x[:1])).all()


def test_bad_input(make_features):
    features = make_features(20)
    with pytest.raises(DataError, match="no labels"):
        clustering_protocol(dataclasses.replace(features, labels=None))


def test_resamples_equal_a_loop_and_are_the_same_for_every_encoder(make_features):
    features = make_features(60, shift=1.0)
    score = clustering_protocol(features, num_seeds=2, resamples=3)[1, "cls"]
    for number in range(3):
        rows = np.random.default_rng([0, 4, number]).integers(0, 60, 60)
        again = clustering_protocol(features.select(rows), num_seeds=2)[1, "cls"]
        assert score.drawn["accuracy"][number] == again.values["accuracy"]
    half = 1.96 * score.drawn["accuracy"].std(ddof=1)
    assert score.interval("accuracy") == pytest.approx(
        (score.values["accuracy"] - half, min(1, score.values["accuracy"] + half))
    )
    low, high = score.interval("nmi")
    assert low < score.values["nmi"] < high
    assert dataclasses.replace(score, drawn={}).interval("accuracy") == accuracy_interval(score.correct)[1:]


def test_few_images_a_class_are_high_by_chance_and_that_is_said(make_features):
    """Features that know nothing of ten classes: what is a tenth of many images is most of a handful."""
    found = {}
    for count in (15, 99, 100, 600):
        score = clustering_protocol(make_features(count, classes=10, shift=0.0), num_seeds=3)[1, "cls"]
        result = SimpleNamespace(metric="cluster_accuracy", correct=score.correct, settings={"clusters": 10})
        found[count] = score.values["accuracy"], said_of_few([result])
    assert found[15][0] > 0.5 > 0.25 > found[600][0]
    assert found[15][1].startswith("Cluster accuracy and NMI of 15 images of 10 classes are high by chance: with fewer")
    assert [bool(said) for _, said in found.values()] == [True, True, False, False]
    assert FEW_A_CLASS == 10
    assert said_of_few([]) == ""
