"""Each block's share of what the encoder gains, and the three regimes that the shares show (MIM-Refiner, section 2).

Early: k-NN and reconstruction both improve. Middle: k-NN jumps. Late: reconstruction improves and k-NN falls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mim_refiner._version import __version__
from mim_refiner.reporting import TITLES, signed

KIND = "regimes"


def improvement_shares(values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Share [depth] of each block in the improvement from block 0 to the best block; ``values`` higher = better.

    Share of block b = (value b - value b-1) / (best value - value 0); block 0 has 0. The shares up to the best block
    add up to 1, and a block that makes it worse has a negative share. All zero when no block is better than block 0.
    """
    numbers = np.asarray(values, dtype=np.float64)
    total = numbers.max() - numbers[0]
    if not total > 0:
        return np.zeros(len(numbers))
    return np.diff(numbers, prepend=numbers[0]) / total


def find_regimes(
    knn: Sequence[float] | NDArray[np.float64], error: Sequence[float] | NDArray[np.float64]
) -> dict[str, list[int]]:
    """Blocks of each regime, {"early": [...], "middle": [...], "late": [...]}; any may be empty.

    Late begins after the block of the best k-NN accuracy. Middle is the run of blocks up to that one over which k-NN
    gains most beyond reconstruction, in shares; early is what lies before it. Block 0 gains nothing and is early.
    """
    peak = int(np.argmax(knn))
    ahead = improvement_shares(knn) - improvement_shares(-np.asarray(error, dtype=np.float64))
    # the run ending at the peak with the largest sum; the longest of equals
    sums = np.cumsum(ahead[peak::-1])[::-1] if peak else np.zeros(1)
    start = 1 + int(np.argmax(sums[1:])) if peak else 1
    blocks = list(range(len(knn)))
    return {"early": blocks[: min(start, peak + 1)], "middle": blocks[start : peak + 1], "late": blocks[peak + 1 :]}


def regimes_record(
    curves: Mapping[str, Mapping[str, Any]],
    errors: Mapping[str, NDArray[np.float64]],
    *,
    measure: str = "knn_top1",
    **facts: Any,
) -> dict[str, Any]:
    """JSON form for one or more models.

    ``curves`` holds the k-NN curve of each model (as in blocks.json: value, ci95, peak_before_last), ``errors`` the
    reconstruction error of each block and image [depth, N]. Without labels the curves are of neighbour consistency
    (``measure``), which takes the place of k-NN. ``facts`` (pooling, settings, samples) are kept.
    """
    what = TITLES[measure]
    models = {}
    for name, curve in curves.items():
        error = errors[name].mean(1)
        regimes = find_regimes(curve["value"], error)
        models[name] = {
            "knn": list(curve["value"]),
            "knn_ci95": [list(pair) for pair in curve["ci95"]],
            "error": error.tolist(),
            "knn_share": improvement_shares(curve["value"]).tolist(),
            "reconstruction_share": improvement_shares(-error).tolist(),
            "regimes": regimes,
            "statement": _statement(name, regimes, curve, error, what),
        }
    return {"kind": KIND, "measure": measure, "models": models, **facts, "version": __version__}


def _statement(
    name: str, regimes: Mapping[str, list[int]], curve: Mapping[str, Any], error: NDArray[np.float64], what: str
) -> str:
    parts = []
    for regime, blocks in regimes.items():
        if not blocks:
            parts.append(f"no {regime} regime")
            continue
        first, last = blocks[0], blocks[-1]
        start = max(0, first - 1)  # what came in is what the block before gave out
        knn = 100 * (curve["value"][last] - curve["value"][start])
        change = error[last] - error[start]
        parts.append(
            f"{regime} {first} to {last} ({what} {signed(knn)} points, reconstruction error {signed(change, 3)})"
        )
    late = regimes["late"]
    doubt = "" if not late or curve["peak_before_last"] else f"; the late fall of {what} is within chance"
    return f"{name}, regimes by block: {', '.join(parts)}{doubt}."
