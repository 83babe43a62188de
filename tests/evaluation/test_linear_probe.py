"""The stacked probes against one torch module and optimizer for each learning rate."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mim_refiner.errors import DataError, InputError
from mim_refiner.evaluation.linear_probe import LinearProbeSettings, ProbeGrid, linear_probe

QUICK = LinearProbeSettings(epochs=3, batch_size=32)


def reference_probe(x, y, classes, rate, settings, seed):
    """One probe the slow way; written from method.md section 6. Batches and start as in the grid."""
    start = torch.randn(x.shape[1], classes, generator=torch.Generator().manual_seed(seed)) * settings.init_std
    model = nn.Sequential(nn.BatchNorm1d(x.shape[1], affine=False, eps=1e-6), nn.Linear(x.shape[1], classes)).double()
    model[1].weight.data, model[1].bias.data = start.T.double(), torch.zeros(classes).double()
    optimizer = torch.optim.SGD(model[1].parameters(), lr=1.0, momentum=0.9, weight_decay=0)
    batches = torch.Generator().manual_seed(seed)
    size, per_epoch = settings.batch_size, len(x) // settings.batch_size
    total, warmup, peak = settings.epochs * per_epoch, round(0.1 * settings.epochs * per_epoch), rate * size / 256
    for step in range(total):
        if step % per_epoch == 0:
            order = torch.randperm(len(x), generator=batches)
        rows = order[step % per_epoch * size :][:size]
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        factor = peak * (step + 1) / (warmup + 1) if step < warmup else 1e-6 + (peak - 1e-6) * cosine
        optimizer.param_groups[0]["lr"] = factor
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows].double()), y[rows]).backward()
        optimizer.step()
    return model.eval()


def test_every_probe_of_the_grid_equals_a_probe_trained_alone(make_features):
    train, test = make_features(150), make_features(60, seed=5)
    x, y = train[1, "cls"] * 3 + 2, train.labels
    grid = ProbeGrid(8, 4, QUICK, seed=3, device="cpu")
    grid.fit(x, y)
    predicted = grid.predict(test[1, "cls"])
    assert predicted.shape == (60, 13)
    for column, rate in enumerate(QUICK.learning_rates):
        alone = reference_probe(x, y, 4, rate, QUICK, seed=3)
        part = slice(4 * column, 4 * column + 4)
        torch.testing.assert_close(grid.weight[:, part].T.double(), alone[1].weight.data, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grid.bias[part].double(), alone[1].bias.data, rtol=1e-4, atol=1e-5)
        expected = alone(test[1, "cls"].double()).argmax(1)
        assert (predicted[:, column] == expected).float().mean() >= 59 / 60


def test_learns_separable_classes_and_reports_both_selections(make_features):
    scores = linear_probe(make_features(200, shift=6.0), make_features(80, shift=6.0, seed=9), QUICK)
    assert list(scores) == [(1, "cls"), (2, "mean")]
    for score in scores.values():
        assert score.best.accuracy == max(score.by_rate) == 1.0
        assert score.best_rate in QUICK.learning_rates
        assert score.selected.accuracy == score.by_rate[QUICK.learning_rates.index(score.selected_rate)]
        assert score.selected.accuracy <= score.best.accuracy
        assert score.selected.correct.shape == (80,)


def test_the_selected_rate_never_sees_the_test_set(make_features):
    train, test = make_features(200, shift=0.4), make_features(80, shift=0.4, seed=9)
    shuffled = dataclasses.replace(test, labels=test.labels.roll(1))
    first, second = linear_probe(train, test, QUICK), linear_probe(train, shuffled, QUICK)
    for key in first:
        assert first[key].selected_rate == second[key].selected_rate


def test_no_probe_trains_on_the_held_out_part(make_features, monkeypatch):
    rows = []
    fit = ProbeGrid.fit
    monkeypatch.setattr(ProbeGrid, "fit", lambda self, x, y: rows.append(len(x)) or fit(self, x, y))
    train, test = make_features(200), make_features(40, seed=2)
    linear_probe(train, test, QUICK)
    whole = linear_probe(train, test, dataclasses.replace(QUICK, held_out=0.0))
    assert rows == [180, 180, 200, 200]
    assert all(score.selected is None and score.selected_rate is None for score in whole.values())


def test_same_seed_same_numbers(make_features):
    train, test = make_features(120), make_features(40, seed=2)
    first, second, other = (linear_probe(train, test, QUICK, seed=seed)[1, "cls"].by_rate for seed in (0, 0, 1))
    assert first == second != other


def test_train_set_smaller_than_a_batch(make_features):
    score = linear_probe(make_features(40, shift=6.0), make_features(40, shift=6.0, seed=1))[1, "cls"]
    assert score.best.accuracy == 1.0


@pytest.mark.parametrize(
    "wrong",
    [{"learning_rates": ()}, {"learning_rates": (0.2, 0.1)}, {"epochs": 0}, {"batch_size": 1}, {"held_out": 1.0}],
)
def test_unusable_settings_are_refused(make_features, wrong):
    with pytest.raises(InputError, match="linear probe"):
        linear_probe(make_features(), make_features(), dataclasses.replace(QUICK, **wrong))


def test_labels_are_needed(make_features):
    with pytest.raises(DataError, match="test images have no labels"):
        linear_probe(make_features(), dataclasses.replace(make_features(), labels=None), QUICK)
