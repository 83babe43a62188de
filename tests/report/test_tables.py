from __future__ import annotations

import pytest

from mim_refiner.report.tables import comparison_rows, comparison_table


@pytest.fixture
def summary():
    return {
        "before": {"knn_top1": 0.3, "linear_top1": 0.5, "nmi": None, "rank": 40.0, "knn_by_block": {"cls": [0.1]}},
        "after": {"knn_top1": 0.352, "linear_top1": None, "nmi": None, "rank": 38.5},
        "full": {"knn_top1": 0.55, "linear_top1": 0.7, "nmi": None, "rank": 61.0},
        "verdict": {"verdict": "better", "reason": "k-NN accuracy rose."},
        "seconds": {"refine": 200.0},
    }


def test_rows_show_values_and_differences_to_the_first(summary):
    header, rows = comparison_rows(summary, {"before": "MAE"})
    assert header == ["metric", "MAE", "after this run", "after the full recipe"]
    assert rows == [
        ["k-NN accuracy (%)", "30.0", "35.2 (+5.2)", "55.0 (+25.0)"],
        ["linear probe accuracy (%)", "50.0", "-", "70.0 (+20.0)"],
        ["effective rank", "40.0", "38.5 (-1.5)", "61.0 (+21.0)"],
    ]


def test_two_stages(summary):
    del summary["full"]
    assert comparison_rows(summary)[0] == ["metric", "before", "after this run"]
    assert len(comparison_table(summary).columns) == 3
