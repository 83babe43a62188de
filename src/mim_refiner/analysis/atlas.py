"""Atlas of an encoder: every block, pooling (class, mean, both) and norm (raw, final) measured, and which to use.

With labels the measure is k-NN accuracy, without labels the neighbour consistency of two views (``label_free.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import RidgeClassifierCV
from torch import Tensor

from mim_refiner._version import __version__
from mim_refiner.analysis.label_free import (
    PairedViews,
    neighbor_consistency,
    paired_scores,
    rank_of_rows,
    score_interval,
)
from mim_refiner.core.knn import knn_predict
from mim_refiner.core.run import Run
from mim_refiner.core.threads import threads_for
from mim_refiner.evaluation.features import Features
from mim_refiner.evaluation.knn import required_labels
from mim_refiner.reporting import TITLES, in_points

RANK_ROWS = 2000
PROBE_ROWS = 4000
COLLAPSE = 0.5  # cells with less than this share of the median effective rank are never recommended without labels
_ALPHAS = tuple(10.0**power for power in range(-1, 6))
Key = tuple[int, str, bool]  # block from 0; "cls", "mean" or "both"; final norm applied
Scores = NDArray[np.float64]  # [N], of each image


@dataclass(frozen=True)
class Atlas:
    """``record`` is the JSON form; ``scores`` of each cell are for paired comparisons."""

    record: dict[str, Any]
    scores: dict[Key, Scores]

    def curves(self) -> dict[str, dict[int, Scores]]:
        """Scores by pooling and block, {pooling: {block: [N]}}, of raw features and single poolings."""
        found: dict[str, dict[int, Scores]] = {}
        for (block, pooling, normed), score in self.scores.items():
            if not normed and pooling != "both":
                found.setdefault(pooling, {})[block] = score
        return {pooling: dict(sorted(blocks.items())) for pooling, blocks in found.items()}


def labelled_atlas(
    bank: Mapping[bool, Features],
    queries: Mapping[bool, Features],
    *,
    default: Key,
    probe: bool = True,
    both: bool = True,
    run: Run | None = None,
) -> Atlas:
    """Measure every cell: k-NN top-1, ridge probe top-1 (``probe``), effective rank of the bank.

    ``bank`` and ``queries`` hold features {norm applied?: Features}; ``default`` is the cell that is in use now;
    ``both`` adds the two poolings side by side as a third.
    Raises DataError without labels.
    """
    train_y = required_labels(next(iter(bank.values())), "bank")
    test_y = required_labels(next(iter(queries.values())), "query")

    def measured(train_x: Tensor, test_x: Tensor) -> tuple[Scores, dict[str, float]]:
        hits = (knn_predict(train_x, train_y, test_x, k=min(10, len(train_y))) == test_y).numpy().astype(np.float64)
        if not probe:
            return hits, {}
        return hits, {"probe_top1": ridge_probe(train_x[:PROBE_ROWS], train_y[:PROBE_ROWS], test_x, test_y)}

    samples = {"bank": len(train_y), "queries": len(test_y), "rank_rows": min(RANK_ROWS, len(train_y))}
    samples |= {"probe_rows": min(PROBE_ROWS, len(train_y))} if probe else {}
    return _atlas("knn_top1", measured, (bank, queries), default, both, samples, run or Run())


def label_free_atlas(views: PairedViews, *, default: Key, both: bool = True, run: Run | None = None) -> Atlas:
    """Measure every cell without labels: neighbour consistency of two views, and effective rank."""
    count = len(next(iter(views.clean.values())))
    samples = {"images": count, "rank_rows": min(RANK_ROWS, count)}

    def measured(clean: Tensor, first: Tensor, second: Tensor) -> tuple[Scores, dict[str, float]]:
        return neighbor_consistency(clean, first, second), {}

    return _atlas("consistency", measured, views, default, both, samples, run or Run())


def ridge_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Test accuracy of a linear classifier by ridge regression, its penalty chosen by leave-one-out on train.

    Closed form and so cheap enough for every cell; it ranks features as the trained probe of ``evaluate`` does, a
    few points below it.
    """
    mean, std = train_x.mean(0), train_x.std(0) + 1e-6
    with threads_for(train_x.numel() * train_x.shape[1]):
        model = RidgeClassifierCV(alphas=_ALPHAS).fit(((train_x - mean) / std).double().numpy(), train_y.numpy())
        predicted = model.predict(((test_x - mean) / std).double().numpy())
    return float((predicted == test_y.numpy()).mean())


