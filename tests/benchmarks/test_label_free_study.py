"""The page of ``benchmarks/label_free_study.py``: its rules on changes made by hand, and what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mim_refiner.files import read_json

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
DOCS = BENCHMARKS.parent / "docs"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import label_free_page

    return label_free_page


def row(encoder: str, knn: float, consistency: float, centred: float = 1.0, *, run: str = "r") -> dict[str, Any]:
    def change(before: float, difference: float, width: float) -> list[float]:
        return [before, before + difference, difference - width, difference + width]

    measures = {"k-NN": change(0.5, knn, 0.02), "neighbour consistency": change(0.3, consistency, 0.01),
                "view retrieval": change(0.3, 0.0, 0.01), "effective rank": change(10.0, 0.0, 0.1),
                "effective rank, centred": change(10.0, 10 * (centred - 1), 0.1)}  # fmt: skip
    return {"encoder": encoder, "run": run, "images": "toy", "measures": measures}


RULE = ("neighbour consistency", "effective rank, centred")


def test_thresholds_are_tried_on_the_encoder_that_did_not_choose_them(page: Any) -> None:
    rows = [row(name, *each) for name in "abc" for each in ((-0.1, -0.10), (0.1, 0.08), (-0.1, 0.05, 0.3))]
    rows.append(row("a", 0.0, -0.2))
    found = page.left_out(rows, RULE, page.is_harm, "worse")
    assert (found["missed"], found["of"], found["false"], found["of_others"]) == (0, 6, 0, 3)
    assert (found["called_though_unclear"], found["unclear"]) == (1, 1)
    assert page.left_out(rows, RULE, page.is_gain, "better")["missed"] == 0
    # an encoder on which a fall of the consistency means nothing is judged by the others' thresholds, and is misjudged
    odd = [*rows, row("d", 0.1, -0.15)]
    assert page.left_out(odd, RULE, page.is_harm, "worse")["false"] == 1
    # measures that do not move cannot tell
    blind = page.left_out(rows, ("view retrieval", "effective rank"), page.is_harm, "worse")
    assert blind["missed"] + blind["false"] >= 3


def test_the_page_counts_what_is_seen_and_what_is_not(page: Any, tmp_path: Path) -> None:
    rows = [row("a", -0.1, -0.1), row("a", -0.05, 0.05, run="mild"), row("b", 0.1, 0.08), row("b", 0.0, 0.0)]
    text = page.page(rows, tmp_path)
    assert "| worse | 2 | 1 | 0 | 1 |\n| no clear change | 1 | 0 | 1 | 0 |\n| better | 1 | 0 | 0 | 1 |" in text
    assert "Of 2 runs that k-NN calls worse, 1 are called worse without labels; the others lost 5.0 to 5.0" in text
    assert "| mild | 1 | -5.0 to -5.0 | 1 | 0 | -5.0 |" in text
    assert text.count("| worse | consistency or centred rank |") == 1
    assert (tmp_path / "figures" / "label-free.svg").read_text().startswith("<svg")


def test_the_page_in_the_documentation_is_made_of_what_was_measured(page: Any, tmp_path: Path) -> None:
    """Whoever moves a threshold sees here which verdicts change; the page is then made anew."""
    rows = read_json(page.RESULTS)
    assert page.page(rows, tmp_path) == (DOCS / "label-free.md").read_text(encoding="utf-8")


def test_of_the_measured_runs_none_that_k_nn_calls_better_is_called_worse(page: Any) -> None:
    rows = read_json(page.RESULTS)
    said = {(page.by_labels(each), page.without_labels(each)) for each in rows}
    assert not any(word == "better" for _, word in said)
    assert ("better", "worse") not in said
    collapsed = [each for each in rows if page.moved(each, "k-NN") < -0.03]
    assert len(collapsed) >= 8
    assert {page.without_labels(each) for each in collapsed} == {"worse"}
