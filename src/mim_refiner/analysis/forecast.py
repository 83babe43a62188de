"""Forecast: what refining would bring in k-NN accuracy, from what is known before, with its error on past runs.

Calibrated on first refinements of small encoders that were measured; the error is that on an encoder whose runs are
left out. What tells the gain there is how many images the encoder learns from. What k-NN of the heads gains in the head
warm-up does not, nor the lead of a linear probe over k-NN, which does for the encoders that the paper refined
(docs/guides/refine-or-read-out.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Past(NamedTuple):
    """A refinement that was measured: ``draws`` are the images that the encoder learnt from, the rest is in points."""

    encoder: str
    draws: float
    gain: float  # k-NN top-1, last block
    lead: float  # of a linear probe over k-NN, before
    heads: float = math.nan  # k-NN of what the last head makes of its block - k-NN of the block, after the warm-up

    @property
    def log_draws(self) -> float:
        return math.log10(self.draws)


OURS = (  # first refinements; 4 to 12 blocks of width 48 to 128, 32 px, class token, one seed: LOG.md, 2026-11-28
    Past("shipped", 7_168, 0.3, 1.7, -4.5),  # 1,000 images of Imagenette
    Past("shipped", 9_216, 0.1, 3.4, -4.0),
    Past("narrow", 9_216, 1.4, 7.2, -2.1),
    Past("random", 9_216, 2.6, 7.5, -1.6),
    Past("mae96", 9_216, -1.2, 3.9, -3.6),
    Past("shipped", 37_376, 4.0, 1.7, -1.2),  # all of Imagenette
    Past("shipped", 49_664, 3.1, 3.4, -4.4),
    Past("random", 49_664, 6.1, 7.5, -0.5),
    Past("mae96", 399_360, 6.9, 3.9, -3.1),  # 8 epochs of 24
    Past("shipped", 998_400, 15.9, 3.4, -4.4),
)
AGAIN = (  # of the shipped encoder once refined: the line above told +12 of each of the long ones
    Past("refined", 9_216, -1.4, 4.3, -1.8),
    Past("refined", 698_880, 3.5, 3.4, -1.3),  # its third round
    Past("refined", 698_880, 2.3, 4.2, -1.8),  # its fourth
    Past("refined", 748_800, 2.4, 4.7, -2.9),  # its fifth
)
IMAGENET = 1_281_167
PUBLISHED = (  # arXiv 2402.10093
    Past("MAE L/16", 30 * IMAGENET, 81.5 - 60.6, 77.5 - 60.6),
    Past("data2vec2 L/16", 20 * IMAGENET, 81.0 - 51.8, 78.2 - 51.8),
    Past("MAE H/14", 30 * IMAGENET, 82.3 - 58.1, 78.2 - 58.1),
    Past("data2vec2 H/14", 20 * IMAGENET, 82.3 - 48.0, 80.4 - 48.0),
    Past("MAE 2B/14", 20 * IMAGENET, 83.2 - 67.1, 79.7 - 67.1),
)


def forecast(run: Past, runs: Sequence[Past], *told: str) -> float:
    """The gain of ``run`` in points, by least squares of the gains of ``runs`` by what ``told`` names."""
    *rows, own = [[1.0, *(getattr(of, name) for name in told)] for of in (*runs, run)]
    return float(np.dot(own, np.linalg.lstsq(np.array(rows), np.array([of.gain for of in runs]), rcond=None)[0]))


def left_out_error(runs: Sequence[Past], *told: str, by: Sequence[Past] | None = None) -> float:
    """Mean distance of forecast and gain in points, each encoder's runs forecast by those of the others, or ``by``."""
    others = [by or [other for other in runs if other.encoder != run.encoder] for run in runs]
    return float(np.mean([abs(forecast(run, of, *told) - run.gain) for run, of in zip(runs, others, strict=True)]))


def refinement_forecast(draws: int, knn: float | None = None, heads: float | None = None) -> dict[str, Any]:
    """{"value", "error", "draws", "reason"} of a refinement of so many draws (None below all runs), in shares of 1.

    ``knn`` and ``heads``, k-NN accuracy of the last head's block and of what the warmed-up head makes of it, are told.
    """
    error, known = left_out_error(OURS, "log_draws"), [run.draws for run in OURS]
    least, most = min(known), max(known)
    value = forecast(Past("", draws, 0, 0), OURS, "log_draws") if draws >= least else None
    if value is None:
        once, tenfold = (forecast(Past("", draws, 0, 0), OURS, "log_draws") for draws in (1, 10))
        said = f"ten times the draws gained {tenfold - once:.1f} points of k-NN accuracy"
        if draws:
            said = (
                f"none for {draws:,} draws, fewer than the {least:,.0f} of the shortest run measured; from there {said}"
            )
    else:
        said = f"{value:+.1f} points of k-NN accuracy by {draws:,} draws"
    beyond = ""
    if draws > most:
        published = left_out_error(PUBLISHED, "log_draws", by=OURS)
        beyond = f"; beyond their {most:,.0f} draws it missed {len(PUBLISHED)} published ones by {published:.0f}"
    said += (
        f" (± {error:.1f} on an encoder left out of {len(OURS)} runs of small encoders{beyond}; one that was refined "
        f"before gained less, {', '.join(f'{run.gain:+.1f}' for run in AGAIN[1:])} by {AGAIN[1].draws:,} draws or more)"
    )
    found = {"value": None if value is None else value / 100, "error": error / 100, "draws": draws}
    if knn is not None and heads is not None:
        found |= {"knn_top1": knn, "knn_heads": heads}
        said += (
            f". The warmed-up head's k-NN accuracy is {100 * heads:.1f} %, its block's {100 * knn:.1f} % "
            f"({100 * (heads - knn):+.1f}): with that the forecast was no better (± "
            f"{left_out_error(OURS, 'log_draws', 'heads'):.1f})"
        )
    return {**found, "reason": said}


def lead_forecast(knn: float, linear: float) -> dict[str, Any]:
    """{"value", "error", "reason"}: the gain of a long refinement by the published ones, all in shares of 1."""
    run, error = Past("", 0, 0, 100 * (linear - knn)), left_out_error(PUBLISHED, "lead")
    value = forecast(run, PUBLISHED, "lead")
    ours = left_out_error(OURS, "lead", by=PUBLISHED)
    return {
        "value": value / 100,
        "error": error / 100,
        "reason": f"its linear probe is {run.lead:.1f} points ahead of its k-NN accuracy; as for {len(PUBLISHED)} "
        f"published encoders a long refinement on ImageNet-1K gains {value:+.0f} points of it (± {error:.1f} on one "
        f"left out), but {len(OURS)} short runs of small encoders were off that by {ours:.0f}",
    }
