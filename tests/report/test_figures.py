"""Figures: a PNG of the right size with something on it, from JSON alone."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mim_refiner.errors import RunFolderError
from mim_refiner.report.figures import DPI, block_curves, read_metrics


def curve(values):
    return {
        "blocks": list(range(len(values))),
        "value": values,
        "ci95": [[max(0, v - 0.03), v + 0.03] for v in values],
        "peak_block": 0,
    }


@pytest.fixture
def record():
    by_pooling = {"cls": curve([0.2, 0.5, 0.4]), "mean": curve([0.3, 0.4, 0.35])}
    models = {"before": by_pooling}
    for gain, name in enumerate(["after", "full", "mine"], start=1):
        models[name] = {
            "cls": curve([0.2, 0.5 + 0.05 * gain, 0.5 + 0.1 * gain]),
            "mean": curve([0.3, 0.5, 0.4 + 0.1 * gain]),
        }
    return {
        "kind": "knn_by_block",
        "head_blocks": [1, 2],
        "curves": models,
    }


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def test_block_curves_are_whole_files_of_one_size(record, tmp_path):
    path = block_curves(record, tmp_path / "plots" / "blocks.png")
    assert pixels(path).shape == (round(3.9 * DPI), round(9.6 * DPI), 3)
    assert [item.name for item in path.parent.iterdir()] == ["blocks.png"]


def test_every_model_and_the_head_blocks_are_drawn(record, tmp_path):
    def colours(changed):
        found = np.unique(pixels(block_curves(changed, tmp_path / "x.png")).reshape(-1, 3) @ [1 << 16, 1 << 8, 1])
        return set(found.tolist())

    lines = {"before": 0x555555, "after": 0x0072B2, "full": 0xD55E00, "mine": 0x009E73}
    assert colours(record) >= set(lines.values())
    bare = colours({"kind": "knn_by_block", "curves": {"before": record["curves"]["before"]}})
    assert bare & set(lines.values()) == {0x555555}
    shaded = colours({"kind": "knn_by_block", "curves": {"before": record["curves"]["before"]}, "head_blocks": [2]})
    # only the shade is as yellow as this: red and green near white, blue clearly less
    yellow = [c for c in shaded - bare if min(c >> 16, c >> 8 & 255) > 235 and 190 < c & 255 < 220]
    assert yellow


def test_one_pooling_gives_one_panel(record, tmp_path):
    single = {**record, "curves": {"before": {"mean": record["curves"]["before"]["mean"]}}}
    assert pixels(block_curves(single, tmp_path / "x.png")).shape[1] == round(5.0 * DPI)


def test_unwritable_path(record, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot write"):
        block_curves(record, tmp_path / "file" / "x.png")


def log(tmp_path, lines):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def step(number, phase="refine", start=0, **extra):
    return {"phase": phase, "step": number, "total_step": start + number, "loss": 5 / number, "lr": 1e-3, **extra}


def test_resumed_and_cut_logs_are_read_well(tmp_path):
    lines = [step(10), step(20, loss=9.0), step(30), {**step(20), "loss": 1.0}, {"note": "no step"}, '{"step": 40, "lo']
    records = read_metrics(log(tmp_path, lines))
    assert [record["step"] for record in records] == [10, 20, 30]
    assert records[1]["loss"] == 1.0  # the repetition after the resume counts


def test_drawing_loads_no_pyplot_and_no_torch():
    """Reports come from JSON; a machine without a GPU stack draws them too."""
    code = "import sys, mim_refiner.report.figures; print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_line_of_wrong_types_costs_that_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"total_step": 1, "step": null}\n[1]\n{"total_step": 2, "step": 2}\n{"step": "x"}\n{"loss": 1}\n')
    assert read_metrics(path) == [{"total_step": 2, "step": 2}]
