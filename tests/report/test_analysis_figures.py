"""Figures of the analysis: PNGs with everything on them, from JSON alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from mim_refiner.errors import InputError
from mim_refiner.report.figures import DPI, atlas_map, head_behaviour, regimes_plot, similarity_map


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def colours(path):
    return set(np.unique(pixels(path).reshape(-1, 3) @ [1 << 16, 1 << 8, 1]).tolist())


@pytest.fixture
def atlas():
    cells = [
        {"block": b, "pooling": p, "norm": n, "knn_top1": 0.2 + 0.1 * b, "probe_top1": 0.3 + 0.1 * b, "rank": 5.0 + b}
        for b in range(3)
        for p in ("cls", "mean", "both")
        for n in (False, True)
    ]
    return {"kind": "atlas", "cells": cells, "recommendation": {"block": 1, "pooling": "mean", "norm": True}}


def test_atlas_map_has_a_panel_a_measure_and_frames_the_recommendation(atlas, tmp_path):
    path = atlas_map(atlas, tmp_path / "atlas.png")
    assert pixels(path).shape == (round(3.9 * DPI), round((4.6 * 3 + 0.4) * DPI), 3)
    assert 0xD55E00 in colours(path)  # the frame
    for cell in atlas["cells"]:
        cell["consistency"] = cell.pop("knn_top1")
        del cell["probe_top1"]
    assert pixels(atlas_map(atlas, tmp_path / "free.png")).shape[1] == round((4.6 * 2 + 0.4) * DPI)


def test_regimes_plot_draws_a_column_a_model(tmp_path):
    model = {
        "knn": [0.2, 0.5, 0.4],
        "knn_ci95": [[0.1, 0.3], [0.4, 0.6], [0.3, 0.5]],
        "error": [0.9, 0.8, 0.7],
        "knn_share": [0, 1, -0.3],
        "reconstruction_share": [0, 0.5, 0.5],
        "regimes": {"early": [0], "middle": [1], "late": [2]},
    }
    record = {"kind": "regimes", "measure": "knn_top1", "models": {"before": model, "after": model}}
    path = regimes_plot(record, tmp_path / "regimes.png")
    assert pixels(path).shape == (round(7.3 * DPI), round(9.6 * DPI), 3)
    assert {0x0072B2, 0xD55E00} <= colours(path)
    bare = {**model, "regimes": {"early": [], "middle": [], "late": []}}
    without = regimes_plot({"kind": "regimes", "models": {"before": bare, "after": bare}}, tmp_path / "bare.png")
    assert (pixels(without) != pixels(path)).any()  # the regimes are shaded and named


def test_similarity_map_copes_with_undefined_values(tmp_path):
    record = {
        "kind": "block_similarity",
        "matrices": {"before": [[1, 0.5], [0.5, 1]], "before/after": [[1, None], [0, "nan"]]},
    }
    assert pixels(similarity_map(record, tmp_path / "cka.png")).std() > 5


def test_head_behaviour(tmp_path):
    lines = [
        {
            "phase": "refinement",
            "step": s,
            "total_step": s,
            "alignment/8": 0.1 * s,
            "neighbor_age/8": 9.0,
            "neighbor_accuracy/8": 0.2,
        }
        for s in (1, 2, 3)
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert pixels(head_behaviour(path, tmp_path / "heads.png")).shape[0] == round(7.3 * DPI)  # three panels in two rows
    path.write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    with pytest.raises(InputError, match="no head metrics"):
        head_behaviour(path, tmp_path / "x.png")
