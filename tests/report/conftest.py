"""A run folder as refine leaves it, made of JSON alone."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mim_refiner.report.page import write_report


def sheet(count: int, tile: int = 64) -> dict[str, Any]:
    """A sheet of random photographs' worth of detail: smooth noise."""
    columns = int(np.ceil(np.sqrt(count)))
    side = columns * tile
    coarse = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    jpeg = base64.b64encode(buffer.getvalue()).decode()
    return {"tile": tile, "columns": columns, "count": count, "jpeg": jpeg}


def gallery(count: int = 40, labelled: bool = True) -> dict[str, Any]:
    """A record as analysis.gallery makes it."""
    rng = np.random.default_rng(1)
    queries = list(range(0, count, count // 4))[:4]
    names = ["cat", "dog </script><b>", "owl"]
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(buffer, "PNG")
    png = base64.b64encode(buffer.getvalue()).decode()
    confusion = {"classes": [0, 1, 2], "counts": [[9, 1, 0], [2, 8, 1], [0, 0, 7]]} if labelled else None

    def model() -> dict[str, Any]:
        return {
            "neighbors": [[1, 2, 3] for _ in queries],
            "similarity": [[0.9, 0.8, 0.7] for _ in queries],
            "same_label": 0.5 if labelled else None,
            "clusters": {"sizes": [10, 11, 7], "examples": [[1, 2], [3, 4], [5, 6]], "confusion": confusion},
            "maps": {"pca": {"points": rng.normal(size=(count, 2)).round(3).tolist(), "explained": [0.2, 0.1]}},
            "patches": {"grid": [4, 4], "png": [png for _ in queries], "explained": [0.3, 0.2, 0.1]},
        }

    return {
        "kind": "gallery",
        "data": {"source": "folder photos", "images": count, "shown": count},
        "block": 11,
        "pooling": "cls",
        "seed": 0,
        "version": "0",
        "thumbnails": sheet(count),
        "items": {
            "name": [f"img<{n}>.png" for n in range(count)],
            "label": [n % 3 for n in range(count)] if labelled else None,
        },
        "class_names": names if labelled else None,
        "queries": queries,
        "patch_rows": queries,
        "kept_neighbors": {"after": 0.25},
        "models": {"before": model(), "after": model()},
    }


def blocks() -> dict[str, Any]:
    """A record of kind knn_by_block."""

    def curve(last: float) -> dict[str, Any]:
        values = [0.2, 0.4, last]
        return {"blocks": [0, 1, 2], "value": values, "ci95": [[v - 0.03, v + 0.03] for v in values], "peak_block": 1}

    return {
        "kind": "knn_by_block",
        "head_blocks": [1, 2],
        "curves": {"before": {"cls": curve(0.3)}, "after": {"cls": curve(0.45)}},
        "statements": ["before, cls pooling: k-NN accuracy is best at block 1."],
    }


def atlas() -> dict[str, Any]:
    """A record of kind atlas."""
    cells = [
        {"block": block, "pooling": pooling, "norm": norm, "knn_top1": 0.3 + 0.1 * block, "ci95": [0.2, 0.5]}
        for block in (0, 1)
        for pooling in ("cls", "mean")
        for norm in (False, True)
    ]
    best = {"block": 1, "pooling": "mean", "norm": False, "reason": "block 1 is best by k-NN."}
    return {"kind": "atlas", "measure": "knn_top1", "cells": cells, "recommendation": best}


def runs_in(folder: Path) -> Callable[..., Path]:
    """A maker of run folders; ``after`` is the k-NN accuracy after refinement."""

    def make(name: str = "run", after: float = 0.45, **options: Any) -> Path:
        run = folder / name
        (run / "evaluation").mkdir(parents=True)
        verdict = {"verdict": "better", "reason": "k-NN accuracy rose.", "ci95": [0.1, 0.2], "knn_difference": 0.15}
        summary = {
            "before": {"knn_top1": 0.3, "linear_top1": 0.5, "rank": 40.0},
            "after": {"knn_top1": after, "linear_top1": 0.6, "rank": 30.0},
            "verdict": verdict,
            "seconds": {"training": 200.0, "total": 4000.0},
        }
        result = {"metric": "knn_top1", "value": after, "ci95": [0.42, 0.48], "block": 11, "pooling": "cls"}
        log = [
            {"phase": "warmup" if step < 30 else "refinement", "step": step, "total_step": step, "loss": 9 / step,
             "loss/1": 4 / step, "loss/2": 5 / step, "alignment/2": 0.5, "lr": 1e-3, "images_per_s": 90.0}
            for step in (10, 20, 30, 40)
        ]  # fmt: skip
        log[-1] |= {"knn_top1": 0.4, "knn_top1/2": 0.4}
        files = {
            "summary.json": summary,
            "environment.json": {"python": "3.11", "device": "cpu", "command": "mim-refiner <refine>"},
            "evaluation/after-knn_top1-block11-cls.json": result,
            "evaluation/blocks.json": blocks(),
            "evaluation/gallery.json": gallery(**options),
            "atlas.json": atlas(),
        }
        for path, value in files.items():
            (run / path).write_text(json.dumps(value))
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
        (run / "recipe.yaml").write_text(
            f"name: tiny\nbatch_size: 128\ndata: photos\nheads: {{out_dim: 8}}\nseed: {len(name)}\n"
        )
        (run / "skipped_images.txt").write_text("broken.png\ttruncated\n")
        return run

    return make


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    return runs_in(tmp_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run, for tests that only read it."""
    return write_report([runs_in(tmp_path_factory.mktemp("written"))()]).read_text(encoding="utf-8")
