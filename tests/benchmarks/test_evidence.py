"""``benchmarks/evidence.py`` on a toy study: arms, controls, pairs, and that a second call only reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from quick import quickly
from safetensors.torch import load_file

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
STUDIES = sorted((BENCHMARKS / "studies").glob("*_*.yaml"))
SETTINGS = [
    "batch_size=8", "warmup.epochs=1", "refinement.epochs=1", "views.local_size=8", "views.num_local=2",
    "heads.projector_hidden=16", "heads.predictor_hidden=16", "heads.out_dim=8", "heads.queue_size=32",
    "heads.blocks=[1,2]", "knn_every=0", "guard.enabled=false",
]  # fmt: skip

MAE_SETTINGS = ["batch_size=8", "decoder_dim=16", "decoder_depth=1"]


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import evidence

    with quickly():
        yield evidence


def images(folder: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for number in range(count):
        place = folder / f"class{number % 2}" / f"{number:03d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 100 + 155 * (number % 2), (16, 16, 3), dtype=np.uint8)).save(place)


def test_a_study_from_start_to_table(evidence: Any, tmp_path: Path) -> None:
    images(tmp_path / "train", 50, 0)
    images(tmp_path / "test", 20, 1)
    data = {"data": str(tmp_path / "train"), "arch": "vit_w32_d3_h2_p8", "out": str(tmp_path / "mae"), "device": "cpu"}
    evidence.pretrain(**data, settings=["training.epochs=1", *MAE_SETTINGS])
    sources = dict.fromkeys(("train", "bank"), "{data}/train") | {"test": "{data}/test"}
    arms = {
        "full": {"says": "all"},
        "scratch": {"says": "random start", "start": "random"},
        "more_mae": {"says": "more of the start", "kind": "more_mae"},
        "diet": {"says": "images as classes", "kind": "diet", "diet": {"lr": 1e-2}},
        "fungi": {"says": "gradients", "kind": "fungi", "fungi": {"local_views": 1, "negatives": 4}},
        "last": {"says": "one head", "settings": ["heads.blocks=[2]"]},
    }
    said = [("start", "it helps"), ("scratch", "the start matters"), ("last", "never run"),
            ("fungi", "it beats gradients")]  # fmt: skip
    claims = [{"better": "full", "than": than, "claim": claim, "paper": "so"} for than, claim in said]
    study = {"title": "toy", **sources, "start": str(tmp_path / "mae" / "export"), "mae_recipe": "tiny_mae",
             "mae_settings": MAE_SETTINGS, "recipe": "tiny", "settings": SETTINGS, "seeds": [0, 1],
             "arms": arms, "claims": claims, "metric": "knn_top1 cls", "protocols": ["knn"], "thin": 1}  # fmt: skip
    file = tmp_path / "studies" / "toy.yaml"
    file.parent.mkdir()
    file.write_text(yaml.safe_dump(study))
    command = [str(file), "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu"]
    evidence.main([*command, "--arms", "full,scratch,more_mae,diet,fungi", "--seeds", "0"])
    evidence.main([*command, "--arms", "full", "--seeds", "1"])
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {arm: value["seeds"] for arm, value in found["arms"].items()} == {
        "start": [0], "full": [0, 1], "scratch": [0], "more_mae": [0], "diet": [0], "fungi": [0]}  # fmt: skip
    asked = {(claim, f"knn_top1 {kind}") for claim in ("it helps", "the start matters") for kind in ("cls", "mean")}
    asked |= {("it beats gradients", "knn_top1 cls")}  # gradient features have no other pooling
    assert {(claim["claim"], claim["metric"]) for claim in found["claims"]} == asked
    gain = next(c for c in found["claims"] if c["claim"] == "it helps" and c["metric"] == "knn_top1 cls")
    full, start = found["arms"]["full"]["knn_top1 cls"], found["arms"]["start"]["knn_top1 cls"]
    assert gain["difference"] == pytest.approx(full["mean"] - start["mean"])
    assert gain["ci95"][0] <= gain["difference"] <= gain["ci95"][1]
    assert "| all | 2 |" in (tmp_path / "out" / "results.md").read_text()

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.npz")}
    evidence.main([*command, "--arms", "full", "--seeds", "0,1"])
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.npz")}

    few = tmp_path / "few.yaml"  # a study that asks for more measures what is missing alone
    few.write_text(yaml.safe_dump(study | {"few_labels": [0.2]}))
    evidence.main([str(few), *command[1:], "--arms", "full", "--seeds", "0"])
    added = json.loads((tmp_path / "out" / "results.json").read_text())["arms"]["full"]
    assert added["knn_top1 cls"] == full
    assert {"knn_top1@20% cls", "low_shot@20% mean"} < added.keys()
    toy = evidence.Study(study, tmp_path, tmp_path / "out", "cpu", evidence.Reporter())
    again = evidence.with_few_labels(toy, evidence.load_backbone(str(tmp_path / "out/full/seed0/export")), 0.2, 0)
    assert 100 * again["low_shot@20% mean"].mean() == pytest.approx(added["low_shot@20% mean"]["values"][0])
    page = tmp_path / "docs" / "evidence.md"
    earlier = {"paper": "p", "claim": "c", "result": "r", "seeds": 1, "size": "s", "verdict": "supported",
               "command": "true", "date": "today"}  # fmt: skip
    (file.parent / "earlier.yaml").write_text(yaml.safe_dump([earlier]))
    evidence.main([*command, "--page", str(page)])
    kept = json.loads((file.parent / "toy.json").read_text())
    assert kept["images"] == {"train": 50, "bank": 50, "test": 20}
    text = page.read_text()
    low, high = gain["ci95"]
    assert f"| so | it helps | {gain['difference']:+.1f} [{low:+.1f}, {high:+.1f}] | 2 | {gain['verdict']} |" in text
    assert "| so | the start matters |" in text
    assert "never run" not in text
    assert "Not run yet: one head." in text
    assert "| p | c | r | 1 | s | supported |" in text
    assert (page.parent / "figures" / "evidence-toy.svg").read_bytes().startswith(b"<svg")
    (file.parent / "toy.yaml").rename(tmp_path / "toy.yaml")
    written = page.read_bytes()
    evidence.write_page(file.parent, page)  # from what is kept alone
    assert page.read_bytes() == written

    begun = load_file(tmp_path / "out" / "random" / "seed0" / "model.safetensors")
    trained, dieted = (
        load_file(tmp_path / name / "export" / "model.safetensors") for name in ("mae", "out/diet/seed0")
    )
    assert not any(np.array_equal(trained[name], dieted[name]) for name in trained if "qkv.weight" in name)
    assert not np.allclose(begun["blocks.0.mlp.fc1.weight"], trained["blocks.0.mlp.fc1.weight"], atol=0.05)


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_shipped_studies_name_settings_that_exist(evidence: Any, file: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(file.read_text())
    assert {claim[arm] for claim in tree["claims"] for arm in ("better", "than")} <= {"start", *tree["arms"]}
    study = evidence.Study(tree, tmp_path, tmp_path, "cpu", None)
    assert all(claim["claim"] and claim["paper"] for claim in tree["claims"])
    for arm in tree["arms"]:
        chosen = evidence.refine_recipe(tree["recipe"], study.settings(arm), image_size=0)
        assert chosen.refinement.epochs > 0


def test_the_plan_of_an_embedding_has_no_gradients(evidence: Any, tmp_path: Path) -> None:
    images(tmp_path / "train", 4, 0)
    tree = yaml.safe_load((BENCHMARKS / "studies" / "small_cifar10.yaml").read_text())
    tree |= dict.fromkeys(("train", "bank", "test"), "{data}/train")
    tree["start"] = str(BENCHMARKS.parent / tree["start"])
    study = evidence.Study(tree, tmp_path, tmp_path, "cpu", evidence.Reporter())
    fungi, embedding, _ = evidence.plan(study, ["fungi", "embedding"], [0]).splitlines()
    assert "gradients of 8 images" in fungi
    assert "embeddings of 8 images" in embedding


def test_compute_of_the_control_is_the_full_recipes(evidence: Any, tmp_path: Path) -> None:
    images(tmp_path / "train", 32, 0)
    tree = yaml.safe_load((BENCHMARKS / "studies" / "cifar10_cpu.yaml").read_text()) | {"train": "{data}/train"}
    tree["start"] = str(BENCHMARKS.parent / tree["start"])
    tree["settings"] = ["batch_size=16", "refinement.epochs=8"]
    study = evidence.Study(tree, tmp_path, tmp_path, "cpu", evidence.Reporter())
    own = study.mae_recipe()
    spent = own.training.epochs * 32 * evidence.flops_of_autoencoder(study.start, own)
    asked = study.draws(study.recipe("full")) * evidence.flops_of_refinement(study.start, study.recipe("full"))
    assert study.draws(study.recipe("full")) == 9 * 32
    assert spent == pytest.approx(asked, rel=0.5 / own.training.epochs)
