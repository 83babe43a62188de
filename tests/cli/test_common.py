"""Results reach the user: JSON alone on stdout, tables otherwise."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from mim_refiner.cli.common import execute
from mim_refiner.cli.tables import format_value, lines_of, print_result
from mim_refiner.errors import InputError
from mim_refiner.files import json_value


@dataclass(frozen=True)
class Point:
    path: Path
    value: float


def test_what_is_printed_as_json_covers_what_verbs_return():
    value = {
        "point": Point(Path("a"), float("nan")),
        1: (torch.tensor(2), np.float64(0.5), np.array([1.0, np.inf])),
        "flag": True,
        "nothing": None,
    }
    expected = {"point": {"path": "a", "value": None}, "1": [2, 0.5, [1.0, None]], "flag": True, "nothing": None}
    assert json_value(value, lambda _: None) == expected


def test_json_refuses_the_unknown():
    with pytest.raises(TypeError, match="object"):
        json_value(object())


def test_json_keeps_stdout_pure(capsys):
    def noisy(*, out, reporter):
        print("a library prints")
        reporter.message("half way")
        return {"out": out}

    execute(noisy, as_json=True, quiet=False, out="folder")
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"out": "folder"}
    assert "a library prints" in printed.err
    assert "half way" in printed.err


def test_quiet_silences_the_reporter_but_not_the_result(capsys):
    def verb(*, reporter):
        reporter.phase("refine", 3)
        reporter.progress(3, {"loss": 1.0})
        return {"out": "folder"}

    execute(verb, as_json=False, quiet=True)
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out == "out: folder\n"


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_holds_for_one_command(capsys, caplog, quiet):
    logger = logging.getLogger("mim_refiner")
    execute(lambda reporter: logger.warning("a guess"), as_json=True, quiet=quiet)
    assert ("a guess" in caplog.text) != quiet
    logger.warning("after it")
    assert "after it" in caplog.text


def test_the_reporter_ends_when_the_verb_fails(capsys):
    def failing(*, reporter):
        reporter.phase("refine", 9)
        reporter.progress(1, {"loss": 1.0})
        raise InputError("no")

    with pytest.raises(InputError):
        execute(failing, as_json=False, quiet=False)
    assert "refine 1/9" in capsys.readouterr().err


def test_stages_stand_side_by_side():
    file = io.StringIO()
    stages = {"before": {"knn_top1": 0.4, "rank": 20.0}, "after": {"knn_top1": 0.45, "rank": 30.0}, "note": "[x]"}
    print_result(stages, file)
    lines = file.getvalue().splitlines()
    assert lines[0].split() == ["metric", "before", "after", "this", "run"]
    assert lines[1].split() == ["k-NN", "accuracy", "(%)", "40.0", "45.0", "(+5.0)"]
    assert lines[2].split() == ["effective", "rank", "(RankMe)", "20.0", "30.0", "(+10.0)"]
    assert lines[3] == "note: [x]"


def test_records_become_rows():
    file = io.StringIO()
    records = {
        "results": [{"protocol": "knn", "value": 0.5}, {"protocol": "linear", "value": 0.25, "ci95": [0.2, 0.3]}]
    }
    print_result(records, file)
    assert [line.split() for line in file.getvalue().splitlines()] == [
        ["results"],
        ["protocol", "value", "ci95"],
        ["knn", "0.5", "–"],
        ["linear", "0.25", "0.2", "0.3"],
    ]


def test_shares_print_in_percent():
    assert format_value("linear_top1", 0.8125) == "81.25 %"
    assert format_value("rank", 0.5) == "0.5"


def test_nested_values_become_lines():
    verdict = {
        "verdict": "better",
        "change": 0.05,
        "interval": [0.01, 0.09],
        "statements": ["a peak", "no peak"],
        "x": [],
    }
    assert lines_of("verdict", verdict) == [
        "verdict: verdict better, change 0.05",
        "verdict, interval: 0.01 0.09",
        "verdict, statements:",
        "  a peak",
        "  no peak",
    ]
    assert lines_of("nothing", None) == []
    assert lines_of("none_found", False) == ["none found: False"]
    assert lines_of("seconds_all", {"my_runs/mae": {"low_shot": 1.5}}) == ["seconds all, my_runs/mae: low shot 1.5"]
