"""Words for numbers: one of a kind in the singular, differences that are there not shown as zero."""

from __future__ import annotations

import pytest

from mim_refiner.reporting import metric_title, number_of, signed


@pytest.mark.parametrize(
    ("what", "one"),
    [
        ("epochs of warm-up", "epoch of warm-up"),
        ("classes", "class"),
        ("steps an epoch", "step an epoch"),
        ("attention heads", "attention head"),
        ("channels", "channel"),
        ("damaged lines", "damaged line"),
        ("class names", "class name"),
        ("columns of files", "column of files"),
        ("test images", "test image"),
        ("processes", "process"),
        ("standard deviations", "standard deviation"),
        ("GPUs", "GPU"),
    ],
)
def test_one_of_a_kind_is_told_in_the_singular(what: str, one: str) -> None:
    assert number_of(1, what) == f"1 {one}"
    assert number_of(2, what) == f"2 {what}"
    assert number_of(0, what) == f"0 {what}"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.24, "+1.2"),
        (-0.04, "-0.04"),
        (0.0, "+0.0"),
        (-0.0, "+0.0"),
        (0.0034, "+0.003"),
        (-1e-9, "+0.0"),
        (12, "+12.0"),
    ],
)
def test_a_difference_that_is_there_is_not_shown_as_zero(value: float, text: str) -> None:
    assert signed(value) == text


def test_the_last_block_alone_is_one_block() -> None:
    assert metric_title("linear_top1_last1") == "linear probe accuracy, last block"
    assert metric_title("linear_top1_last4") == "linear probe accuracy, last 4 blocks"
