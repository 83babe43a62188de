"""Options of refine that others feed: the doctor's list, and loggers; and the page at the end."""

from __future__ import annotations

import json

import pytest
import yaml


def test_a_list_of_the_doctor_and_a_logger(cli, mae, shapes, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    listed, out = tmp_path / "exclude.txt", tmp_path / "run"
    listed.write_text("circle/circle-00.png\tconstant\n")
    arguments = [*cli.refine(shapes, mae.export, out), "--exclude", str(listed), "--log", "tensorboard"]
    outcome = cli.call(*arguments)
    assert outcome.code == 0, outcome.err
    assert f"{cli.images - 1} images" in outcome.err
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["exclude"] == str(listed)
    assert list((out / "logs" / "tensorboard").glob("events.*"))
    again = cli.call(*cli.refine(shapes, mae.export, out))  # without the list: other data
    assert again.code == 2
    assert "another recipe" in again.err


def test_the_run_ends_in_a_page_with_pictures(refined):
    gallery = json.loads((refined.path / "evaluation" / "gallery.json").read_text())
    assert gallery["models"].keys() == {"before", "after"}
    assert gallery["class_names"] == ["circle", "square", "triangle"]
    page = (refined.path / "report.html").read_text()
    assert "circle-00.png" in page
    assert f"report: {refined.path / 'report.html'}" in refined.outcome.err


def test_a_report_that_cannot_be_written_costs_no_run(refined, tmp_path, monkeypatch):
    from mim_refiner.commands import report

    said: list[str] = []

    class Reporter:
        def message(self, text):
            said.append(text)

    monkeypatch.setattr(report, "write_report", lambda runs: 1 / 0)
    report.finish_with_report(tmp_path, Reporter())
    assert len(said) == 1
    assert said[0].startswith("no report was written (division by zero); the run is complete, try: mim-refiner report")


def test_a_logger_that_is_unknown_stops_before_anything_is_written(cli, mae, shapes, tmp_path):
    outcome = cli.call(*cli.refine(shapes, mae.export, tmp_path / "run"), "--log", "wanbd", "--quiet")
    assert outcome.code == 2
    assert "did you mean 'wandb'?" in outcome.err
    assert not (tmp_path / "run").exists()
