"""The protocol against scikit-learn's weighted nearest neighbours."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from mim_refiner.errors import DataError, InputError
from mim_refiner.evaluation.knn import knn_protocol


@pytest.mark.parametrize(("k", "temperature"), [(10, 0.07), (1, 0.07), (5, 1.0)])
def test_equals_scikit_learn(make_features, k, temperature):
    train, test = make_features(200, seed=1), make_features(80, seed=2)
    scores = knn_protocol(train, test, k=k, temperature=temperature)
    assert list(scores) == list(train.keys)
    for key, score in scores.items():
        x, queries = train[key].double().numpy(), test[key].double().numpy()
        mean, std = x.mean(0), x.std(0, ddof=1) + 1e-6
        reference = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / temperature))
        reference.fit((x - mean) / std, train.labels.numpy())
        expected = reference.predict((queries - mean) / std) == test.labels.numpy()
        assert (score.correct == expected).mean() >= 79 / 80  # float32 against float64: room for one near-tie
        assert score.accuracy == score.correct.mean()
        assert score.ci95[0] < score.accuracy < score.ci95[1]


def test_refuses_missing_labels_and_too_large_k(make_features):
    features = make_features(8)
    with pytest.raises(DataError, match="train images have no labels"):
        knn_protocol(dataclasses.replace(features, labels=None), features)
    with pytest.raises(InputError, match="k is 9, with 8 train images; set knn_k to 8 or less"):
        knn_protocol(features, features, k=9)
