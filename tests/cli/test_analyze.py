"""``analyze`` and ``refine --head-blocks`` through the command line, with labels and without."""

from __future__ import annotations

import html
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mim_refiner.commands import analyze
from mim_refiner.commands.analyze import _Analysis
from mim_refiner.errors import DataError
from mim_refiner.evaluation.features import Features
from mim_refiner.report.page import write_report


def is_png(path: str) -> bool:
    return Path(path).read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def analysed(mae, refined, shapes, cli, tmp_path_factory):
    out = tmp_path_factory.mktemp("analysis") / "out"
    words = ("analyze", "--model", mae.export, "--compare", refined.path, "--data", shapes, "--out", out)
    outcome = cli.call(*words, "--json")
    assert outcome.code == 0, outcome.err
    return out, outcome


def test_everything_is_written_in_one_command(analysed):
    out, outcome = analysed
    result = outcome.json
    assert set(result["figures"]) == {
        "blocks", "atlas-before", "atlas-after", "similarity", "regimes", "heads-after",
    }  # fmt: skip
    assert all(is_png(path) for path in result["figures"].values())
    for name, path in result["records"].items():
        assert json.loads(Path(path).read_text())["kind"], name
    records = {"blocks", "atlas-before", "atlas-after", "verdict", "readout", "similarity", "regimes"}
    assert set(result["records"]) == records
    assert set(result["seconds"]) == {"atlas", "verdict", "readout", "similarity", "reconstruction", "heads"}
    stored = json.loads((out / "blocks.json").read_text())
    assert stored["curves"] == result["curves"]
    assert result["curves"]["after"]["cls"]["blocks"] == [0, 1, 2]
    assert len(result["change"]["after"]["cls"]["value"]) == 3


