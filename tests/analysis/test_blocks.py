"""Curves over blocks, from results and scores made by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mim_refiner.analysis.blocks import curves_from_results, curves_from_scores
from mim_refiner.core.metrics import accuracy_interval, best_of_many_interval, paired_interval
from mim_refiner.evaluation.results import Result


def results(rates, pooling="cls", seed=0, count=300):
    """k-NN results of blocks 0, 1, ... with the given accuracies."""
    found = {}
    for block, rate in enumerate(rates):
        correct = np.random.default_rng([seed, block]).permutation(count) < rate * count
        accuracy, low, high = accuracy_interval(correct)
        result = Result(
            "knn",
            "knn_top1",
            accuracy,
            (low, high),
            block,
            pooling,
            False,
            {"k": 10},
            {"train": "x"},
            None,
            0,
            correct=correct,
        )
        found[result.name] = result
    return found


def test_peak_before_the_last_block_is_found_and_said():
    before = {**results([0.2, 0.7, 0.4]), **results([0.2, 0.4, 0.7], pooling="mean")}
    curves = curves_from_results({"before": before}, head_blocks=[1, 2])
    record = curves.record
    cls, mean = record["curves"]["before"]["cls"], record["curves"]["before"]["mean"]
    assert (cls["peak_block"], cls["peak_before_last"], cls["blocks"]) == (1, True, [0, 1, 2])
    assert (mean["peak_block"], mean["peak_before_last"]) == (2, False)
    hits = curves.correct["before/cls"]
    difference, low, high = best_of_many_interval(hits[:2].astype(float) - hits[2])
    assert cls["peak_minus_last"] == {"value": difference, "ci95": [low, high]}
    assert mean["peak_minus_last"] == {"value": 0.0, "ci95": [0.0, 0.0]}
    assert record["head_blocks"] == [1, 2]
    assert record["statements"][0].count(", clearly better than at the last block") == 1
    assert record["statements"][1].endswith("the last one.")
    assert record["change"] == {}


def test_a_peak_within_chance_is_not_called_one():
    curve = curves_from_results({"before": results([0.2, 0.55, 0.5], count=60)}).record
    entry = curve["curves"]["before"]["cls"]
    assert (entry["peak_block"], entry["peak_before_last"]) == (1, False)
    assert curve["statements"][0].count("not clearly better than at the last block") == 1


def test_few_images_give_no_impossible_interval_and_no_peak_among_equals():
    curve = curves_from_results({"before": results([1.0, 0.0, 0.0], count=1)}).record["curves"]["before"]["cls"]
    low, high = curve["peak_minus_last"]["ci95"]
    assert -1 <= low < 0 < high <= 1
    equal = curves_from_results({"before": results([0.2, 0.5, 0.5], count=10)}).record
    assert equal["curves"]["before"]["cls"]["peak_block"] == 2
    assert equal["statements"][0].endswith("the last one.")


def test_a_flat_curve_is_rarely_said_to_peak_early():
    """12 blocks of the same accuracy: at most 5 % of 200 curves; the interval of two blocks alone said it of 13 %."""
    rng, alone, said = np.random.default_rng(0), 0, 0
    for _ in range(200):
        hits = (rng.standard_normal(80) + rng.standard_normal((12, 80)) < -0.4).astype(float)
        curve = curves_from_scores({"a": {"cls": dict(enumerate(hits))}}).record["curves"]["a"]["cls"]
        said += curve["peak_before_last"]
        alone += curve["peak_block"] < 11 and paired_interval(hits[-1], hits[curve["peak_block"]])[1] > 0
    assert said <= 10 < alone


def test_change_is_paired_to_the_first_model():
    before, after = results([0.2, 0.7, 0.4]), results([0.2, 0.7, 0.9], seed=1)
    curves = curves_from_results({"before": before, "after": after})
    change = curves.record["change"]["after"]["cls"]
    for block in range(3):
        expected = paired_interval(curves.correct["before/cls"][block], curves.correct["after/cls"][block])
        assert (change["value"][block], *change["ci95"][block]) == expected
    assert change["ci95"][2][0] > 0


def test_models_of_different_depth_get_curves_but_no_differences():
    curves = curves_from_results({"before": results([0.2, 0.4]), "after": results([0.2, 0.3, 0.4])})
    assert curves.record["change"] == {}
    assert len(curves.record["curves"]["after"]["cls"]["value"]) == 3


def test_curves_from_scores():
    rng = np.random.default_rng(0)
    scores = {name: {"mean": {b: rng.random(12) for b in range(3)}} for name in ("before", "after")}
    curves = curves_from_scores(scores, measure="consistency", head_blocks=[2], seed=1)
    record = curves.record
    assert record == json.loads(json.dumps(record))
    assert (record["measure"], record["seed"], list(record["curves"])) == ("consistency", 1, ["before", "after"])
    assert record["curves"]["after"]["mean"]["value"] == pytest.approx(
        [x.mean() for x in scores["after"]["mean"].values()]
    )
    assert record["statements"][0].startswith("before, mean pooling: neighbour consistency is best")
    assert curves.correct["after/mean"].tolist() == [x.tolist() for x in scores["after"]["mean"].values()]