def recommend(
    measure: str, cells: Sequence[Mapping[str, Any]], scores: Mapping[Key, Scores], default: Key, seed: int
) -> dict[str, Any]:
    """The cell to use: the best one, if cells chosen on one half of the images beat ``default`` on the other half.

    The best of many cells looks better than it is. So the gain is cross-fitted: each half of the images is scored by
    the cell that is best on the other half. Unless its paired 95 % interval lies above zero, ``default`` stays.
    """
    # Features on few directions agree with each other and tell nothing apart: neighbour consistency is blind to that.
    floor = COLLAPSE * float(np.median([cell["rank"] for cell in cells]))
    by_key = {(cell["block"], cell["pooling"], cell["norm"]): cell for cell in cells}
    sound = {key for key, cell in by_key.items() if measure == "knn_top1" or cell["rank"] >= floor}
    keys = plainest_first(sound & scores.keys())
    table = np.stack([scores[key] for key in keys])  # [cells, N]
    best = keys[int(table.mean(1).argmax())]
    chosen = table[best_on_other_half(table, seed), np.arange(table.shape[1])]
    value, low, high = paired_scores(scores[default], chosen, seed=seed)
    key = best if low > 0 else default
    return {
        **_named(key),
        "measure": measure,
        "value": by_key[key][measure],
        "best": _named(best) | {"value": float(scores[best].mean())},
        "default": _named(default) | {"value": float(scores[default].mean())},
        "gain": {"value": value, "ci95": [low, high], "how": "each half of the images scored by the other half's best"},
        "reason": _reason(measure, key, best, default, (value, low, high)),
    }


def plainest_first(keys: Iterable[Key]) -> list[Key]:
    """Cells in the order in which they are taken among equals: one pooling before both, raw before normed, later
    blocks first."""
    return sorted(keys, key=lambda key: (key[1] == "both", key[2], -key[0], key[1]))


def best_on_other_half(table: NDArray[Any], seed: int) -> NDArray[np.int64]:
    """[N]: which row of ``table`` [R, N] is best on that half of the images where an image is not.

    Among equals the first row, as for a single image, whose other half is empty.
    """
    order = np.random.default_rng(seed).permutation(table.shape[1])
    halves, best = (order[::2], order[1::2]), np.zeros(len(order), dtype=np.int64)
    for mine, other in (halves, halves[::-1]):
        best[mine] = table[:, other].mean(1).argmax() if len(other) else 0
    return best


def name_of(key: Key) -> str:
    """E.g. ``block 9, cls pooling, final norm``, as the options of embed and export say it."""
    block, pooling, norm = key
    pooling = "cls+mean" if pooling == "both" else pooling
    return f"block {block}, {pooling} pooling, {'final norm' if norm else 'no norm'}"


def _reason(measure: str, key: Key, best: Key, default: Key, gain: tuple[float, float, float]) -> str:
    what, points = TITLES[measure], in_points(*gain)
    if best == default:
        return f"{name_of(default)}. No other block, pooling or norm has better {what}."
    if key == best:
        return f"{name_of(key)}. Its {what} is better than that of {name_of(default)}: {points}."
    return (
        f"{name_of(default)}. Over all images the best {what} is that of {name_of(best)}, but it is not clearly "
        f"better: what is best on one half of them differs from the usual features on the other half by {points}."
    )


