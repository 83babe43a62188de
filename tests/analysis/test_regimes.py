from __future__ import annotations

import numpy as np
import pytest

from mim_refiner.analysis.reconstruction import find_regimes, improvement_shares, regimes_record

KNN = [0.10, 0.14, 0.18, 0.22, 0.40, 0.60, 0.55, 0.50]
ERROR = [0.90, 0.80, 0.70, 0.60, 0.58, 0.56, 0.50, 0.40]


def test_shares_equal_a_loop_and_sum_to_one_at_the_best_block():
    shares = improvement_shares(KNN)
    slow = [0.0] + [(KNN[b] - KNN[b - 1]) / (max(KNN) - KNN[0]) for b in range(1, 8)]
    assert shares.tolist() == pytest.approx(slow)
    assert shares[:6].sum() == pytest.approx(1)
    assert improvement_shares([0.5, 0.4, 0.3]).tolist() == [0, 0, 0]


def test_the_three_regimes_of_the_paper():
    assert find_regimes(KNN, ERROR) == {"early": [0, 1, 2, 3], "middle": [4, 5], "late": [6, 7]}


def test_middle_is_the_best_of_all_runs_that_end_at_the_peak():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        knn, error = rng.random(9), rng.random(9)
        found = find_regimes(knn, error)
        peak = int(knn.argmax())
        assert found["early"] + found["middle"] + found["late"] == list(range(9))
        assert found["late"] == list(range(peak + 1, 9))
        if peak:
            ahead = improvement_shares(knn) - improvement_shares(-error)
            best = max(range(1, peak + 1), key=lambda s: (ahead[s : peak + 1].sum(), -s))
            assert found["middle"] == list(range(best, peak + 1))


@pytest.mark.parametrize(("knn", "late"), [([0.1, 0.2, 0.3], []), ([0.3, 0.2, 0.1], [1, 2]), ([0.1], [])])
def test_a_regime_may_be_missing(knn, late):
    found = find_regimes(knn, [0.9] * len(knn))
    assert found["late"] == late
    assert [block for blocks in found.values() for block in blocks] == list(range(len(knn)))


def test_record_and_its_sentence():
    curve = {"value": KNN, "ci95": [[v - 0.02, v + 0.02] for v in KNN], "peak_before_last": True}
    errors = np.array(ERROR)[:, None] + np.array([-0.1, 0.1])
    record = regimes_record({"before": curve}, {"before": errors}, pooling="cls")
    model = record["models"]["before"]
    assert model["error"] == pytest.approx(ERROR)
    assert model["statement"] == (
        "before, regimes by block: early 0 to 3 (k-NN accuracy +12.0 points, reconstruction error -0.300), "
        "middle 4 to 5 (k-NN accuracy +38.0 points, reconstruction error -0.040), "
        "late 6 to 7 (k-NN accuracy -10.0 points, reconstruction error -0.160)."
    )
    one = regimes_record({"a": {**curve, "value": [0.1, 0.2, 0.9, 0.3, 0.3, 0.3, 0.3, 0.3]}}, {"a": errors})
    assert ", middle 2 (k-NN" in one["models"]["a"]["statement"]
    rising = {**curve, "value": sorted(KNN), "peak_before_last": False}
    assert "no late regime" in regimes_record({"a": rising}, {"a": errors})["models"]["a"]["statement"]
    assert (
        "within chance"
        in regimes_record({"a": {**curve, "peak_before_last": False}}, {"a": errors})["models"]["a"]["statement"]
    )


def test_equal_blocks_are_no_late_fall():
    """As the curve of the blocks has it: the last of equal ones is the best."""
    assert find_regimes([0.2, 0.5, 0.5], [0.9, 0.6, 0.5])["late"] == []
    assert find_regimes([0.2, 0.5, 0.5, 0.4], [0.9, 0.6, 0.5, 0.4])["late"] == [3]
