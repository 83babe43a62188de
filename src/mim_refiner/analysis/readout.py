"""Refine or read out: what reading an encoder better would bring, beside what refining it brought."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mim_refiner._version import __version__
from mim_refiner.analysis.atlas import best_on_other_half
from mim_refiner.analysis.forecast import lead_forecast
from mim_refiner.core.metrics import accuracy_interval, paired_interval
from mim_refiner.reporting import in_points

Hits = NDArray[np.bool_]  # per query image


class Cost(NamedTuple):
    """What a read-out costs on every image: blocks of the encoder that run, and what comes on top.

    ``extra`` operations of the read-out (without its classifier), as a share of the whole encoder's; None where the
    encoder's are not counted (not a plain ViT). ``parameters`` learned with labels, classifier left out.
    """

    blocks: int
    depth: int
    extra: float | None = 0.0
    parameters: int = 0


class Row(NamedTuple):
    """One way to read one encoder: ``hits`` of a classifier trained on it, ``knn`` accuracy where it needs none."""

    name: str
    hits: Hits
    cost: Cost
    refined: bool = False
    knn: float | None = None


def readout_record(rows: Sequence[Row], *, samples: dict[str, Any], seed: int) -> dict[str, Any]:
    """The table and the sentence. The first row is the START's usual feature, which the others are compared with.

    The best read-out of the START is chosen on one half of the images and judged on the other, both ways round; ties go
    to the row that comes first, the cheaper one.
    """
    usual, refined = rows[0], next((row for row in rows if row.refined), None)
    of_start = [row for row in rows if not row.refined]
    table = np.stack([row.hits for row in of_start])
    chosen = best_on_other_half(table, seed)
    best, names = table[chosen, np.arange(len(chosen))], [of_start[number].name for number in np.unique(chosen)]

    def shown(row: Row) -> dict[str, Any]:
        value, *ci95 = accuracy_interval(row.hits)
        change = None if row is usual else list(paired_interval(usual.hits, row.hits))
        return {"name": row.name, "refined": row.refined, "value": value, "ci95": ci95, "change": change,
                "knn_top1": row.knn, "cost": row.cost._asdict()}  # fmt: skip

    return {
        "kind": "readout",
        "measure": "accuracy of a trained classifier",
        "rows": [shown(row) for row in rows],
        "best": {"names": names, "value": float(best.mean()), "gain": list(paired_interval(usual.hits, best))},
        "sentence": _sentence(usual, best, names, refined),
        "samples": samples,
        "seed": seed,
        "version": __version__,
    }


def _sentence(usual: Row, best: Hits, names: Sequence[str], refined: Row | None) -> str:
    accuracy = f"{100 * best.mean():.1f} %"
    said = (
        "Before refinement no read-out is better on either half of the images than the usual feature, which reaches "
        f"{accuracy}"
    )
    if names != [usual.name]:
        gain = in_points(*paired_interval(usual.hits, best))
        said = (
            f"Before refinement the best read-out ({' or '.join(names)}; chosen on one half of the images, judged on "
            f"the other) reaches {accuracy}, against the usual feature {gain}"
        )
    if refined is None:
        if usual.knn is not None:
            said += f". Forecast: {lead_forecast(usual.knn, float(usual.hits.mean()))['reason']}"
        return f"{said}. What refining would bring is not measured here: give the refined encoder with --compare."
    change = paired_interval(best, refined.hits)
    word = "refine" if change[1] > 0 else "read out" if change[2] < 0 else "no clear difference"
    return f"{said}; after refinement {100 * refined.hits.mean():.1f} %, against that {in_points(*change)}: {word}."
