"""Forecasts against plain loops, and what they say of their error."""

from __future__ import annotations

import math

import pytest

from mim_refiner.analysis.forecast import (
    OURS,
    PUBLISHED,
    Past,
    forecast,
    lead_forecast,
    left_out_error,
    refinement_forecast,
)


def line(xs, ys):
    """(intercept, slope) of the least squares, from the textbook."""
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)
    return y - slope * x, slope


@pytest.mark.parametrize(
    ("runs", "reading", "x"),
    [(OURS, "log_draws", lambda run: math.log10(run.draws)), (PUBLISHED, "lead", lambda run: run.lead)],
)
def test_a_forecast_is_a_line_through_the_runs_and_its_error_that_on_encoders_left_out(runs, reading, x):
    intercept, slope = line([x(run) for run in runs], [run.gain for run in runs])
    new = Past("new", 5e4, math.nan, 9.0)
    assert forecast(new, runs, reading) == pytest.approx(intercept + slope * x(new))
    missed = []
    for run in runs:
        others = [other for other in runs if other.encoder != run.encoder]
        intercept, slope = line([x(other) for other in others], [other.gain for other in others])
        missed.append(abs(intercept + slope * x(run) - run.gain))
    assert left_out_error(runs, reading) == pytest.approx(sum(missed) / len(missed))


def test_what_is_said_of_the_measures_holds_for_the_runs():
    """The words of the module and of the guide: draws help, the warm-up does not help beside them."""
    plain = left_out_error(OURS)
    assert left_out_error(OURS, "log_draws") < plain
    assert left_out_error(OURS, "log_draws", "heads") > left_out_error(OURS, "log_draws")
    assert left_out_error(OURS, "lead") > plain
    assert left_out_error(PUBLISHED, "lead") < 1 < left_out_error(PUBLISHED)


def test_the_line_tells_value_error_and_what_the_warm_up_measured():
    found = refinement_forecast(49_664, 0.447, 0.403)
    error = left_out_error(OURS, "log_draws")
    assert found["value"] == pytest.approx(forecast(Past("", 49_664, 0, 0), OURS, "log_draws") / 100)
    assert found["error"] == pytest.approx(error / 100)
    assert (found["draws"], found["knn_top1"], found["knn_heads"]) == (49_664, 0.447, 0.403)
    assert found["reason"].startswith(
        f"{100 * found['value']:+.1f} points of k-NN accuracy by 49,664 draws (± {error:.1f} on an "
    )
    assert (
        "k-NN accuracy is 40.3 %, its block's 44.7 % (-4.4): with that the forecast was no better (± 2.9"
        in found["reason"]
    )
    assert "beyond" not in found["reason"]
    more = refinement_forecast(38_000_000)
    assert more["value"] > found["value"]
    assert (
        "beyond their 998,400 draws it missed 5 published ones by 6; one that was refined before gained less, "
        "+3.5, +2.3, +2.4 by 698,880 draws or more)" in more["reason"]
    )
    none = refinement_forecast(0, 0.4, 0.5)
    assert none["value"] is None
    assert none["reason"].startswith("ten times the draws gained ")
    few = refinement_forecast(192)  # the line through the runs would say -10
    assert few["value"] is None
    assert few["reason"].startswith(
        "none for 192 draws, fewer than the 7,168 of the shortest run measured; from there ten "
    )
    assert refinement_forecast(7_168)["value"] == pytest.approx(forecast(OURS[0], OURS, "log_draws") / 100)


def test_the_lead_of_the_probe_is_told_with_its_error_on_both_kinds_of_runs():
    found = lead_forecast(0.606, 0.775)
    assert found["value"] == pytest.approx(0.209, abs=0.01)  # MAE L/16
    assert "16.9 points ahead of its k-NN accuracy; as for 5 published encoders" in found["reason"]
    assert "(± 0.7 on one left out), but 10 short runs of small encoders were off that by 7" in found["reason"]