def test_few_images_leave_parts_out_and_say_so(mae, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    how = {"model": mae.export, "out": str(tmp_path / "few"), "cache": "off"}
    with pytest.raises(DataError) as caught:
        analyze.analyze(**how, data=(pixels, np.arange(12) % 2), test=(pixels[:3] + 1, [0, 1, 0]), parts="similarity")
    assert str(caught.value) == (
        "similarity left out: it needs 4 test images or more; give them; or choose other parts"
    )
    assert not (tmp_path / "few").exists()
    told = analyze.analyze(**how, data=pixels, parts="verdict,similarity")
    assert "verdict" not in told
    assert "similarity" in told["records"]


def test_refine_or_read_out_is_one_table_and_one_sentence(analysed, tmp_path):
    out, outcome = analysed
    found = outcome.json["readout"]
    usual, *others, refined = found["rows"]
    assert (usual["name"], usual["change"], usual["cost"]["blocks"]) == ("usual feature", None, 3)
    assert (refined["name"], refined["refined"]) == ("refined, usual feature", True)
    attentive = [row for row in others if "attentive" in row["name"]]
    assert [row["name"] for row in attentive] == ["attentive", "layer mixture (blocks 0, 1, 2), attentive"]
    assert all(row["cost"]["extra"] > 0 and row["cost"]["parameters"] > 0 for row in attentive)
    for row in (*others, refined):
        assert row["change"][0] == pytest.approx(row["value"] - usual["value"])
    assert found["sentence"] in outcome.json["statements"]
    assert found["sentence"].rpartition(": ")[2].rstrip(".") in ("refine", "read out", "no clear difference")
    page = write_report([out], tmp_path / "page.html").read_text()
    assert html.escape(found["sentence"]).replace("&#x27;", "&#39;") in page


def test_parts_that_look_at_fewer_images_spread_them_over_all(monkeypatch):
    """Rows of class folders are sorted: the first of them would be of the first classes alone."""
    seen = []
    encoder = SimpleNamespace(info=SimpleNamespace(depth=1, has_cls=True), is_plain_vit=True)
    shown = SimpleNamespace(
        models={"before": encoder}, features={"before": Features({}, None, torch.arange(2501), 2501)}, curves={},
        samples=SimpleNamespace(
            bank=None, queries=None, bank_rows=np.arange(5000), query_rows=np.arange(2501), labelled=True
        ),
        run=SimpleNamespace(reporter=SimpleNamespace(phase=lambda *_: None), seed=0), _measure_blocks=lambda: None,
        atlases={"before": SimpleNamespace(record={"measure": "knn_top1"})}, result={"statements": []}, pooling="cls",
        _keep=lambda *_: None,
    )  # fmt: skip

    def rows(*_, train_rows, test_rows, **how):
        seen.extend((train_rows, test_rows))

    monkeypatch.setattr(analyze, "block_similarity",
                        lambda chosen, _: seen.append(chosen["before"].indices) or {"statements": []})  # fmt: skip
    monkeypatch.setattr(analyze, "reconstruction_by_block", rows)
    monkeypatch.setattr(analyze, "regimes_record", lambda *_, **how: {"models": {}})
    _Analysis.similarity(shown)
    shown.result["regimes"] = {}
    _Analysis.reconstruction(shown)
    assert [(len(chosen), int(chosen[0]), int(chosen[-1])) for chosen in seen] == [
        (1000, 0, 2500), (2000, 0, 4999), (500, 0, 2500),
    ]  # fmt: skip


def test_sample_sizes_are_said(analysed):
    _, outcome = analysed
    assert outcome.json["samples"] == {
        "bank": "39 of 48 images", "queries": "9 of 48 images", "label_free": "48 images", "labels": True,
    }  # fmt: skip
    assert "looking at 9 of 48 images, with 39 of 48 images to find neighbours in" in outcome.err


def test_the_verdict_by_labels_has_the_one_without_beside_it(analysed):
    verdict = analysed[1].json["verdict"]
    words = ("better", "no clear change", "worse")
    assert verdict["verdict"] in words
    assert "k-NN accuracy" in verdict["reason"]
    assert verdict["label_free"]["verdict"] in words
    assert verdict["label_free"]["measures"][-1]["measure"] == "drift of patch features"


def test_the_verdict_alone_is_the_same_and_looks_at_one_block(mae, refined, shapes, analysed, cli, tmp_path):
    words = ("analyze", "--model", mae.export, "--compare", refined.path, "--data", shapes, "--out", tmp_path / "out")
    outcome = cli.call(*words, "--parts", "verdict", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["verdict"] == analysed[1].json["verdict"]
    assert set(outcome.json["records"]) == {"verdict"}
    assert outcome.json["figures"] == {}


def test_regimes_recommendation_and_placement(analysed):
    result = analysed[1].json
    assert [b for blocks in result["regimes"]["before"].values() for b in blocks] == [0, 1, 2]
    assert result["recommendation"]["measure"] == "knn_top1"
    assert result["head_placement"]["blocks"][-1] == 2
    assert sum("regimes by block" in line for line in result["statements"]) == 2


def test_without_labels_and_without_a_second_encoder(mae, unlabelled, cli, tmp_path):
    words = ("analyze", "--model", mae.export, "--data", unlabelled, "--out", tmp_path / "out")
    outcome = cli.call(*words, "--parts", "verdict,atlas")
    assert outcome.code == 0, outcome.err
    assert "no labels: neighbour consistency is told" in outcome.err
    assert "label free: neighbour consistency" in outcome.out
    assert "features to use: " in outcome.out
    record = json.loads((tmp_path / "out" / "atlas-before.json").read_text())
    assert record["measure"] == "consistency"
    assert not (tmp_path / "out" / "regimes.json").exists()


def test_without_labels_the_same_weights_are_no_clear_change(mae, unlabelled, cli, tmp_path):
    words = ("analyze", "--model", mae.export, "--compare", mae.export, "--data", unlabelled, "--out", tmp_path / "out")
    outcome = cli.call(*words, "--parts", "verdict", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["verdict"]["verdict"] == "no clear change"
    assert all(abs(row["difference"]) < 1e-6 for row in outcome.json["verdict"]["measures"])


def test_copies_of_few_images_are_not_measured(mae, unlabelled, cli, tmp_path):
    for number, image in enumerate(sorted(unlabelled.iterdir())[:3] * 10):
        (tmp_path / "copies").mkdir(exist_ok=True)
        (tmp_path / "copies" / f"{number:02d}{image.suffix}").write_bytes(image.read_bytes())
    words = ("analyze", "--model", mae.export, "--compare", mae.export, "--data", tmp_path / "copies")
    outcome = cli.call(*words, "--parts", "verdict", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    last = outcome.out.splitlines()[-1]
    assert last.startswith("verdict: not measured. A verdict without labels needs 20 images or more that differ")
    assert "tells 3 of 30 apart" in last


@pytest.mark.parametrize(
    ("data", "parts", "message"),
    [
        ("{flat}", "atlas,verdit", "did you mean 'verdict'"),
        ("{flat}", "atlas,", "empty name"),
        ("{flat}[:12]", "verdict", "without labels it needs 20 images or more; give them"),
        ("{flat}", "readout,heads", "its classifiers need labels; give labelled images; head behaviour left out: "),
    ],
)
def test_bad_input(mae, unlabelled, cli, tmp_path, data, parts, message):
    words = ("analyze", "--model", mae.export, "--data", data.format(flat=unlabelled), "--out", tmp_path / "out")
    outcome = cli.call(*words, "--parts", parts)
    assert outcome.code == 2
    assert message in outcome.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_heads_are_placed_by_measurement_and_kept_on_resume(mae, shapes, cli, tmp_path):
    run = tmp_path / "run"
    words = cli.refine(shapes, mae.export, run)
    outcome = cli.call(*words, "--head-blocks", "auto", "--json")
    assert outcome.code == 0, outcome.err
    placement = outcome.json["head_placement"]
    assert placement == json.loads((run / "head_placement.json").read_text())
    assert (placement["measure"], placement["recipe_blocks"]) == ("knn_top1", [2])
    assert placement["reason"] in outcome.err
    assert f"blocks: {placement['blocks']}" in (run / "recipe.yaml").read_text().replace("\n  - ", " ") or all(
        f"- {block}" in (run / "recipe.yaml").read_text() for block in placement["blocks"]
    )
    again = cli.call(*words, "--set", "heads.blocks=auto", "--json")
    assert again.code == 0, again.err
    assert again.json["head_placement"] == placement
    assert "placing heads" not in again.err


def test_named_head_blocks(mae, unlabelled, cli, tmp_path):
    words = cli.refine(unlabelled, mae.export, tmp_path / "run")
    outcome = cli.call(*words, "--head-blocks", "0,2")
    assert outcome.code == 0, outcome.err
    assert "2 heads on blocks 0 to 2" in outcome.err
    wrong = cli.call(*words, "--head-blocks", "some")
    assert wrong.code == 2
    assert "give auto, last_third or block numbers" in wrong.err


def test_the_export_carries_the_recommendation(refined):
    config = json.loads((refined.export / "config.json").read_text())["mim_refiner"]
    summary = refined.summary()["recommendation"]
    assert (config["block"], config["pooling"], config["norm"]) == tuple(
        summary[key] for key in ("block", "pooling", "norm")
    )
    assert config["recommendation"] == summary["reason"]
