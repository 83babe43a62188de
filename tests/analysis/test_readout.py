"""The table and the sentence of "refine or read out" on hits that are made up."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mim_refiner.analysis.atlas import best_on_other_half
from mim_refiner.analysis.readout import Cost, Row, readout_record

WHOLE = Cost(12, 12)


def hits(share, count=1000, seed=0):
    return np.random.default_rng(seed).random(count) < share


def record(*rows):
    return readout_record(rows, samples={}, seed=0)


def row(name, share, seed, **more):
    return Row(name, hits(share, seed=seed), WHOLE, **more)


def test_the_best_of_many_equal_read_outs_gains_nothing():
    """Twenty read-outs that are no better than the usual one: the best by its own images looks better, and is not."""
    rows = [row(str(number), 0.5, number) for number in range(20)]
    assert max(each.hits.mean() for each in rows) > 0.52
    assert abs(record(*rows)["best"]["value"] - 0.5) < 0.03


def test_halves_are_judged_by_the_choice_of_the_other_half():
    rows = [row("a", 0.5, 1), row("b", 0.52, 2)]
    table = np.stack([each.hits for each in rows])
    best = best_on_other_half(table, seed=3)
    order = np.random.default_rng(3).permutation(1000)
    halves = order[::2], order[1::2]
    for mine, other in (halves, halves[::-1]):
        sums = [sum(bool(each.hits[number]) for number in other) for each in rows]
        chosen = rows[sums.index(max(sums))]
        assert all(rows[best[number]] is chosen for number in mine)
    found = readout_record(rows, samples={}, seed=3)["best"]
    assert found["names"] == [rows[number].name for number in sorted(set(best))]
    assert found["value"] == np.mean([rows[number].hits[image] for image, number in enumerate(best)])


@pytest.mark.parametrize(
    ("attentive", "refined", "word"),
    [(0.6, 0.7, "refine"), (0.7, 0.6, "read out"), (0.65, 0.66, "no clear difference")],
)
def test_the_sentence_compares_refining_with_the_best_read_out(attentive, refined, word):
    found = record(
        row("usual feature", 0.5, 0), row("attentive", attentive, 1), row("refined", refined, 2, refined=True, knn=0.4)
    )
    assert found["sentence"].endswith(f": {word}.")
    assert found["sentence"].startswith(
        "Before refinement the best read-out (attentive; chosen on one half of the images, judged on the other) reaches"
    )
    assert [each["change"] is None for each in found["rows"]] == [True, False, False]
    assert found["rows"][2]["change"][0] == pytest.approx(found["rows"][2]["value"] - found["rows"][0]["value"])
    assert found["rows"][2]["knn_top1"] == 0.4
    assert found["best"]["names"] == ["attentive"]


def test_a_read_out_that_loses_is_not_told_to_be_over_anything():
    rows = [row("usual feature", 0.5, 0), row("a", 0.51, 1), row("b", 0.5, 2)]
    sentence = record(*rows, row("refined", 0.4, 3, refined=True))["sentence"]
    assert " over " not in sentence
    assert re.search(r"against that -\d", sentence)


def test_without_a_refined_encoder_it_says_what_is_not_measured():
    found = record(row("usual feature", 0.7, 0), row("attentive", 0.5, 1))
    assert found["sentence"].startswith(
        "Before refinement no read-out is better on either half of the images than the usual feature, which reaches "
    )
    assert found["sentence"].endswith("give the refined encoder with --compare.")
