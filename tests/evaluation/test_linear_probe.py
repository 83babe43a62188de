"""The stacked probes against one torch module and optimizer for each learning rate."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mim_refiner.core.run import Run
from mim_refiner.errors import DataError
from mim_refiner.evaluation.features import Features
from mim_refiner.evaluation.linear_probe import (
    LinearProbeSettings,
    ProbeGrid,
    fitted_probe,
    linear_probe,
    paper_sets,
    probe_sets,
)
from mim_refiner.evaluation.splits import stratified_folds
from mim_refiner.training.traces import LiveBytes

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
    grid = ProbeGrid([((1, "cls"),)], train, 4, QUICK, Run(seed=3))
    grid.fit(lambda _: x.__getitem__, y)
    predicted = grid.predict(test[1, "cls"])[:, 0]
    assert predicted.shape == (60, 13)
    for column, rate in enumerate(QUICK.learning_rates):
        alone = reference_probe(x, y, 4, rate, QUICK, seed=3)
        part = slice(4 * column, 4 * column + 4)
        torch.testing.assert_close(grid.weights[0][:, part].T.double(), alone[1].weight.data, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grid.biases[0][part].double(), alone[1].bias.data, rtol=1e-4, atol=1e-5)
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
    monkeypatch.setattr(ProbeGrid, "fit", lambda self, x, y: rows.append(len(y)) or fit(self, x, y))
    train, test = make_features(200), make_features(40, seed=2)
    linear_probe(train, test, QUICK)
    whole = linear_probe(train, test, QUICK.model_copy(update={"held_out": 0.0}))
    assert rows == [133, 133, 134, 200, 200]  # one pass for both (block, pooling)
    monkeypatch.setattr("mim_refiner.evaluation.linear_probe.ENOUGH_HELD_OUT", 20)
    linear_probe(train, test, QUICK)
    assert rows[5:] == [180]
    assert all(score.selected is None and score.selected_rate is None for score in whole.values())


def test_few_images_are_each_held_out_once_and_the_scored_probe_trains_on_all(make_features):
    train, test, key = make_features(200, shift=1.0), make_features(100, shift=1.0, seed=2), (1, "cls")
    found = linear_probe(train, test, QUICK, Run(seed=3))[key]
    right = torch.zeros(len(QUICK.learning_rates), dtype=torch.float64)
    parts = stratified_folds(train.labels.numpy(), 3, 3)
    for number, rows in enumerate(parts):  # slowly: a probe for each part
        rest = np.concatenate([part for other, part in enumerate(parts) if other != number])
        grid = ProbeGrid([(key,)], train, 4, QUICK, Run(seed=3))
        grid.fit(lambda _, grid=grid, rest=rest: grid.rows(train, torch.from_numpy(rest)), train.labels[rest])
        right += grid.correct(train, torch.from_numpy(rows), train.labels)[:, 0].sum(0)
    chosen = int(right.argmax())
    assert found.selected_rate == QUICK.learning_rates[chosen]
    assert found.held_out_accuracy == pytest.approx(float(right[chosen]) / 200)
    whole = linear_probe(train, test, QUICK.model_copy(update={"held_out": 0.0}), Run(seed=3))[key]
    assert found.by_rate == whole.by_rate
    assert found.selected.accuracy == whole.by_rate[chosen]


def test_a_rate_is_selected_on_three_images_too_and_fewer_are_refused(make_features):
    for images in (3, 9):
        found = linear_probe(make_features(images, classes=2), make_features(10, classes=2, seed=1), QUICK)
        assert all(score.selected is not None for score in found.values())
    with pytest.raises(DataError, match="too few images to hold each of 3 parts out once: 2; give more"):
        linear_probe(make_features(2, classes=2), make_features(10, classes=2, seed=1), QUICK)


def test_what_the_rate_is_selected_by_is_told_as_it_is_done():
    settings, held, folds = LinearProbeSettings(), "best on a held-out part of train", "best by 3-fold cross-validation"
    assert settings.selection(9_999) == f"{folds} on train"
    assert settings.selection(10_000) == settings.selection(9_999, augmented=True) == held
    assert settings.model_copy(update={"held_out": 0.0}).selection(9_999) == "best on train itself"


def test_same_seed_same_numbers(make_features):
    train, test = make_features(120), make_features(40, seed=2)
    first, second, other = (linear_probe(train, test, QUICK, Run(seed=seed))[1, "cls"].by_rate for seed in (0, 0, 1))
    assert first == second != other


def test_train_set_smaller_than_a_batch(make_features):
    score = linear_probe(make_features(40, shift=6.0), make_features(40, shift=6.0, seed=1))[1, "cls"]
    assert score.best.accuracy == 1.0


def test_labels_are_needed(make_features):
    with pytest.raises(DataError, match="test images have no labels"):
        linear_probe(make_features(), dataclasses.replace(make_features(), labels=None), QUICK)


@pytest.fixture
def four_blocks():
    """Class-shifted features of four blocks and both poolings, widths all different from each other."""

    def make(count, seed):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % 4
        centres = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
        values = {
            (block, name): centres[labels] * (1 + block) + torch.randn(count, 6, generator=generator)
            for block in range(4)
            for name in ("cls", "mean")
        }
        return Features(values, labels, torch.arange(count), depth=4)

    return make


def test_the_papers_grid_is_52_probes_in_four_runs_of_columns():
    settings = LinearProbeSettings()
    sets = paper_sets(range(12), ("cls", "mean"), settings)
    assert [len(feature_set) for feature_set in sets] == [1, 2, 4, 8]
    assert sets[0] == ((11, "cls"),)
    assert {key[0] for key in sets[3]} == {8, 9, 10, 11}
    assert len(sets) * len(settings.learning_rates) == 52
    features = Features({key: torch.zeros(1, 5) for key in sets[3]}, None, torch.arange(1), depth=12)
    grid = ProbeGrid(sets, features, 2, settings, Run())
    assert all(isinstance(columns, slice) for columns in grid.columns)  # no copies
    assert paper_sets([0, 1], ("mean",), settings) == [((1, "mean"),), ((0, "mean"), (1, "mean"))]
    assert paper_sets([3], ("cls", "mean"), settings.model_copy(update={"concatenate": False})) == [((3, "cls"),)]


def test_sets_trained_together_equal_probes_trained_alone(four_blocks):
    train, test = four_blocks(96, 0), four_blocks(60, 1)
    sets = [*paper_sets(range(4), ("cls", "mean"), QUICK), ((0, "cls"), (2, "mean"))]  # the last is no run of columns
    grid = ProbeGrid(sets, train, 4, QUICK, Run(seed=2))
    x, queries = (torch.cat([part[key] for key in grid.keys], 1) for part in (train, test))
    grid.fit(lambda _: x.__getitem__, train.labels)
    predicted = grid.predict(queries)
    assert predicted.shape == (60, 5, 13)
    for number, columns in enumerate(grid.columns):
        for rate in (1e-3, 0.1):
            alone = reference_probe(x[:, columns], train.labels, 4, rate, QUICK, seed=2)
            expected = alone(queries[:, columns].double()).argmax(1)
            found = predicted[:, number, QUICK.learning_rates.index(rate)]
            assert (found == expected).float().mean() >= 59 / 60


def test_features_larger_than_the_room_are_sent_by_batch_to_the_same_effect(four_blocks):
    train, sets = four_blocks(4000, 0), paper_sets(range(4), ("cls", "mean"), QUICK)
    chosen, peaks, weights = torch.arange(3000), [], []
    size = len(chosen) * 48 * 4
    for room in (size, size - 1):
        grid = ProbeGrid(sets, train, 4, QUICK, Run(seed=2))
        with LiveBytes() as live:
            take = grid.rows(train, chosen, room)
            grid.fit(lambda _, take=take: take, train.labels[chosen])
        peaks.append(live.peak)
        weights.append(torch.cat([weight.flatten() for weight in grid.weights]))
    assert torch.equal(*weights)
    assert peaks[0] > size
    assert peaks[1] < size / 2


def test_every_set_is_scored_under_its_own_name(four_blocks):
    train, test = four_blocks(96, 0), four_blocks(60, 1)
    sets = paper_sets(range(4), ("cls", "mean"), QUICK)
    together = probe_sets(train, test, sets, QUICK, Run(seed=2))
    assert list(together) == sets
    first = probe_sets(train, test, sets[:1], QUICK, Run(seed=2))[sets[0]]
    assert together[sets[0]].by_rate == pytest.approx(first.by_rate, abs=1 / 60)


def test_augmented_epochs_are_asked_for_one_by_one(four_blocks):
    train, test, asked = four_blocks(96, 0), four_blocks(60, 1), []

    def features(epoch):
        asked.append(epoch)
        return train

    sets = [((3, "cls"),)]
    whole = QUICK.model_copy(update={"held_out": 0.0})
    fixed = probe_sets(train, test, sets, whole)
    found = probe_sets(train, test, sets, whole, epoch_features=features)
    assert asked == [0, 1, 2]
    assert found[sets[0]].by_rate == fixed[sets[0]].by_rate


def test_a_fitted_probe_chooses_among_the_classes_that_occur(make_features):
    train, test = make_features(200, shift=6.0), make_features(40, shift=6.0, seed=1)
    predict = fitted_probe(train, (1, "cls"), QUICK, Run())
    assert (predict(test[1, "cls"], None) == test.labels).float().mean() > 0.85
    assert set(predict(test[1, "cls"], torch.tensor([1, 3])).tolist()) == {1, 3}
