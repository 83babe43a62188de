"""The rules of ``benchmarks/label_free_study.py`` on changes made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import label_free_study

    return label_free_study


def row(encoder: str, verdict: str, consistency: float, rank: float = 1.0) -> dict[str, Any]:
    changes = {"consistency": consistency, "retrieval": 0.0, "rank": rank, "centred rank": rank}
    sign = {"better": 0.1, "worse": -0.1, "no clear change": 0.0}[verdict]
    return {"encoder": encoder, "run": "r", "verdict": verdict, "knn": sign, "ci95": [sign - 0.05, sign + 0.05],
            "like training": changes, "disjoint": {**changes, "consistency": 0.0}}  # fmt: skip


def test_thresholds_are_tried_on_the_encoder_that_did_not_choose_them(study: Any) -> None:
    rows = [row(name, *each) for name in "abc" for each in (("worse", -0.10), ("better", 0.08), ("worse", 0.05, 0.3))]
    rows.append(row("a", "no clear change", -0.2))
    found = study.left_out(rows, "like training", study.loses, "worse")
    assert (found["missed"], found["of"], found["false"], found["of_others"]) == (0, 6, 0, 3)
    assert (found["called_though_unclear"], found["unclear"]) == (1, 1)
    assert study.left_out(rows, "like training", study.wins, "better")["missed"] == 0
    # an encoder on which a fall of the consistency means nothing is judged by the others' thresholds, and is misjudged
    odd = [*rows, row("d", "better", -0.15)]
    assert study.left_out(odd, "like training", study.loses, "worse")["false"] == 1
    # views that do not move cannot tell: harm without a lost rank is missed, or all is called harm
    blind = study.left_out(rows, "disjoint", study.loses, "worse")
    assert blind["missed"] + blind["false"] >= 3


def test_the_table_has_every_run_and_both_rules(study: Any) -> None:
    text = study.table([row("a", "worse", -0.1), row("b", "better", 0.08)])
    assert "| a | r | -10.0 [-15.0, -5.0] | worse | -10.0 | +0.0 | 1.00 | 1.00 |" in text
    assert text.count("| harm |") == text.count("| gain |") == 2
