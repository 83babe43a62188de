"""Did refinement help? A verdict from paired predictions on labelled images."""

from __future__ import annotations

from typing import Any

from numpy.typing import ArrayLike

from mim_refiner.core.metrics import paired_interval

BETTER, UNCLEAR, WORSE = "better", "no clear change", "worse"
SOUND = "no collapse seen"  # all that is said for an encoder without labels


def verdict(before_correct: ArrayLike, after_correct: ArrayLike) -> dict[str, Any]:
    """Compare per-image correctness [N] of two encoders on the same N test images.

    Returns {"verdict": "better" | "no clear change" | "worse", "knn_difference" (after - before, in accuracy 0-1),
    "ci95": [low, high] (paired), "reason": one sentence}. Clear means that the interval leaves zero out.
    Raises InputError when the two do not cover the same samples.
    """
    difference, low, high = paired_interval(before_correct, after_correct)
    word = BETTER if low > 0 else WORSE if high < 0 else UNCLEAR
    return {
        "verdict": word,
        "knn_difference": difference,
        "ci95": [low, high],
        "reason": _reason(word, difference, low, high),
    }


def _reason(word: str, difference: float, low: float, high: float) -> str:
    change = "rose" if difference > 0 else "fell" if difference < 0 else "did not move"
    by = f" by {abs(100 * difference):.1f} points" if difference else ""
    interval = f"95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
    if word == UNCLEAR:
        return f"k-NN accuracy {change}{by} ({interval}): the interval includes zero, so this may be chance."
    return f"k-NN accuracy {change}{by} on the same test images ({interval}): the interval leaves zero out."
