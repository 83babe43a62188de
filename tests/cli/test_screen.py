"""What the screen says: each thing once, the verdict last, words whole at 80 columns, a finished run as it is."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mim_refiner import load_backbone
from mim_refiner.cli.common import broken
from mim_refiner.cli.tables import print_result
from mim_refiner.commands.report import write_gallery
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source
from mim_refiner.report.page import write_report

MEASURES = [
    {"measure": "neighbour consistency", "before": 0.31, "after": 0.32, "difference": 0.01, "ci95": [-0.01, 0.03],
     "change": "unclear"},
]  # fmt: skip
RESULTS = [
    {"model": f"runs/a rather long name {number}", "metric": metric, "value": 0.5, "ci95": [0.4, 0.6], "block": 11,
     "pooling": "cls+mean"}
    for number in (1, 2)
    for metric in ("knn_top1", "linear_top1_last3_best", "silhouette")
]  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_finished_run_asked_again_neither_measures_nor_changes_its_cost(refined, cli, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(refined.path, again, symlinks=True)
    before = cli.files_of(again)
    words = [str(again) if word == str(refined.path) else word for word in refined.arguments]
    outcome = cli.call(*words, "--json")
    assert outcome.code == 0, outcome.err
    assert "this run is finished already" in outcome.err
    assert "cost:" not in outcome.err
    assert "evaluating" not in outcome.err
    assert outcome.json == refined.summary()
    after = cli.files_of(again)
    assert {name for name in after if after[name] != before[name]} == {"log.txt"}
    log = after["log.txt"].decode()
    assert log.startswith(before["log.txt"].decode())
    assert log.count("refine: mim-refiner ") == 2
    assert "finished; verdict: " in log


def test_of_which_images_k_nn_is_while_training_is_said_and_that_few_are_clustered_by_chance(refined, tmp_path):
    assert "k-NN accuracy while training is of 9 of the 48 images to compare with; the summary's is of " in (
        refined.outcome.err
    )
    few = "Cluster accuracy and NMI of 9 images of 3 classes are high by chance: with fewer than 10 images a class"
    assert refined.summary()["verdict"]["clusters"].startswith(few)
    assert few in refined.outcome.out
    assert few in write_report([refined.path], tmp_path / "page.html").read_text()


def test_a_run_without_a_gallery_is_finished_too(refined, cli, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(refined.path, again, symlinks=True)
    two = ImageSet(open_source(np.zeros((2, 32, 32, 3), dtype=np.uint8)))
    write_gallery({"before": load_backbone(refined.path)}, two, again, pooling="cls", run=Run())
    words = [str(again) if word == str(refined.path) else word for word in refined.arguments]
    assert "this run is finished already" in cli.call(*words, "--json").err
    assert "2 readable images are too few to compare; give at least 3" in write_report([again]).read_text()


def test_a_run_that_lost_its_results_is_measured_again(mae, cli, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(mae.path, again, symlinks=True)
    shutil.rmtree(again / "export")
    words = [str(again) if word == str(mae.path) else word for word in mae.arguments]
    outcome = cli.call(*words)
    assert outcome.code == 0, outcome.err
    assert "this run is finished" not in outcome.err
    assert (again / "export" / "config.json").is_file()
    total = json.loads((again / "summary.json").read_text())["seconds"]["total"]
    assert total > mae.summary()["seconds"]["total"]  # what the training took is in it


def test_data_and_guesses_are_said_once(mae, shapes, cli, tmp_path):
    bare = tmp_path / "bare.pth"  # tells neither heads nor mean and std
    torch.save({"model": load_file(mae.export / "model.safetensors")}, bare)
    words = cli.refine(shapes, f"{bare}::num_heads=2", tmp_path / "run", "hold_out=0.2")
    outcome = cli.call(*words, "--eval-data", shapes, "--set", "normalization=encoder", "--plan")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("data: ") == 1
    assert outcome.err.count("3 class") == 1
    outcome = cli.call(*words, "--set", "normalization=data", "--plan")
    assert outcome.code == 0, outcome.err
    assert "guessed: mean" not in outcome.err  # they are measured


def test_the_verdict_and_the_features_to_use_come_last_and_arrays_stay_in_files():
    result = {
        "verdict": {"verdict": "worse", "reason": "It fell.", "measures": MEASURES, "next": ["a shorter run"]},
        "recommendation": {"block": 3, "reason": "block 3 is best."},
        "curves": {"before": {"cls": {"value": [0.1, 0.2]}}},
        "change": {"after": {"cls": {"value": [0.1]}}},
        "records": {"blocks": "out/blocks.json"},
        "figures": {"blocks": "out/blocks.png"},
        "statements": ["a statement"],
    }
    out = io.StringIO()
    print_result(result, out)
    lines = out.getvalue().splitlines()
    assert lines[-3:] == ["verdict: worse. It fell.", "what to try: a shorter run", "features to use: block 3 is best."]
    assert "curves" not in out.getvalue()
    assert "0.2" not in out.getvalue()
    row = next(line for line in lines if "neighbour" in line)
    assert row.split() == ["neighbour", "consistency", "(%)", "31.0", "32.0", "+1.0", "(-1.0", "to", "+3.0)", "unclear"]


def test_names_of_models_stay_as_they_are():
    out = io.StringIO()
    print_result({"seconds": {"../runs/my_run": {"knn": 1.0}, "vit_b_16": {"low_shot": 2.0}}}, out)
    assert out.getvalue().splitlines() == ["seconds, ../runs/my_run: knn 1", "seconds, vit_b_16: low shot 2"]


def test_ways_to_read_an_encoder_are_a_table_with_their_cost(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")  # a narrow screen breaks cells
    row = {"name": "attentive", "value": 0.5, "ci95": [0.4, 0.6], "change": [0.1, 0.0004, 0.2], "knn_top1": None,
           "cost": {"blocks": 3, "depth": 12, "extra": 0.014, "parameters": 1200}}  # fmt: skip
    out = io.StringIO()
    print_result({"records": {}, "readout": {"rows": [row], "sentence": "once"}, "statements": ["once"]}, out)
    assert "3 of 12 blocks + 1.4 %, 1,200 learned weights" in out.getvalue()
    assert "+10.0 (+0.04 to +20.0)" in out.getvalue()  # a bound that is not zero is not shown as zero
    assert out.getvalue().count("once") == 1


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_and_lines_fit_the_terminal_and_break_at_spaces(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "dumb")  # no styles between the words
    out = Terminal()
    reason = " ".join(["uncommonly"] * 20)
    print_result({"results": RESULTS, "verdict": {"verdict": "worse", "reason": reason, "measures": MEASURES}}, out)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    assert "…" not in out.getvalue()
    assert set(out.getvalue().split()) >= {"k-NN", "accuracy", "probe", "uncommonly", "consistency"}
    assert "uncommon\n" not in out.getvalue()
    assert "top1" not in out.getvalue()


@pytest.mark.parametrize("columns", ["", "80"])  # 80: set by readline for whatever a notebook or a test starts
def test_a_file_or_pipe_has_whole_lines(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    out = io.StringIO()
    print_result({"verdict": {"verdict": "worse", "reason": "word " * 60}}, out)
    assert len(out.getvalue().splitlines()) == 1


def test_an_error_on_a_terminal_breaks_at_spaces(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    path = "/a/rather/long/path/that/is/longer/than/a/line.png"
    text = f"error: {path} cannot be read; give another file"
    assert broken(text, Terminal()).split("\n")[1] == path
    assert broken(text, io.StringIO()) == text


def test_models_fit_80_columns_and_say_nothing_unknown(monkeypatch, cli):
    monkeypatch.setenv("COLUMNS", "80")
    listed = cli.call("models").out
    assert max(map(len, listed.splitlines())) <= 80
    assert "retfound_dinov2_l14 " in listed
    assert "…" not in listed
    assert "unknown" not in cli.call("models", "simmim_b16").out.replace("licence: unknown", "")


def test_the_run_folder_is_listed_in_the_docs(refined):
    """Every file that refine leaves is named in the table of docs/quickstart.md."""
    text = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text()
    missing = [path.name for path in refined.path.iterdir() if f"`{path.name}" not in text and path.name != ".lock"]
    assert missing == []
