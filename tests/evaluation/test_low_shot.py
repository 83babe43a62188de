"""Low-shot regression against the objective minimised another way, and its splits and scorings."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mim_refiner.evaluation.low_shot import (
    LowShotSettings,
    draw_shots,
    fit_logistic,
    low_shot_protocol,
    row_normalized,
)


def reference_weights(x, y, penalty):
    """Minimise mean cross-entropy + penalty / (2 N) ||W||² with torch's L-BFGS, from the objective as written."""
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    weights = torch.zeros(x.shape[1], int(y.max()) + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=2000, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weights, y) + penalty / len(x) / 2 * weights.pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return weights.detach()


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("penalty", [0.5, 0.00025])
def test_the_weights_minimise_the_objective(classes, penalty):
    rng = np.random.default_rng(0)
    y = np.arange(40) % classes
    x = row_normalized(torch.from_numpy(rng.normal(size=(40, 6)) + 2 * y[:, None] * rng.normal(size=6))).numpy()
    found, _ = fit_logistic(x, y, LowShotSettings(penalty=penalty, max_iter=5000))
    expected = reference_weights(x, y, penalty)
    if penalty > 0.01:  # nearly unpenalised weights are large and the objective is flat
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-2, atol=2e-3)
    queries = rng.normal(size=(200, 6))
    agree = (queries @ found).argmax(1) == (queries @ expected.numpy()).argmax(1)
    assert agree.mean() > 0.98


def test_rows_are_centred_and_of_length_one():
    x = row_normalized(torch.randn(5, 7) * 3 + 10)
    assert x.dtype == torch.float64
    assert x.mean(1).abs().max() < 1e-12
    torch.testing.assert_close(x.norm(dim=1), torch.ones(5, dtype=torch.float64))


def test_splits_are_nested_stratified_and_differ():
    labels = np.array([0] * 10 + [1] * 10 + [2] * 3)
    one, five = (draw_shots(labels, shots, seed=0, split=0) for shots in (1, 5))
    assert set(one) <= set(five)
    assert np.bincount(labels[one]).tolist() == [1, 1, 1]
    assert np.bincount(labels[five]).tolist() == [5, 5, 3]  # the third class gives all it has
    assert not np.array_equal(five, draw_shots(labels, 5, seed=0, split=1))
    assert not np.array_equal(five, draw_shots(labels, 5, seed=1, split=0))
    assert np.array_equal(five, draw_shots(labels, 5, seed=0, split=0))


def test_more_shots_score_higher_and_intervals_hold_the_value(make_features):
    train, test = make_features(200, shift=1.2), make_features(200, shift=1.2, seed=7)
    scores = low_shot_protocol(train, test, LowShotSettings(shots=(1, 20), splits=4))
    assert set(scores) == {(key, shots) for key in train.keys for shots in (1, 20)}
    for key in train.keys:
        few, many = scores[key, 1], scores[key, 20]
        assert many.accuracy > few.accuracy
        assert few.correct.shape == (4, 200)
        assert few.accuracy == pytest.approx(np.mean(few.correct.mean(1)))
        assert few.ci95[0] < few.accuracy < few.ci95[1]


def test_reference_scoring_leaves_the_test_features_as_they_are(make_features):
    """Weights that sum to something else than zero per column see the rows' means; training rows have none."""
    train, test = make_features(80), make_features(60, seed=3)
    offset = torch.linspace(-30, 30, 60)[:, None]
    moved = dataclasses.replace(test, values={key: test[key] + offset for key in test.keys})
    settings = LowShotSettings(shots=(5,), splits=1)
    published = settings.model_copy(update={"scoring": "reference"})
    same = [low_shot_protocol(train, part, settings) for part in (test, moved)]
    quirk = [low_shot_protocol(train, part, published) for part in (test, moved)]
    for item in same[0]:
        assert np.array_equal(same[0][item].correct, same[1][item].correct)  # the rows' means do not matter
    key = (1, "cls")
    rows = draw_shots(train.labels.numpy(), 5, seed=0, split=0)
    weights, _ = fit_logistic(row_normalized(train[key][rows]).numpy(), train.labels.numpy()[rows], published)
    for part, found in zip((test, moved), quirk, strict=True):
        expected = (part[key].double().numpy() @ weights).argmax(1) == part.labels.numpy()
        assert np.array_equal(found[key, 5].correct[0], expected)
