"""The words of the label-free verdict on planted cases, and on the recorded measures of the study."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mim_refiner.analysis.label_free import LabelFreeMeasures, distinct_rows, label_free_measures
from mim_refiner.analysis.verdict import Change, judged, label_free_verdict


def measures(noise, seed=0, count=150, directions=12, mean=0.0, spread=1.0):
    """Images are points; views are noisy copies of them. ``directions`` of 12 carry the variance."""
    rng = np.random.default_rng(seed)
    scale = spread * np.where(np.arange(12) < directions, 1.0, 1e-3)
    clean = rng.normal(size=(count, 12)) * scale
    made = [clean + s * noise * scale * rng.normal(size=clean.shape) + mean for s in (0, 1, 1)]
    return label_free_measures(*(torch.from_numpy(x).float() for x in made), seed=seed, pairs=2)


def word(before, after, seed=0):
    found = label_free_verdict(before, after, seed=seed)
    assert "better" not in found["verdict"] + found["reason"]
    return found["verdict"]


@pytest.mark.parametrize("seed", range(3))
def test_three_words(seed):
    rough, fine = measures(1.0, seed), measures(0.5, seed)
    sound, worse, same = (label_free_verdict(*pair, seed=seed) for pair in ((rough, fine), (fine, rough), (fine, fine)))
    assert (sound["verdict"], worse["verdict"], same["verdict"]) == ("no collapse seen", "worse", "no clear change")
    consistency = sound["measures"][0]
    assert consistency["measure"] == "neighbour consistency"
    assert consistency["ci95"][0] <= consistency["difference"] <= consistency["ci95"][1]
    assert sound["reason"].startswith("Two views of an image share more of their neighbours than before")
    assert "proves no gain" in sound["reason"]
    assert "better" not in sound["reason"]
    assert [row["measure"] for row in sound["measures"]][2:4] == ["effective rank", "effective rank, centred"]
    assert all(row["difference"] == 0 for row in same["measures"])


@pytest.mark.parametrize("directions", [1, 3, 4], ids=["collapse", "to a quarter", "to a third"])
@pytest.mark.parametrize("seed", range(3))
def test_lost_directions_are_worse_however_consistent_the_neighbours(seed, directions):
    before, after = measures(1.0, seed), measures(0.1, seed, directions=directions)
    assert after.consistency.mean() > before.consistency.mean()
    found = label_free_verdict(before, after, seed=seed)
    assert found["verdict"] == "worse"
    assert "effective rank" in found["reason"]


@pytest.mark.parametrize("seed", range(3))
def test_a_rank_that_falls_by_half_is_worse_unless_the_neighbours_agree_more(seed):
    """Found on weights drawn at random: training halved their rank, and consistency and k-NN accuracy rose."""
    before, same, surer = measures(0.5, seed), measures(0.85, seed, directions=6), measures(0.2, seed, directions=6)
    assert word(before, same) == "worse"
    found = label_free_verdict(before, surer)
    assert found["verdict"] == "no clear change"
    assert "but two views share more of their neighbours" in found["reason"]


@pytest.mark.parametrize("spread", [0.0, 1e-8, 1e-4, 1e-2])
def test_an_encoder_that_says_nearly_the_same_of_all_images_is_worse(spread):
    """Whatever is left beside the mean: nothing, rounding, or a little that would look sound by itself."""
    sound, constant = measures(0.5), measures(0.1, mean=3.0, spread=spread)
    assert word(sound, constant) == "worse"
    if spread <= 1e-8:  # what such an encoder had for neighbours is no measure to fall from
        assert word(constant, sound) == "no collapse seen"


def test_equal_features_have_no_neighbours():
    constant = measures(0.0, mean=3.0, spread=0.0)
    assert constant.consistency.tolist() == [0.0] * 150


def test_a_larger_mean_or_scale_alone_is_no_harm():
    """Training moves both: the effective rank as published falls with the mean, on features that are as good."""
    before = measures(0.5)
    assert word(before, measures(0.5, mean=1.0)) == word(before, measures(0.5, spread=100.0)) == "no clear change"


def test_small_changes_are_not_clear_however_certain(monkeypatch):
    before = measures(1.0)
    shifted = LabelFreeMeasures(before.consistency + 0.01, before.retrieval, before.stability, before.features)
    found = label_free_verdict(before, shifted)
    assert found["verdict"] == "no clear change"
    assert found["measures"][0]["ci95"] == pytest.approx([0.01, 0.01])
    monkeypatch.setattr("mim_refiner.analysis.verdict.MIN_CHANGE", 0.005)
    assert word(before, shifted) == "no collapse seen"


def test_a_fall_within_chance_is_no_harm():
    flat, same, rose = Change(0.3, 0.3, -0.01, 0.01), Change(20.0, 20.0, -0.5, 0.5), Change(0.3, 0.4, 0.05, 0.15)
    chance, fell = Change(0.3, 0.2, -0.25, 0.05), Change(0.3, 0.2, -0.15, -0.05)
    assert judged(chance, flat, same, same)[0] == judged(flat, chance, same, same)[0] == "no clear change"
    assert judged(fell, flat, same, same)[0] == judged(rose, fell, same, same)[0] == "worse"
    assert judged(rose, flat, same, Change(20.0, 7.0, -27.0, 1.0))[0] == "no collapse seen"
    assert judged(rose, flat, same, Change(20.0, 7.0, -15.0, -11.0))[0] == "worse"


def test_drift_is_shown_and_decides_nothing():
    one = measures(1.0)
    found = label_free_verdict(one, one, drift=np.full(20, 0.8))
    assert found["verdict"] == "no clear change"
    assert found["measures"][-1]["measure"] == "drift of patch features"
    assert found["measures"][-1]["after"] == pytest.approx(0.8)


def test_copies_are_no_distinct_rows():
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)) + 5
    noisy = x.repeat(3, 1) * (1 + 1e-6 * torch.randn(90, 8, generator=torch.Generator().manual_seed(1)))
    assert [distinct_rows(each) for each in (x, noisy, x[:1].repeat(9, 1), torch.zeros(4, 3))] == [30, 30, 1, 1]


def test_a_change_within_its_interval_is_not_called_about_none():
    """Few images: twice the neighbours may be chance, and is not "about as many"."""
    twice, steady = Change(0.1, 0.2, -0.01, 0.21), Change(0.5, 0.5, 0.0, 0.0)
    found, why = judged(twice, steady, steady, steady)
    assert found == "no clear change"
    assert "neither clearly more nor clearly fewer" in why
    assert "10.0 % before, 20.0 % now" in why
    assert why.endswith("; it counts where the interval lies beyond 2 points.")
