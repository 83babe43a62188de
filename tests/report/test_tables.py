from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from mim_refiner.cli.tables import print_first_screen
from mim_refiner.report.numbers import metric_rows, verdict_view
from mim_refiner.report.run_files import RunFiles
from mim_refiner.report.tables import (
    comparison_rows,
    demo_sentence,
    latex_table,
    markdown_table,
    results_rows,
)


@pytest.fixture
def summary():
    return {
        "before": {"knn_top1": 0.3, "linear_top1": 0.5, "nmi": None, "rank": 40.0, "knn_by_block": {"cls": [0.1]}},
        "after": {"knn_top1": 0.352, "linear_top1": None, "nmi": None, "rank": 38.5},
        "full": {"knn_top1": 0.55, "linear_top1": 0.7, "nmi": None, "rank": 61.0},
        "verdict": {
            "verdict": "better",
            "reason": "k-NN accuracy rose.",
            "knn_difference": 0.052,
            "ci95": [0.03, 0.074],
            "full": {"verdict": "better", "reason": "It rose.", "knn_difference": 0.25, "ci95": [0.22, 0.28]},
        },
        "seconds": {"refine": 200.0},
    }


def test_rows_show_values_and_differences_to_the_first(summary):
    header, rows = comparison_rows(summary)
    assert header == ["metric", "start", "live run", "full refinement"]
    assert rows == [
        ["k-NN accuracy (%)", "30.0", "35.2 (+5.2)", "55.0 (+25.0)"],
        ["linear probe accuracy (%)", "50.0", "–", "70.0 (+20.0)"],
        ["effective rank (RankMe)", "40.0", "38.5 (-1.5)", "61.0 (+21.0)"],
    ]


def test_two_stages(summary):
    del summary["full"]
    assert comparison_rows(summary)[0] == ["metric", "before", "after this run"]
    assert demo_sentence({**summary, "verdict": {"verdict": "better", "ci95": [0.1, 0.2]}}) is None
    counted = summary | {"verdict": summary["verdict"] | {"test_images": 10_000}}
    assert str(demo_sentence(counted)).startswith("On 10,000 test images the live run changed k-NN accuracy by +5.2")


@pytest.mark.parametrize(
    ("word", "ci95", "said"),
    [("better", [0.03, 0.074], "+5.2 points (95 % interval +3.0 to +7.4): better."),
     ("no clear change", [-0.01, 0.074],
      "+5.2 points (95 % interval -1.0 to +7.4): no clear change: the interval holds zero.")],
)  # fmt: skip
def test_the_first_screen_of_the_demo_is_one_sentence_and_one_table(summary, word, ci95, said):
    summary["verdict"] |= {"verdict": word, "ci95": ci95}
    summary |= {"seconds": {"total": 200.0}, "weights": {"reason": "raw"}, "recommendation": {"reason": "block 9"}}
    printed = io.StringIO()
    print_first_screen(summary, printed)
    sentence, *table = printed.getvalue().splitlines()
    assert sentence == (
        f"The live run changed k-NN accuracy by {said} The shipped full refinement changed it by +25.0 points "
        "(95 % interval +22.0 to +28.0)."
    )
    assert [line.split("  ")[0] for line in table] == ["encoder", "start", "live run", "full refinement"]
    assert re.split(" {2,}", table[-1]) == ["full refinement", "55.0 (+25.0; +22.0 to +28.0)", "70.0 (+20.0)", "–"]
    assert max(map(len, table)) <= 80


def test_the_report_begins_with_the_same_sentence_and_encoders(summary):
    run = RunFiles(path=Path("demo-out"), name="demo-out", summary=summary)
    assert verdict_view(run)["reason"] == demo_sentence(summary)
    assert verdict_view(run)["further"] == []
    table = metric_rows(run)
    assert [title for _, title in table["stages"]] == ["start", "live run", "full refinement"]
    assert [cell["change_interval"] for cell in table["rows"][0]["cells"]] == [None, "+3.0 to +7.4", "+22.0 to +28.0"]


@pytest.fixture
def records():
    def one(model, metric, value, ci95):
        return {"model": model, "metric": metric, "value": value, "ci95": ci95, "block": 11, "pooling": "cls"}

    results = [one("runs/a/export", "knn_top1", 0.5, [0.48, 0.52]), one("runs/a/export", "rank", 40.25, None)]
    results += [one("runs/b/export", "knn_top1", 0.53, [0.51, 0.55])]
    change = [{"model": "runs/b/export", "metric": "knn_top1", "block": 11, "pooling": "cls", "difference": 0.03,
               "ci95": [0.01, 0.05], "verdict": "better"}]  # fmt: skip
    return results, change


def test_several_models_side_by_side(records):
    header, rows = results_rows(*records)
    assert header == ["metric", "block", "pooling", "a/export", "b/export"]
    assert rows == [
        ["k-NN accuracy (%)", "11", "cls", "50.0 [48.0, 52.0]", "53.0 [51.0, 55.0] (+3.0*)"],
        ["effective rank (RankMe)", "11", "cls", "40.25", "–"],
    ]
    records[1][0]["ci95"] = [-0.01, 0.05]
    assert results_rows(*records)[1][0][-1].endswith("(+3.0)")  # no star: the interval holds zero


def test_data_sets_get_a_column_of_their_own(records):
    results = [{"set": name, **record} for name in ("pets", "mean") for record in records[0]]
    header, rows = results_rows(results, ())
    assert header[0] == "set"
    assert [row[0] for row in rows] == ["pets", "pets", "mean", "mean"]


def test_markdown_and_latex(records):
    header, rows = results_rows(*records)
    lines = markdown_table(header, rows).splitlines()
    assert lines[0] == "| metric | block | pooling | a/export | b/export |"
    assert lines[1] == "| --- | --- | --- | ---: | ---: |"
    assert len({line.count("|") for line in lines}) == 1
    text = latex_table(header, rows)
    assert text.startswith("\\begin{tabular}{lllrr}\n\\toprule\nmetric & block")
    assert "k-NN accuracy (\\%) & 11 & cls & 50.0 [48.0, 52.0]" in text
    assert text.endswith("\\bottomrule\n\\end{tabular}\n")
