"""k-NN accuracy by block: where in the encoder the class information sits, and what refinement changed.

The method rests on one observation: in a masked image model the accuracy peaks before the last block (paper section 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mim_refiner._version import __version__
from mim_refiner.analysis.label_free import paired_scores, score_interval
from mim_refiner.core.metrics import best_of_many_interval
from mim_refiner.evaluation.results import Result
from mim_refiner.reporting import TITLES, signed

KIND = "knn_by_block"  # names the JSON form for readers such as report.figures


class BlockCurves(NamedTuple):
    """``record`` is the JSON form; ``correct`` holds {"<model>/<pooling>": [blocks, N]}: hits or shares."""

    record: dict[str, Any]
    correct: dict[str, NDArray[Any]]


def curves_from_results(results: Mapping[str, Mapping[str, Result]], *, head_blocks: Sequence[int] = ()) -> BlockCurves:
    """Collect the ``knn_top1`` results of {model: evaluate_backbone(...)} into curves and statements.

    With several models the first is the baseline, and ``change`` holds paired differences to it where blocks agree.
    """
    scores: dict[str, dict[str, dict[int, NDArray[np.float64]]]] = {}
    for model, found in results.items():
        knn = sorted((r for r in found.values() if r.metric == "knn_top1"), key=lambda r: r.block)
        scores[model] = {}
        for result in knn:
            if result.correct is not None:
                scores[model].setdefault(result.pooling, {})[result.block] = result.correct.astype(np.float64)
    facts = {name: getattr(knn[0], name) for name in ("norm", "settings", "data", "seed")}
    return curves_from_scores(scores, head_blocks=head_blocks, **facts)


def curves_from_scores(
    scores: Mapping[str, Mapping[str, Mapping[int, NDArray[np.float64]]]],
    *,
    measure: str = "knn_top1",
    head_blocks: Sequence[int] = (),
    **facts: Any,
) -> BlockCurves:
    """Curves from per-image scores [N] of {model: {pooling: {block: scores}}}: k-NN hits, or consistency shares.

    ``facts`` (norm, settings, data, seed) go into the record as they are.
    """
    stacked = {
        f"{model}/{pooling}": np.stack(list(blocks.values()))
        for model, by_pooling in scores.items()
        for pooling, blocks in by_pooling.items()
    }
    curves = {
        model: {p: _curve(list(blocks), stacked[f"{model}/{p}"]) for p, blocks in by_pooling.items()}
        for model, by_pooling in scores.items()
    }
    record = {
        "kind": KIND,
        "measure": measure,
        "head_blocks": list(head_blocks),
        "curves": curves,
        "change": _changes(curves, stacked),
        "statements": [peak_statement(m, p, c, measure) for m, by in curves.items() for p, c in by.items()],
        **facts,
        "version": __version__,
    }
    return BlockCurves(record, stacked)


def _curve(blocks: Sequence[int], scores: NDArray[np.float64]) -> dict[str, Any]:
    values = scores.mean(1).tolist()
    peak = int(np.argmax(values))
    difference, low, high = 0.0, 0.0, 0.0
    if peak < len(blocks) - 1:
        difference, low, high = best_of_many_interval(scores[:-1] - scores[-1])
    return {
        "blocks": list(blocks),
        "value": values,
        "ci95": [list(score_interval(row)) for row in scores],
        "peak_block": blocks[peak],
        "peak_before_last": bool(low > 0),
        "peak_minus_last": {"value": difference, "ci95": [low, high]},
    }


def peak_statement(model: str, pooling: str, curve: Mapping[str, Any], measure: str = "knn_top1") -> str:
    """Say in one sentence whether the curve peaks before the last block.

    The interval is paired (same test images) and allows for the peak being the best of all blocks (max-t).
    """
    value, (low, high) = curve["peak_minus_last"]["value"], curve["peak_minus_last"]["ci95"]
    top, last, end = max(curve["value"]), curve["value"][-1], curve["blocks"][-1]
    what = TITLES[measure]
    head = f"{model}, {pooling} pooling: {what} is best at block {curve['peak_block']} ({100 * top:.1f} %)"
    if curve["peak_block"] == end:
        return f"{head}, the last one."
    clearly = "clearly" if curve["peak_before_last"] else "not clearly"
    interval = f"95 % interval for the best of all blocks {signed(100 * low)} to {signed(100 * high)}"
    points = f"{signed(100 * value)} points, {interval}"
    return f"{head}, {clearly} better than at the last block {end} ({100 * last:.1f} %; {points})."


def _changes(curves: Mapping[str, Mapping[str, Any]], scores: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    """Paired difference of every later model to the first, by pooling and block."""
    baseline, *others = curves
    changes: dict[str, Any] = {}
    for model in others:
        for pooling in curves[model]:
            before, after = scores.get(f"{baseline}/{pooling}"), scores[f"{model}/{pooling}"]
            if before is None or before.shape != after.shape:
                continue
            intervals = [paired_scores(b, a) for b, a in zip(before, after, strict=True)]
            changes.setdefault(model, {})[pooling] = {
                "value": [value for value, _, _ in intervals],
                "ci95": [[low, high] for _, low, high in intervals],
            }
    return changes
