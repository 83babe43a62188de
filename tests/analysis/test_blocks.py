"""Curves over blocks, from results made by hand and from two tiny encoders."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from mim_refiner.analysis.blocks import curves_from_results, knn_by_block
from mim_refiner.core.metrics import accuracy_interval, paired_interval
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source
from mim_refiner.errors import InputError
from mim_refiner.evaluation.results import Result
from mim_refiner.evaluation.settings import EvaluationSettings
from mim_refiner.models.backbone import Backbone


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
    difference, low, high = paired_interval(hits[2], hits[1])
    assert cls["peak_minus_last"] == {"value": difference, "ci95": [low, high]}
    assert record["head_blocks"] == [1, 2]
    assert record["statements"][0].endswith("the peak is before the last block.")
    assert record["statements"][1].endswith("which is the last block.")
    assert record["change"] == {}


def test_a_peak_within_chance_is_not_called_one():
    curve = curves_from_results({"before": results([0.2, 0.55, 0.5], count=60)}).record
    entry = curve["curves"]["before"]["cls"]
    assert (entry["peak_block"], entry["peak_before_last"]) == (1, False)
    assert curve["statements"][0].endswith("not clearly before the last block.")


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


def test_results_without_k_nn_are_refused():
    with pytest.raises(InputError, match="no k-NN result"):
        curves_from_results({"before": {}})


def test_two_encoders_end_to_end(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = (rng.integers(0, 256, (3, 1, 1, 3))[labels] // 2 + rng.integers(0, 128, (60, 32, 32, 3))).astype(np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=labels)
    models = {}
    for seed, name in enumerate(["before", "after"]):
        torch.manual_seed(seed)
        vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0)
        models[name] = Backbone.wrap(vit)
    data = ImageSet(open_source(tmp_path / "set.npz"))
    curves = knn_by_block(models, data, None, head_blocks=[2], settings=EvaluationSettings(knn_k=3), poolings=["mean"])
    path = curves.write(tmp_path / "out")
    record = json.loads(path.read_text())
    assert record == json.loads(json.dumps(curves.record))
    assert list(record["curves"]) == ["before", "after"]
    assert record["curves"]["after"]["mean"]["blocks"] == [0, 1, 2]
    with np.load(tmp_path / "out" / "blocks.npz") as arrays:
        assert arrays["after/mean"].shape == (3, 12)
        assert arrays["after/mean"].mean(1).tolist() == pytest.approx(record["curves"]["after"]["mean"]["value"])
