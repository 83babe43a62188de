"""Where the heads go: from measured blocks instead of a fixed share of the depth.

Rule: heads on every block from the first one that is as good as the best block (its paired 95 % interval to the best
includes zero) to the last block, but on no fewer than the last quarter of the blocks and no more than the last half.
The method's reason: the best block is where the abstract features end and the late regime begins, which refinement
has to turn round. The bounds are those of the published recipes (8 of 24 and 12 of 32 blocks lie within them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mim_refiner.analysis.atlas import Atlas
from mim_refiner.analysis.label_free import paired_scores
from mim_refiner.errors import InputError


def place_heads(atlas: Atlas, *, pooling: str, recipe_blocks: Sequence[int]) -> dict[str, Any]:
    """Choose head blocks by the raw cells of ``pooling`` (what the heads see) in the atlas of the encoder.

    Returns {"blocks", "recipe_blocks", "measure", "best_block", "first_good_block", "scores" [depth], "reason"}.
    """
    scores = list(atlas.curves().get(pooling, {}).values())
    if not scores:
        raise InputError(f"head placement: the atlas has no raw features of pooling {pooling!r}; use cls or mean")
    measure = atlas.record["measure"]
    best, first = first_as_good_as_best(scores)
    depth = len(scores)
    start = min(max(first, depth - depth // 2), depth - max(1, depth // 4))
    blocks = list(range(start, depth))
    return {
        "blocks": blocks,
        "recipe_blocks": list(recipe_blocks),
        "same_as_recipe": blocks == sorted(recipe_blocks),
        "measure": measure,
        "pooling": pooling,
        "best_block": best,
        "first_good_block": first,
        "scores": [float(score.mean()) for score in scores],
        "samples": atlas.record["samples"],
        "reason": _reason(measure, best, first, start, depth, scores, list(recipe_blocks)),
    }


def first_as_good_as_best(scores: Sequence[NDArray[np.float64]]) -> tuple[int, int]:
    """(best block, first block whose score is not clearly below it) from per-image scores of each block."""
    best = int(np.argmax([score.mean() for score in scores]))
    first = next(block for block in range(best + 1) if paired_scores(scores[block], scores[best])[1] <= 0)
    return best, first


def _reason(
    measure: str,
    best: int,
    first: int,
    start: int,
    depth: int,
    scores: Sequence[NDArray[np.float64]],
    recipe: list[int],
) -> str:
    what = "k-NN accuracy" if measure == "knn_top1" else "neighbour consistency (no labels)"
    found = f"best {what} at block {best} ({100 * scores[best].mean():.1f} %), as good from block {first} on"
    bound = ""
    if start != first:
        limit = "at least a quarter" if start < first else "at most half"
        bound = f"; moved to {start}, so that {limit} of the blocks have heads"
    recipe_text = f"{recipe[0]} to {recipe[-1]}" if recipe else "none"
    return f"heads on blocks {start} to {depth - 1}: {found}{bound} (the recipe's choice: {recipe_text})."
