"""The demo in its smallest form, on what the package really embeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from quick import quickly

from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.commands.demo import demo


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("demo") / "out"
    with quickly():
        demo(out=str(out), smoke=True)
    return out


def test_the_summary_has_the_three_encoders_and_a_verdict(smoke: Path) -> None:
    summary = json.loads((smoke / "summary.json").read_text())
    for stage in ("before", "after", "full"):
        for metric in ("knn_top1", "linear_top1", "cluster_accuracy", "nmi", "rank"):
            assert summary[stage][metric] > 0, (stage, metric)
        assert len(summary[stage]["knn_by_block"]["cls"]) == 12
    assert summary["verdict"]["verdict"] in ("better", "no clear change", "worse")
    low, high = summary["verdict"]["ci95"]
    assert low <= summary["after"]["knn_top1"] - summary["before"]["knn_top1"] <= high
    assert summary["seconds"]["total"] >= summary["seconds"]["training"] > 0


def test_the_shipped_refinement_is_better_than_the_autoencoder(smoke: Path) -> None:
    summary = json.loads((smoke / "summary.json").read_text())
    assert summary["verdict"]["full"]["verdict"] == "better"  # even on the smoke run's 512 and 256 images


def test_it_leaves_a_run_folder_with_curves_and_an_encoder_for_timm(smoke: Path) -> None:
    for name in (
        "recipe.yaml",
        "metrics.jsonl",
        "block_curves.png",
        "evaluation/blocks.json",
        "export/README.md",
        "report.html",
    ):
        assert (smoke / name).stat().st_size > 0, name
    ours = load_backbone(smoke / "export")
    theirs = timm.create_model(f"local-dir:{smoke / 'export'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = ours.forward_blocks(images, [-1], norm=True)[0]
        expected = theirs.forward_features(images)
    torch.testing.assert_close(torch.cat([tokens.cls[:, None], tokens.patches], 1), expected, rtol=1e-6, atol=1e-6)


def test_another_demo_folder_is_refused_where_something_else_lies(tmp_path: Path, monkeypatch) -> None:
    """Before anything is timed."""
    from mim_refiner.errors import RunFolderError

    monkeypatch.setattr("mim_refiner.commands.demo.measure", lambda *_: pytest.fail("steps were timed"))

    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="not a run folder"):
        demo(out=str(tmp_path), smoke=True)
