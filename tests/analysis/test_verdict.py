from __future__ import annotations

from itertools import repeat
from typing import Any

import numpy as np
import pytest

from mim_refiner.analysis.verdict import verdict, what_next
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
    assert set(better) == {"verdict", "knn_difference", "ci95", "test_images", "reason"}


def test_small_samples_are_not_called_clear():
    before, after = np.array([0] * 5 + [1] * 5), np.array([0] * 4 + [1] * 6)
    found = verdict(before, after)
    assert found["verdict"] == "no clear change"
    assert found["reason"].startswith("k-NN accuracy rose by 10.0 points")
    assert "may be chance" in found["reason"]


def test_different_samples_are_refused():
    with pytest.raises(InputError, match="same samples"):
        verdict(hits(0, 0.5, 10), hits(0, 0.5, 11))


RECIPE = {
    "refinement": {"epochs": 10, "base_lr": 1e-3}, "anchor": {"weight": 0.0}, "heads": {"swap_positive": True},
    "guidance": "none",
}  # fmt: skip


AGAIN: dict[str, Any] = {"again": repeat("--out there"), "compared": "mim-refiner evaluate --model a"}


def test_what_to_try_next_follows_from_the_evidence():
    unclear = {"verdict": "no clear change", "ci95": [-0.03, 0.05], "test_images": 90}
    better = {"block": 8, "pooling": "mean"}
    said = what_next(unclear, RECIPE, **AGAIN, draws=5000, recommendation=better, last_block=11)
    assert [line.partition(":")[0] for line in said] == [
        "more images to measure on", "a longer run",
        "positives without neighbours, which gave a small encoder more in a short run (docs/evidence.md)",
        "other features without any training, which are better",
    ]  # fmt: skip
    assert "with 90 no change below 4.0 points shows" in said[0]
    assert "--set refinement.epochs=20" in said[1]
    assert said[0].endswith(": mim-refiner evaluate --model a")
    assert said[2].endswith("--set heads.swap_positive=false --out there")
    assert said[3].endswith("embed and export with --block 8 --pooling mean")
    for settings in ({"heads": {"swap_positive": False}}, {"guidance": "restrict"}):  # nothing to turn off, or no use
        other = what_next(unclear, RECIPE | settings, **AGAIN, draws=5000)
        assert not any("without neighbours" in line for line in other)
    few = {"verdict": "no clear change", "measures": [{"measure": "neighbour consistency", "ci95": [-0.03, 0.14]}],
           "samples": {"images": 20}}  # fmt: skip
    assert "with 20 no change below 8.5 points shows" in what_next(few, RECIPE, **AGAIN, draws=5000)[0]
    narrow = {"verdict": "no clear change", "ci95": [-0.005, 0.005]}
    enough: dict[str, Any] = {"draws": 2_000_000, "last_block": 11}
    assert what_next(narrow, RECIPE, **AGAIN, recommendation={"block": 11}, **enough) == []

    said = what_next({"verdict": "worse"}, RECIPE, **AGAIN, draws=5000, knn=[0.3, 0.4, 0.35, 0.2])
    assert all(line.endswith("--out there") for line in said)  # the run's own folder takes no other settings
    assert "--set refinement.epochs=5" in said[0]
    assert "best (40.0 %) after 50 %" in said[0]
    assert "--set refinement.base_lr=0.0005" in said[1]
    assert "anchor.weight=1" in said[2]
    for word in ("no clear change", "better", "not measured"):  # of the state before the harm
        ended = what_next(unclear | {"verdict": word}, RECIPE, **AGAIN, draws=5000, stopped=True)
        assert [line.partition(":")[0] for line in ended] == [line.partition(":")[0] for line in said[1:]]
    falling = what_next({"verdict": "worse"}, RECIPE, **AGAIN, draws=5000, knn=[0.4, 0.3, 0.2])
    assert not any("shorter" in line for line in falling)
    for word in ("better", "no collapse seen", "not measured"):
        assert what_next({"verdict": word}, RECIPE, **AGAIN, draws=5000) == []
