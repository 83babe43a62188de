"""export through the real command line: every format, what it carries over, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mim_refiner import export, load_backbone
from mim_refiner.cli.app import main
from mim_refiner.errors import InputError
from mim_refiner.export.timm import export_timm
from mim_refiner.models.backbone import Backbone, create_vit

CARD = {
    "base": "mae_pretrain_vit_base.pth",
    "data": "photos/",
    "recipe": {"name": "tiny"},
    "before": {"knn_top1": 0.4},
    "after": {"knn_top1": 0.5},
}


@pytest.fixture(scope="module")
def refined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an export/, as refine leaves it: the mean of block 1 with the final norm is recommended."""
    torch.manual_seed(0)
    run = tmp_path_factory.mktemp("runs") / "refined"
    backbone = Backbone.wrap(
        create_vit("vit_w32_d3_h4_p8", 16), family="mae", licence="CC-BY-NC-4.0", source="/x/b.pth"
    )
    export_timm(backbone, run / "export", card=CARD, facts={"block": 1, "pooling": "mean", "norm": True})
    return run


def call(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize("format", ["timm", "hf", "onnx", "refiner"])
def test_every_format_carries_card_and_recommendation_over(
    refined: Path, tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for library in {"hf": ["transformers"], "onnx": ["onnx", "onnxruntime", "onnxscript"]}.get(format, []):
        pytest.importorskip(library)
    out = tmp_path / "out"
    assert call("export", "--model", refined, "--format", format, "--out", out, "--json", "--quiet") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert captured.err == ""
    assert (
        report["max_abs_difference"]
        <= report["tolerance"]
        == {"timm": 1e-6, "hf": 1e-5, "onnx": 1e-4, "refiner": 1e-5}[format]
    )
    assert report["features"] == {"block": 1, "pooling": "mean", "norm": True}
    assert sorted(path.name for path in out.iterdir()) == report["files"]
    own = json.loads((out / "config.json").read_text())["mim_refiner"]
    assert own["parity"]["max_abs_difference"] == report["max_abs_difference"]
    assert (own["licence"], own["card"]) == ("CC-BY-NC-4.0", CARD)
    text = (out / "README.md").read_text()
    for line in (
        "license: cc-by-nc-4.0",
        "| Base weights | mae_pretrain_vit_base.pth |",
        "| Training data | photos/ |",
        "| Recommended features | block 1, pooling mean, with the final norm |",
        "| k-NN accuracy | 40.0 % | 50.0 % |",
        "| name | tiny |",
    ):
        assert line in text.splitlines(), line
    if format == "onnx":
        return
    assert load_backbone(out).info.licence == "CC-BY-NC-4.0"
    second = tmp_path / "second"  # and from there on to any other format
    assert call("export", "--model", out, "--format", "timm", "--out", second, "--quiet") == 0
    assert json.loads((second / "config.json").read_text())["mim_refiner"]["card"] == CARD


def test_the_difference_is_printed_and_measured_on_the_data_given(
    refined: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8))
    words = ("export", "--model", refined, "--data", tmp_path / "images.npy", "--out", tmp_path / "out")
    assert call(*words) == 0
    printed = capsys.readouterr().out
    assert "max abs difference: 0" in printed
    assert "checked: largest difference to the encoder 0" in printed
    parity = json.loads((tmp_path / "out" / "config.json").read_text())["mim_refiner"]["parity"]
    assert (parity["images"], "images.npy" in parity["source"]) == (3, True)
    assert "max_abs_difference" in parity


def test_another_image_size(refined: Path, tmp_path: Path) -> None:
    report = export(model=str(refined), out=str(tmp_path / "out"), image_size=24)
    assert report["max_abs_difference"] <= 1e-6
    assert load_backbone(tmp_path / "out").info.image_size == (24, 24)


def test_what_a_format_cannot_express_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    export_timm(Backbone.wrap(create_vit("vit_w32_d3_h4_p8", 16, pre_norm=True)), source)
    for format in ("hf", "refiner"):
        assert call("export", "--model", source, "--format", format, "--out", tmp_path / "out", "--quiet") == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(f"error: --format {format}: ")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"format": "tim"}, "unknown format; use timm, hf, onnx, refiner; did you mean 'timm'"),
        ({"pooling": "tokens"}, "--pooling tokens is for --format onnx"),
        ({"pooling": "max"}, "--pooling max: unknown"),
        ({"format": "onnx", "batch": "none"}, "--batch none: give 'dynamic' or a number"),
        ({"format": "onnx", "batch": "0"}, "--batch 0: give 'dynamic' or a number"),
        ({"block": 3}, "block 3 is out of range"),
        ({"device": "tpu"}, "--device 'tpu': unknown device"),
        ({"image_size": 15}, "not a multiple of the patch size"),
        ({"format": "onnx", "batch": "\u00b2"}, "--batch \u00b2: give 'dynamic' or a number"),
    ],
)
def test_bad_options(refined: Path, tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        export(model=str(refined), out=str(tmp_path / "out"), **options)
    assert list(tmp_path.iterdir()) == []


def test_the_models_own_folder_is_no_target(refined: Path) -> None:
    folder = refined / "export"
    before = (folder / "config.json").read_bytes()
    with pytest.raises(InputError, match="is the folder that --model is read from"):
        export(model=str(folder), out=str(folder), format="onnx")
    with pytest.raises(InputError, match="is the folder that --model is read from"):
        export(model=str(refined), out=str(folder))
    assert (folder / "config.json").read_bytes() == before
