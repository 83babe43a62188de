"""What the comparison of encoders is judged by."""

from __future__ import annotations

import numpy as np

from mim_refiner.commands.evaluate import _verdict
from mim_refiner.evaluation.results import Result


def result(metric: str, right: int, block: int = 3) -> Result:
    correct = np.arange(200) < right
    return Result("attentive", metric, right / 200, None, block, "ep", False, {}, {}, None, 0, correct=correct)


def test_a_choice_made_on_the_test_images_judges_only_where_there_is_no_other() -> None:
    before = {"best": result("attentive_top1_best", 100), "chosen": result("attentive_top1", 100)}
    after = {"best": result("attentive_top1_best", 180), "chosen": result("attentive_top1", 100)}
    judged = _verdict(before, after)
    assert judged is not None
    assert judged["verdict"] == "no clear change"
    assert "best on test" not in judged["reason"]
    alone = _verdict({"best": before["best"]}, {"best": after["best"]})
    assert alone is not None
    assert alone["verdict"] == "better"
    assert "best on test" in alone["reason"]
