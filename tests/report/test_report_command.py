"""``mim-refiner report`` through the command line."""

from __future__ import annotations

import json
import subprocess
import sys

from mim_refiner.cli.app import main


def test_one_run(make_run, capsys):
    first = make_run("a")
    assert main(["report", str(first), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["report"] == str(first / "report.html")
    assert result["bytes"] == (first / "report.html").stat().st_size


def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, make_run, capsys):
    run = make_run()
    for arguments, words in (
        ([str(tmp_path / "none")], "no such run folder"),
        ([str(run), "--out", str(tmp_path / "page.pdf")], "name it something.html"),
        ([], "missing argument"),
    ):
        assert main(["report", *arguments, "--quiet"]) == 2
        error = capsys.readouterr().err
        assert words in error.lower(), error
        assert error.count("\n") == 1
    assert not (tmp_path / "page.pdf").exists()


def test_the_report_layer_loads_no_torch():
    code = "import sys, mim_refiner.report.page; print('torch' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