def _atlas(
    measure: str,
    measured: Callable[..., tuple[Scores, dict[str, float]]],
    features: Sequence[Mapping[bool, Features]],
    default: Key,
    both: bool,
    samples: Mapping[str, int],
    run: Run,
) -> Atlas:
    """``measured`` of the ``features`` of each cell gives the scores of the images, and what else the cell shows."""
    cells, scores = list[dict[str, Any]](), dict[Key, Scores]()
    for done, row in enumerate(zip(*(_cells(part, both) for part in features), strict=True), 1):
        (key, x), *_ = row
        scores[key], more = measured(*(part for _, part in row))
        shown = {"dimensions": x.shape[1], "rank": rank_of_rows(x[:RANK_ROWS])(np.arange(min(RANK_ROWS, len(x))))}
        shown |= {measure: float(scores[key].mean()), "ci95": list(score_interval(scores[key]))}
        cells.append(_named(key) | shown | more)
        run.reporter.progress(done, {})
    record = {
        "kind": "atlas",
        "measure": measure,
        "cells": cells,
        "recommendation": recommend(measure, cells, scores, default, run.seed),
        "samples": dict(samples),
        "seed": run.seed,
        "version": __version__,
    }
    return Atlas(record, scores)


def _cells(features: Mapping[bool, Features], both: bool) -> Iterator[tuple[Key, Tensor]]:
    """Every (block, pooling, norm) with its features; "both" lays class token and mean side by side."""
    for norm, found in features.items():
        for block in dict.fromkeys(block for block, _ in found.keys):
            poolings = [pooling for b, pooling in found.keys if b == block]
            for pooling in poolings:
                yield (block, pooling, norm), found[block, pooling]
            if both and len(poolings) > 1:
                yield (block, "both", norm), torch.cat([found[block, pooling] for pooling in poolings], dim=1)


def _named(key: Key) -> dict[str, Any]:
    return dict(zip(("block", "pooling", "norm"), key, strict=True))


def place_heads(atlas: Atlas, *, pooling: str, recipe_blocks: Sequence[int]) -> dict[str, Any]:
    """Choose head blocks by the raw cells of ``pooling`` (what the heads see) in the atlas of the encoder.

    Heads on every block from the first one that is as good as the best block (its paired 95 % interval to the best
    includes zero) to the last, but on no fewer than the last quarter of the blocks and no more than the last half. The
    method's reason: the best block is where the abstract features end and the late regime begins, which refinement has
    to turn round. The published recipes (8 of 24 and 12 of 32 blocks) lie within the bounds.

    Returns {"blocks", "recipe_blocks", "measure", "best_block", "first_good_block", "scores" [depth], "reason"}.
    """
    scores = list(atlas.curves()[pooling].values())
    measure = atlas.record["measure"]
    best = int(np.argmax([score.mean() for score in scores]))
    first = next(block for block in range(best + 1) if paired_scores(scores[block], scores[best])[1] <= 0)
    depth = len(scores)
    start = min(max(first, depth - depth // 2), depth - max(1, depth // 4))
    blocks = list(range(start, depth))
    told = f"best {TITLES[measure]} at block {best} ({100 * scores[best].mean():.1f} %), not clearly worse from block "
    told += f"{first} on"
    if start != first:
        limit = "at least a quarter" if start < first else "at most half"
        told += f"; moved to {start}, so that {limit} of the blocks have heads"
    usual = f"{recipe_blocks[0]} to {recipe_blocks[-1]}" if recipe_blocks else "none"
    return {
        "blocks": blocks,
        "recipe_blocks": list(recipe_blocks),
        "measure": measure,
        "pooling": pooling,
        "best_block": best,
        "first_good_block": first,
        "scores": [float(score.mean()) for score in scores],
        "samples": atlas.record["samples"],
        "reason": f"heads on blocks {start} to {depth - 1}: {told} (the recipe's choice: {usual}).",
    }
