"""The three words of the label-free verdict, from features made by hand, over seeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mim_refiner.analysis.label_free import LabelFreeMeasures, label_free_measures
from mim_refiner.analysis.verdict import label_free_verdict


def measures(noise, seed, count=150, directions=12):
    """Images are points; views are noisy copies of them. ``directions`` of 12 carry the variance."""
    rng = np.random.default_rng(seed)
    scale = np.where(np.arange(12) < directions, 1.0, 1e-3)
    clean = rng.normal(size=(count, 12)) * scale
    made = [torch.from_numpy(clean + s * noise * scale * rng.normal(size=clean.shape)).float() for s in (0, 1, 1)]
    return label_free_measures(*made, seed=seed, pairs=3)


@pytest.mark.parametrize("seed", range(3))
def test_three_words(seed):
    rough, fine = measures(1.0, seed), measures(0.5, seed)
    sound, worse, same = (label_free_verdict(*pair, seed=seed) for pair in ((rough, fine), (fine, rough), (fine, fine)))
    assert (sound["verdict"], worse["verdict"], same["verdict"]) == ("no collapse seen", "worse", "no clear change")
    consistency = sound["measures"][0]
    assert consistency["measure"] == "neighbour consistency"
    assert consistency["ci95"][0] <= consistency["difference"] <= consistency["ci95"][1]
    assert sound["reason"].startswith("Two views of an image share more of their neighbours than before")
    assert "better" not in sound["reason"]
    assert [row["measure"] for row in sound["measures"]][2:4] == ["effective rank", "effective rank, centred"]
    assert same["confidence"] == {
        "word": "high",
        "bootstrap_agreement": 1.0,
        "against": [],
        "why": "100 % of resamples agree, and no other measure objects",
    }
    assert all(row["difference"] == 0 for row in same["measures"])


@pytest.mark.parametrize("seed", range(3))
def test_collapse_is_worse_however_consistent_the_neighbours(seed):
    before, after = measures(1.0, seed), measures(0.1, seed, directions=1)
    found = label_free_verdict(before, after, seed=seed)
    assert after.consistency.mean() > before.consistency.mean()
    assert found["verdict"] == "worse"
    assert "collapsed" in found["reason"]


def test_small_changes_are_not_clear_however_certain(monkeypatch):
    before = measures(1.0, 0)
    shifted = LabelFreeMeasures(before.consistency + 0.01, before.retrieval, before.stability, before.features)
    found = label_free_verdict(before, shifted)
    assert found["verdict"] == "no clear change"
    assert found["measures"][0]["ci95"] == pytest.approx([0.01, 0.01])
    monkeypatch.setattr("mim_refiner.analysis.verdict.MIN_CHANGE", 0.005)
    assert label_free_verdict(before, shifted)["verdict"] == "no collapse seen"


def test_a_measure_that_objects_lowers_the_confidence():
    before, after = measures(1.0, 0), measures(0.5, 0)
    other = LabelFreeMeasures(after.consistency, before.retrieval - 1, before.stability - 0.5, after.features)
    found = [label_free_verdict(before, one) for one in (after, other)]
    assert [verdict["verdict"] for verdict in found] == ["no collapse seen"] * 2
    assert [verdict["confidence"]["word"] for verdict in found] == ["high", "medium"]
    assert [verdict["confidence"]["against"] for verdict in found] == [[], ["view retrieval"]]


def test_consistency_won_by_losing_rank_is_no_clear_change():
    """Found on a refinement at twice the learning rate: consistency +9 points, rank x 0.71, k-NN unchanged."""
    before, after = measures(1.0, 0), measures(0.5, 0)
    thin = after.features * torch.tensor([1.0] * 8 + [0.01] * 4)  # effective rank between 50 and 75 %
    found = label_free_verdict(before, LabelFreeMeasures(after.consistency, after.retrieval, after.stability, thin))
    assert found["verdict"] == "no clear change"
    assert "but the effective rank of the features fell" in found["reason"]
    assert found["confidence"]["word"] != "high"
    assert "neighbour consistency" in found["confidence"]["against"]
    worse = label_free_verdict(after, LabelFreeMeasures(before.consistency, before.retrieval, before.stability, thin))
    assert worse["verdict"] == "worse"


def test_drift_is_shown_and_decides_nothing():
    one = measures(1.0, 0)
    found = label_free_verdict(one, one, drift=np.full(20, 0.8))
    assert found["verdict"] == "no clear change"
    assert found["measures"][-1]["measure"] == "drift of patch features"
    assert found["measures"][-1]["after"] == pytest.approx(0.8)
