"""k-NN accuracy by block: where in the encoder the class information sits, and what refinement changed.

The method rests on one observation: in a masked image model the accuracy peaks before the last block (paper section 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mim_refiner._version import __version__
from mim_refiner.analysis.label_free import paired_scores, score_interval
from mim_refiner.core.metrics import best_of_many_interval
from mim_refiner.errors import InputError
from mim_refiner.evaluation.features import Features
from mim_refiner.evaluation.results import Result
from mim_refiner.reporting import TITLES, signed

MIN_COMPARED = 4  # images that CKA's unbiased estimator needs


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
        "kind": "knn_by_block",
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
    peak = len(values) - 1 - int(np.argmax(values[::-1]))  # the last of equal ones: no earlier one is better
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


# --- how alike the features of two blocks are: linear CKA, by the unbiased estimator of its three products


@torch.no_grad()
def cka_matrix(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """CKA of every one of ``rows`` [N, D] with every one of ``columns`` [N, E]: float64 [R, C].

    The N images are the same. 1 for features equal up to rotation, scale and shift; about 0 (either sign) for unrelated
    ones; NaN when one side does not vary. Kornblith et al. (ICML 2019) with the unbiased HSIC of Song et al. (JMLR 13,
    2012), so that few images of wide features do not look alike by chance. Raises InputError for different N or fewer
    than 4 images.
    """
    sizes = {len(x) for x in (*rows, *columns)}
    if len(sizes) != 1 or min(sizes) < MIN_COMPARED:
        raise InputError(f"CKA compares features of the same images, at least {MIN_COMPARED}; got {sorted(sizes)}")
    left = torch.stack([_centred_gram(x) for x in rows]).flatten(1)
    right = left if rows is columns else torch.stack([_centred_gram(x) for x in columns]).flatten(1)
    cross = left @ right.T
    return (cross / left.norm(dim=1)[:, None] / right.norm(dim=1)).double()


def _centred_gram(x: Tensor) -> Tensor:
    """U-centred Gram matrix [N, N] of the features: inner products of such matrices are unbiased HSIC times N (N - 3).

    (Szekely and Rizzo, Annals of Statistics 42, 2014, on kernels with a zero diagonal.)
    """
    n = len(x)
    x = (x - x.mean(0)).double()  # changes nothing in exact arithmetic, and keeps the products small
    gram = (x @ x.T).fill_diagonal_(0)
    sums = gram.sum(0)
    gram = gram - sums[:, None] / (n - 2) - sums / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
    return gram.fill_diagonal_(0).float()


def block_similarity(models: Mapping[str, Features], pooling: str) -> dict[str, Any]:
    """CKA between all blocks of every model, and of the first model's blocks with those of each later one.

    The record names the matrices "<model>" and "<first>/<later>": [blocks of the row model][blocks of the column
    model]. ``change`` holds, for equal depths, 1 - CKA of each block with itself in the later model.
    """
    by_block = {name: [value[key] for key in value.keys if key[1] == pooling] for name, value in models.items()}
    first, *later = models
    matrices = {name: cka_matrix(blocks, blocks) for name, blocks in by_block.items()}
    matrices |= {f"{first}/{name}": cka_matrix(by_block[first], by_block[name]) for name in later}
    change = {
        name: (1 - matrices[f"{first}/{name}"].diagonal()).tolist()
        for name in later
        if len(by_block[name]) == len(by_block[first])
    }
    return {
        "kind": "block_similarity",
        "pooling": pooling,
        "images": len(models[first]),
        "measure": "linear CKA, unbiased HSIC",
        "matrices": {name: matrix.tolist() for name, matrix in matrices.items()},
        "change": change,
        "statements": [_said_of(first, name, values) for name, values in change.items()],
        "version": __version__,
    }


def _said_of(first: str, name: str, change: Sequence[float]) -> str:
    most = max(range(len(change)), key=lambda block: change[block])
    return (
        f"{first} and {name} are least alike at block {most} (CKA {1 - change[most]:.4g}; 1 is the same); block 0 has "
        f"{1 - change[0]:.4g}, the last block {1 - change[-1]:.4g}."
    )
