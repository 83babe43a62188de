"""The whole evaluation of a tiny encoder: names, files, splits, and refusals before any work."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mim_refiner.core.identity import weights_sha256
from mim_refiner.core.metrics import effective_rank
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError, InputError, RunFolderError
from mim_refiner.evaluation.attentive import AttentiveSettings
from mim_refiner.evaluation.corruptions import RobustnessSettings
from mim_refiner.evaluation.features import extract_features
from mim_refiner.evaluation.finetune import FinetuneSettings
from mim_refiner.evaluation.knn import knn_protocol
from mim_refiner.evaluation.linear_probe import LinearProbeSettings
from mim_refiner.evaluation.results import CONTRACT_FIELDS, paired_change
from mim_refiner.evaluation.settings import EvaluationSettings
from mim_refiner.evaluation.splits import LongTailSettings
from mim_refiner.evaluation.suite import (
    evaluate_backbone,
    suite_protocols,
    suite_settings,
    summary_metrics,
    write_results,
)
from mim_refiner.models.backbone import Backbone

QUICK = EvaluationSettings(knn_k=5, linear=LinearProbeSettings(epochs=3, batch_size=16), cluster_seeds=2)
ALL = ("knn", "linear", "clustering", "rank")


def test_every_protocol_writes_its_files(make_backbone, make_images, tmp_path):
    backbone, train, test = make_backbone(), make_images(60), make_images(30, seed=1)
    options = {"protocols": ALL, "settings": QUICK, "run": Run(seed=3)}
    results = evaluate_backbone(backbone, train, test, **options)
    write_results(results.values(), tmp_path / "run")
    clusters = ["cluster_accuracy", "nmi", "ami", "ari", "silhouette", "davies_bouldin"]
    metrics = ["knn_top1", "knn_top1_last3", "linear_top1_best", "linear_top1", *clusters, "rank", "rank_centred"]
    expected = {f"{metric}-block02-{pooling}" for metric in metrics for pooling in ("cls", "mean")}
    for metric in ("linear_top1", "linear_top1_best"):
        expected |= {f"{metric}-block02-cls+mean", f"{metric.replace('top1', 'top1_last3')}-block02-cls"}
        expected |= {f"{metric.replace('top1', 'top1_last3')}-block02-cls+mean"}
    expected |= {"linear_top1_grid-block02-grid", "linear_top1_grid_best-block02-grid"}
    assert set(results) == expected
    grid = results["linear_top1_grid_best-block02-grid"]
    assert grid.value == max(r.value for r in results.values() if r.metric.endswith("_best"))
    assert grid.settings["probes"] == 52
    assert grid.settings["selection"] == "best on test"
    assert results["linear_top1-block02-cls"].settings["selection"] == "best by 3-fold cross-validation on train"
    files = {path.name: path.read_text() for path in (tmp_path / "run" / "evaluation").iterdir()}
    assert set(files) == {f"{name}.json" for name in results}
    for name, result in results.items():
        record = json.loads(files[f"{name}.json"])
        assert tuple(record) == CONTRACT_FIELDS
        assert record == json.loads(json.dumps(result.to_json()))
        assert (record["block"], record["norm"], record["model_sha256"], record["seed"]) == (
            2,
            False,
            weights_sha256(backbone.model),
            3,
        )
        assert record["data"]["train"]["fingerprint"] == train.source.fingerprint()
        assert record["data"]["test"]["images"] == 30
        assert record["settings"]["image_size"] == 32
        if record["ci95"] is not None:
            assert record["ci95"][0] <= record["value"] <= record["ci95"][1]
            assert result.correct.mean() == pytest.approx(record["value"])
    assert {r.metric for r in results.values() if r.ci95 is None} == {*clusters[1:], "rank", "rank_centred"}

    again = evaluate_backbone(backbone, train, test, **options)
    write_results(again.values(), tmp_path / "run", "after-")
    for name in again:  # same seed, same bytes; the prefix keeps two encoders in one folder apart
        assert (tmp_path / "run" / "evaluation" / f"after-{name}.json").read_text() == files[f"{name}.json"]


def test_values_are_those_of_the_protocols(make_backbone, make_images):
    backbone, train, test = make_backbone(), make_images(60), make_images(30, seed=1)
    results = evaluate_backbone(
        backbone, train, test, protocols=("knn", "rank"), blocks=[1], poolings=["mean"], norm=True, settings=QUICK
    )
    bank, queries = (
        extract_features(backbone, images, blocks=[1], poolings=["mean"], norm=True) for images in (train, test)
    )
    expected = knn_protocol(bank, queries, k=5)[1, "mean"]
    found = results["knn_top1-block01-mean"]
    assert (found.value, found.ci95, found.norm) == (expected.accuracy, expected.ci95, True)
    assert (found.correct == expected.correct).all()
    assert results["rank-block01-mean"].value == pytest.approx(effective_rank(bank[1, "mean"]))


def test_without_a_test_set_a_stratified_fifth_is_held_out(make_backbone, make_images):
    train = make_images(60)
    results = evaluate_backbone(make_backbone(), train, None, protocols=("knn",), settings=QUICK, run=Run(seed=4))
    result = results["knn_top1-block02-cls"]
    assert len(result.correct) == 12
    assert result.data["test"] == {"share_of_train": 0.2, "split_seed": 4, "stratified": True}


def test_knn_may_cover_more_blocks_and_the_summary_collects(make_backbone, make_images):
    results = evaluate_backbone(
        make_backbone(),
        make_images(60),
        make_images(30, seed=1),
        protocols=ALL,
        blocks="-1",
        knn_blocks="all",
        settings=QUICK,
    )
    assert sorted(r.block for r in results.values() if r.metric == "knn_top1" and r.pooling == "cls") == [0, 1, 2]
    assert {r.block for r in results.values() if r.metric != "knn_top1"} == {2}
    assert all(len(r.settings["blocks"]) == 3 for r in results.values() if r.metric == "knn_top1_last3")
    summary = summary_metrics(results, block=2, pooling="cls")
    assert list(summary) == [
        "knn_top1",
        "linear_top1",
        "cluster_accuracy",
        "nmi",
        "rank",
        "rank_centred",
        "knn_by_block",
    ]
    assert summary["nmi"] == results["nmi-block02-cls"].value
    assert summary["knn_by_block"]["cls"][2] == summary["knn_top1"] == results["knn_top1-block02-cls"].value
    assert {pooling: len(row) for pooling, row in summary["knn_by_block"].items()} == {"cls": 3, "mean": 3}
    assert summary_metrics(results, block=0, pooling="cls")["linear_top1"] is None


def test_labels_are_needed_except_for_the_rank(make_backbone, make_images):
    bare = make_images(40, labelled=False)
    for protocol in ("knn", "linear", "clustering"):
        with pytest.raises(DataError, match=f"no labels, and protocol {protocol} needs them"):
            evaluate_backbone(make_backbone(), make_images(40), bare, protocols=(protocol,))
    assert evaluate_backbone(make_backbone(), bare, None, protocols=("rank",))["rank-block02-cls"].value > 1


def test_one_class_would_always_be_right(make_backbone, make_images):
    one = make_images(40, classes=1)
    for protocol in ("knn", "linear", "clustering"):
        with pytest.raises(
            DataError, match=f"all images have the label '0', and protocol {protocol} needs two classes"
        ):
            evaluate_backbone(make_backbone(), one, None, protocols=(protocol,))
    assert evaluate_backbone(make_backbone(), one, None, protocols=("rank",))["rank-block02-cls"].value > 1


def test_bad_requests_are_refused_before_any_work(make_backbone, make_images, tmp_path, monkeypatch):
    backbone, train = make_backbone(), make_images(40)
    monkeypatch.setattr(backbone, "forward_blocks", lambda *a, **k: pytest.fail("worked before it checked"))
    for options, words in [
        ({"protocols": ("knnn",)}, "did you mean 'knn'"),
        ({"protocols": ()}, "no protocol named"),
        ({"blocks": [3]}, "3 is out of range"),
        ({"poolings": ["max"]}, "'max' is unknown"),
    ]:
        with pytest.raises(InputError, match=words):
            evaluate_backbone(backbone, train, None, **options)


@pytest.mark.parametrize("protocol", ["finetune", "long_tail", "robustness", "segmentation"])
def test_protocols_made_for_photographs_refuse_other_channels(protocol, make_backbone, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 4), dtype=np.uint8)
    np.savez(tmp_path / "four.npz", images=pixels, labels=np.arange(20) % 2)
    images = ImageSet(open_source(tmp_path / "four.npz"), channels=4)
    with pytest.raises(InputError, match=f"protocol {protocol} takes RGB images, not 4 channels"):
        evaluate_backbone(make_backbone(), images, None, protocols=("rank", protocol))


def test_unwritable_folder(make_backbone, make_images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot write"):
        write_results(
            evaluate_backbone(make_backbone(), make_images(60), None, protocols=("rank",)).values(), tmp_path / "file"
        )


def colour_folder(root, classes, count):
    colours = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0), "white": (255, 255, 255)}
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            noise = np.random.default_rng(number).integers(-20, 20, (32, 32, 3))
            Image.fromarray((np.array(colours[name]) + noise).clip(0, 255).astype(np.uint8)).save(
                root / name / f"{number}.png"
            )
    return ImageSet(open_source(root))


def test_classes_are_matched_by_name_when_the_folders_differ(make_backbone, tmp_path):
    """The test folder lacks the first class, so its own numbering is off by one."""
    train = colour_folder(tmp_path / "train", ["blue", "green", "red"], 8)
    test = colour_folder(tmp_path / "test", ["green", "red"], 4)
    knn = {"protocols": ("knn",), "settings": QUICK.model_copy(update={"knn_k": 3})}
    results = evaluate_backbone(make_backbone(), train, test, **knn)
    assert results["knn_top1-block02-mean"].value == 1.0
    strange = colour_folder(tmp_path / "strange", ["green", "white"], 4)
    with pytest.raises(DataError, match="class 'white' does not occur"):
        evaluate_backbone(make_backbone(), train, strange, **knn)


def test_the_protocols_that_go_back_to_the_images(make_backbone, make_images, tmp_path):
    backbone, train, test = make_backbone(), make_images(60), make_images(30, seed=1)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    changes = {
        "finetune": FinetuneSettings(epochs=1, batch_size=20, shares=(0.5,)),
        "long_tail": LongTailSettings(imbalance=10, many=15, few=5),
        "robustness": RobustnessSettings(kinds=("contrast", "fog"), severities=(1, 5), images=12),
    }
    settings = QUICK.model_copy(update=changes)
    seconds = {}
    protocols = ("low_shot", "finetune", "long_tail", "robustness")
    shifted = {"other": make_images(20, classes=2, seed=5)}
    results = evaluate_backbone(
        backbone, train, test, protocols=protocols, settings=settings, seconds=seconds, shifted=shifted
    )
    assert set(seconds) == {"features", *protocols}
    metrics = {r.metric for r in results.values()}
    assert {f"low_shot_{shots}_top1" for shots in (1, 2, 5)} <= metrics
    assert {"finetune_50pct_top1", "robustness_knn_top1", "robustness_linear_top1"} <= metrics
    assert {"shift_other_knn_top1", "shift_other_linear_top1"} <= metrics
    for method in ("knn", "linear", "finetune"):
        overall = results[f"long_tail_{method}_top1-block02-cls"]
        parts = [results.get(f"long_tail_{method}_{name}-block02-cls") for name in ("many", "medium", "few")]
        sizes = [part.settings["test_images"] for part in parts if part]
        assert sum(sizes) == 30
        assert np.average([part.value for part in parts if part], weights=sizes) == pytest.approx(overall.value)
    chosen = results["long_tail_linear_top1-block02-cls"].settings["probe"]
    assert chosen["selection"] == "best by 3-fold cross-validation on train"
    assert chosen["selected_rate"] in settings.linear.learning_rates
    assert "probe" not in results["long_tail_knn_top1-block02-cls"].settings
    robust = results["robustness_knn_top1-block02-cls"]
    assert robust.settings["probe"]["selection"] == "best by 3-fold cross-validation on train"
    by_set = dict(robust.settings["accuracy_by_set"])
    assert set(by_set) == {"clean", "contrast/1", "contrast/5", "fog/1", "fog/5"}
    by_set.pop("clean")
    assert robust.value == pytest.approx(np.mean(list(by_set.values())))
    for result in results.values():
        assert result.ci95[0] <= result.value <= result.ci95[1]
        json.dumps(result.to_json(), allow_nan=False)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_a_pair_is_compared_image_by_image(make_backbone, make_images):
    train, test = make_images(60), make_images(30, seed=1)
    options = {"protocols": ("knn", "low_shot", "robustness"), "settings": QUICK.model_copy(
        update={"robustness": RobustnessSettings(kinds=("fog",), severities=(3,), classifiers=("knn",))})}  # fmt: skip
    first, second = (evaluate_backbone(make_backbone(seed), train, test, **options) for seed in (0, 1))
    for name, result in first.items():
        change, low, high = paired_change(result, second[name])
        assert change == pytest.approx(second[name].value - result.value)
        assert low <= change <= high
        assert paired_change(result, result)[0] == 0
    rank = evaluate_backbone(make_backbone(), train, test, protocols=("rank",))["rank-block02-cls"]
    assert paired_change(rank, rank) is None


def test_suites(make_images):
    labelled, bare = make_images(20), make_images(20, labelled=False)
    assert suite_protocols("quick", labelled) == ("knn", "linear", "low_shot", "clustering", "rank")
    assert "finetune" in suite_protocols("paper", labelled)
    for suite, images, words in (("dense", labelled, "no masks"), ("quick", bare, "no labels")):
        with pytest.raises(DataError, match=words):
            suite_protocols(suite, images)
    with pytest.raises(InputError, match="did you mean 'quick'"):
        suite_protocols("quik", labelled)
    assert suite_settings("paper").linear.augment
    assert suite_settings("quick").cluster_seeds == 10


@pytest.mark.parametrize(("protocols", "passes"), [(("attentive",), 0), (("attentive", "rank"), 1)])
def test_protocols_that_read_images_alone_cost_no_features(make_backbone, make_images, monkeypatch, protocols, passes):
    """The images are still tried: unreadable ones are left out, and labels known, before anything is trained."""
    train, test = make_images(20), make_images(10, seed=1)
    train.add_unreadable([(3, "three", "torn")])
    forward, looked = Backbone.forward_blocks, []

    def counted(backbone, images, blocks=None, **options):
        looked.append((len(images), options))
        return forward(backbone, images, blocks, **options)

    monkeypatch.setattr(Backbone, "forward_blocks", counted)
    quick = AttentiveSettings(poolers=("single",), learning_rates=(0.01,), epochs=1, mixture=0, held_out=0, maps=0)
    settings = EvaluationSettings(attentive=quick)
    found = evaluate_backbone(make_backbone(), train, test, protocols=protocols, settings=settings)
    assert len(found["attentive_top1_best-block02-single"].correct) == 10
    assert [count for count, _ in looked] == [19, 10] * (passes + 1)
