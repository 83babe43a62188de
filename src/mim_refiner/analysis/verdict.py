"""Did refinement help? A verdict from paired predictions on labelled images; without labels, whether it did harm.

Without labels nothing is called better: training against augmentations raises neighbour consistency by itself, also
where k-NN stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mim_refiner.analysis.label_free import LabelFreeMeasures, bootstrap_interval, rank_of_rows
from mim_refiner.core.metrics import paired_interval
from mim_refiner.reporting import signed

BETTER, UNCLEAR, WORSE = "better", "no clear change", "worse"
WIDE = 0.04  # an interval of more points hides what a short run can bring
MANY_DRAWS = 1_000_000  # images, of the runs whose gain grew with every epoch (LOG.md, 2026-11-25)
SOUND = "no collapse seen"  # all that is said for an encoder without labels


def verdict(before_correct: ArrayLike, after_correct: ArrayLike, *, measure: str = "k-NN accuracy") -> dict[str, Any]:
    """Compare per-image correctness [N] of two encoders on the same N test images.

    Returns {"verdict": "better" | "no clear change" | "worse", "knn_difference" (after - before, in accuracy 0-1),
    "ci95": [low, high] (paired), "test_images", "reason": one sentence}. Clear means that the interval leaves zero out.
    Raises InputError when the two do not cover the same samples.
    """
    difference, low, high = paired_interval(before_correct, after_correct)
    word = word_of(low, high)
    return {
        "verdict": word,
        "knn_difference": difference,
        "ci95": [low, high],
        "test_images": len(np.asarray(after_correct)),
        "reason": _reason(word, difference, low, high, measure),
    }


def what_next(
    found: Mapping[str, Any],
    recipe: Mapping[str, Any],
    *,
    again: str,
    compared: str,
    test_images: int,
    draws: int,
    knn: Sequence[float] = (),
    recommendation: Mapping[str, Any] | None = None,
    last_block: int | None = None,
    stopped: bool = False,
) -> list[str]:
    """What to try after "worse", "no clear change" or a stop, from the evidence of the run; nothing after other words.

    ``found``: the verdict; ``recipe``: the settings; ``again``: options that name another run folder, to be added to
    the run's own command with those of a line; ``compared``: the command that measures START and run on other images;
    ``draws``: images drawn for the encoder to learn from; ``knn``: online k-NN accuracy of the last block in the order
    of training; ``recommendation``: the features to use by the atlas; ``stopped``: the run was, as it went wrong, and
    what is judged is the best state before.
    """
    word, phase, lines = found.get("verdict"), recipe["refinement"], list[str]()
    if word not in (WORSE, UNCLEAR) and not stopped:
        return lines
    best = max(range(len(knn)), key=knn.__getitem__) if knn else 0
    if word == WORSE and 0 < best < len(knn) - 1 and knn[best] > knn[0]:
        share = (best + 1) / len(knn)
        lines.append(
            f"a shorter run: online k-NN accuracy was best ({100 * knn[best]:.1f} %) after {100 * share:.0f} % of it: "
            f"--set refinement.epochs={max(1, round(share * phase['epochs']))} {again}"
        )
    if word == WORSE or stopped:
        lines.append(f"smaller steps: --set refinement.base_lr={phase['base_lr'] / 2:.3g} {again}")
        if not recipe["anchor"]["weight"]:
            lines.append(f"an anchor that holds the encoder near its start: --set anchor.weight=1 {again}")
        if draws < MANY_DRAWS:
            lines.append(
                f"more images: few drawn often ({draws:,} draws here) are learned by heart: --data MORE {again}"
            )
    elif word == UNCLEAR:
        low, high = found.get("ci95") or (0.0, 0.0)
        if high - low > WIDE:
            lines.append(
                f"more images to measure on: {test_images} tell no change below {50 * (high - low):.1f} points: "
                f"{compared} --data LABELLED --test MORE"
            )
        if draws < MANY_DRAWS:
            lines.append(
                f"a longer run: the encoder saw {draws:,} draws, and gains grew with every epoch up to a million: "
                f"--set refinement.epochs={max(1, 2 * phase['epochs'])} {again}"
            )
            if recipe["heads"]["swap_positive"] and recipe["guidance"] == "none":
                lines.append(
                    "positives without neighbours, which gave a small encoder more in a short run (docs/evidence.md): "
                    f"--set heads.swap_positive=false {again}"
                )
    if recommendation and last_block is not None and recommendation.get("block") not in (None, last_block):
        where = f"--block {recommendation['block']} --pooling {recommendation['pooling']}"
        where += " --norm" if recommendation.get("norm") else ""
        lines.append(f"other features without any training, which are better: embed and export with {where}")
    return lines


def word_of(low: float, high: float) -> str:
    """What the 95 % interval of a difference says."""
    return BETTER if low > 0 else WORSE if high < 0 else UNCLEAR


def _reason(word: str, difference: float, low: float, high: float, measure: str) -> str:
    change = "rose" if difference > 0 else "fell" if difference < 0 else "did not move"
    by = f" by {signed(100 * difference)[1:]} points" if difference else ""
    interval = f"95 % interval {signed(100 * low)} to {signed(100 * high)}"
    measure = measure[0].upper() + measure[1:] if measure[1:2].islower() else measure
    if word == UNCLEAR:
        return f"{measure} {change}{by} ({interval}): the interval includes zero, so this may be chance."
    return f"{measure} {change}{by} on the same test images ({interval}): the interval leaves zero out."


# Smaller changes of neighbour consistency (a share, 0-1) are no clear change, however certain.
MIN_CHANGE = 0.02
# An effective rank below this share of the base's is worse, whatever the neighbours say: features that fall on few
# directions agree with each other without telling images apart.
COLLAPSE = 0.5
# Below it a rise of the consistency is no clear change: training against augmentations raises it before collapse too.
RANK_KEPT = 0.75
REPLICATES = 200  # of the bootstrap of the rank; its centred form takes a quarter, means are cheap and take 1000


def label_free_verdict(
    before: LabelFreeMeasures, after: LabelFreeMeasures, *, drift: NDArray[np.float64] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Compare two encoders on the same N images and views.

    "no collapse seen" or "worse": neighbour consistency rose or fell by more than ``MIN_CHANGE``, and so did its paired
    95 % interval; worse too when the effective rank collapsed; "no clear change" otherwise, and where a rise came with
    a rank that fell far. Returns {"verdict", "reason", "measures": [a row each], "confidence",
    "samples", "rule"}. ``drift`` [M]: see ``dense_drift``.
    """
    rows = {
        "neighbour consistency": _row(before.consistency, after.consistency, seed=seed),
        "view retrieval": _row(before.retrieval, after.retrieval, seed=seed),
        "effective rank": _rank_row(before, after, REPLICATES, seed),
        "effective rank, centred": _rank_row(before, after, REPLICATES // 4, seed, centred=True),
        "cluster stability": _row(before.stability, after.stability, seed=seed),
    }
    word, why = _decide(rows["neighbour consistency"], rows["effective rank"])
    measures = [{"measure": name, **row.shown()} for name, row in rows.items()]
    if drift is not None:  # how far the dense features moved; no part of the rule
        moved = _row(np.zeros_like(drift), drift, seed=seed).shown() | {"change": "shown only"}
        measures.append({"measure": "drift of patch features", **moved})
    confidence = _confidence(word, rows)
    return {
        "verdict": word,
        "reason": f"{why} Judged without labels; confidence {confidence['word']}: {confidence['why']}.",
        "measures": measures,
        "confidence": confidence,
        "samples": {"images": len(before.consistency), "cluster_pairs": len(before.stability)},
        "rule": {"min_change": MIN_CHANGE, "collapse": COLLAPSE, "rank_kept": RANK_KEPT},
    }


@dataclass(frozen=True)
class _Row:
    before: float
    after: float
    difference: float
    low: float
    high: float
    drawn: NDArray[np.float64]  # bootstrap replicates of the difference

    def shown(self) -> dict[str, Any]:
        change = "rose" if self.low > 0 else "fell" if self.high < 0 else "unclear"
        return {
            "before": self.before,
            "after": self.after,
            "difference": self.difference,
            "ci95": [self.low, self.high],
            "change": change,
        }


def _row(before: NDArray[np.float64], after: NDArray[np.float64], *, seed: int) -> _Row:
    """Means of per-image (or per-pair) values and the paired bootstrap of their difference."""
    difference = after - before
    value, low, high, drawn = bootstrap_interval(
        lambda rows: float(difference[rows].mean()), len(difference), seed=seed
    )
    return _Row(float(before.mean()), float(after.mean()), value, low, high, drawn)


def _rank_row(
    before: LabelFreeMeasures, after: LabelFreeMeasures, replicates: int, seed: int, *, centred: bool = False
) -> _Row:
    """Effective ranks; the difference is bootstrapped over images, in pairs.

    An effective rank of a resample is lower than that of as many different images, about alike for both encoders; the
    interval is moved so that its centre is the measured difference.
    """
    old, new = (rank_of_rows(x.features, centred=centred) for x in (before, after))
    every = np.arange(len(before.features))
    difference, low, high, drawn = bootstrap_interval(
        lambda rows: new(rows) - old(rows), len(every), replicates=replicates, seed=seed
    )
    shift = difference - float(np.median(drawn))
    return _Row(old(every), new(every), difference, low + shift, high + shift, drawn + shift)


def _decide(consistency: _Row, rank: _Row) -> tuple[str, str]:
    fell = f"from {rank.before:.1f} to {rank.after:.1f}"
    if rank.after < COLLAPSE * rank.before and rank.high < 0:
        return WORSE, f"The effective rank of the features collapsed {fell}: images are no longer told apart."
    interval = f"95 % interval {signed(100 * consistency.low)} to {signed(100 * consistency.high)}"
    moved = f"{100 * consistency.before:.1f} to {100 * consistency.after:.1f} % ({interval})"
    said = "Two views of an image share {} of their neighbours than before: " + moved
    if consistency.high < -MIN_CHANGE:
        return WORSE, f"{said.format('less')}."
    if consistency.low <= MIN_CHANGE:
        limit = f"not clearly more than {100 * MIN_CHANGE:.0f} points of change"
        return UNCLEAR, f"Two views of an image share {moved} of their neighbours: {limit}."
    if rank.after < RANK_KEPT * rank.before and rank.high < 0:
        return UNCLEAR, (
            f"{said.format('more')}, but the effective rank of the features fell {fell}: features on fewer directions "
            "agree more without telling more apart."
        )
    return SOUND, f"{said.format('more')}. That shows no harm and proves no gain."


def _confidence(word: str, rows: Mapping[str, _Row]) -> dict[str, Any]:
    """How sure: the share of bootstrap replicates on the same side, and whether other measures object.

    Cluster stability has no say: where labels exist it fell with real refinements and rose with collapse.
    """
    consistency, retrieval, rank = (rows[n] for n in ("neighbour consistency", "view retrieval", "effective rank"))
    drawn = consistency.drawn
    contested = word == UNCLEAR and consistency.low > MIN_CHANGE  # the rank fell too far
    shares = {
        SOUND: float((drawn > MIN_CHANGE).mean()),
        WORSE: float((drawn < -MIN_CHANGE).mean()),
        UNCLEAR: float((rank.drawn < (RANK_KEPT - 1) * rank.before).mean())
        if contested
        else float((np.abs(drawn) <= MIN_CHANGE).mean()),
    }
    collapsed = rank.after < COLLAPSE * rank.before
    share = 1.0 if word == WORSE and collapsed else shares[word]
    objections = {
        SOUND: {"view retrieval": retrieval.high < 0},
        WORSE: {"view retrieval": retrieval.low > 0 and not collapsed},
        UNCLEAR: {
            "neighbour consistency": contested,
            "view retrieval": retrieval.low > MIN_CHANGE or retrieval.high < -MIN_CHANGE,
        },
    }[word]
    against = [name for name, objects in objections.items() if objects]
    level = "high" if share >= 0.99 and not against else "medium" if share >= 0.9 and len(against) < 2 else "low"
    verb = "object" if len(against) > 1 else "objects"
    objects = f"{' and '.join(against)} {verb}" if against else "no other measure objects"
    return {
        "word": level,
        "bootstrap_agreement": share,
        "against": against,
        "why": f"{100 * share:.0f} % of resamples agree, and {objects}",
    }
