"""Did refinement help? A verdict from paired predictions on labelled images; without labels, whether it did harm.

Without labels nothing is called better: training against augmentations raises neighbour consistency by itself, also
where k-NN stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mim_refiner.analysis.label_free import LabelFreeMeasures, bootstrap_interval, paired_means, rank_of_rows
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
    again: Iterator[str],
    compared: str,
    draws: int,
    knn: Sequence[float] = (),
    recommendation: Mapping[str, Any] | None = None,
    last_block: int | None = None,
    stopped: bool = False,
) -> list[str]:
    """What to try after "worse", "no clear change" or a stop, from the evidence of the run; nothing after other words.

    ``found``: the verdict; ``recipe``: the settings; ``again``: options that each name a run folder, to be added to
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
            f"--set refinement.epochs={max(1, round(share * phase['epochs']))} {next(again)}"
        )
    if word == WORSE or stopped:
        lines.append(f"smaller steps: --set refinement.base_lr={phase['base_lr'] / 2:.3g} {next(again)}")
        if not recipe["anchor"]["weight"]:
            lines.append(f"an anchor that holds the encoder near its start: --set anchor.weight=1 {next(again)}")
        if draws < MANY_DRAWS:
            lines.append(
                f"more images: few drawn often ({draws:,} draws here) are learned by heart: --data MORE {next(again)}"
            )
    elif word == UNCLEAR:
        low, high = found.get("ci95") or next((each["ci95"] for each in found.get("measures", ())), (0.0, 0.0))
        if high - low > WIDE:
            images = found["test_images"] if "test_images" in found else found["samples"]["images"]
            least = f"with {images} no change below {50 * (high - low):.1f} points shows"
            lines.append(f"more images to measure on: {least}: {compared}")
        if draws < MANY_DRAWS:
            lines.append(
                f"a longer run: the encoder saw {draws:,} draws, and gains grew with every epoch up to a million: "
                f"--set refinement.epochs={max(1, 2 * phase['epochs'])} {next(again)}"
            )
            if recipe["heads"]["swap_positive"] and recipe["guidance"] == "none":
                lines.append(
                    "positives without neighbours, which gave a small encoder more in a short run (docs/evidence.md): "
                    f"--set heads.swap_positive=false {next(again)}"
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


# Read off the runs of docs/label-free.md, which has the errors on encoders left out. COLLAPSE and MEAN_ALONE decide
# none of them; they lie below what was left where k-NN accuracy did not clearly fall (0.45 and 0.20).
FALL = 0.01  # of view retrieval: more is worse
MIN_CHANGE = 0.02  # of neighbour consistency (a share, 0-1): smaller changes are none, however certain
KEPT = 0.75  # of the effective rank, centred: less is worse unless the consistency rose, which leaves it open
COLLAPSE = 0.4  # less is worse in any case: features on few directions agree with each other and tell little apart
MEAN_ALONE = 0.1  # of the effective rank with the mean in: less is worse, since nothing but the mean is left
DECISIVE = ("neighbour consistency", "view retrieval", "effective rank", "effective rank, centred")
REPLICATES = 100  # of the bootstrap of a rank


class Change(NamedTuple):
    """A measure before and after, and the paired 95 % interval of the difference."""

    before: float
    after: float
    low: float
    high: float

    def shown(self) -> dict[str, Any]:
        said = "rose" if self.low > 0 else "fell" if self.high < 0 else "unclear"
        return {"before": self.before, "after": self.after, "difference": self.after - self.before,
                "ci95": [self.low, self.high], "change": said}  # fmt: skip


def label_free_verdict(
    before: LabelFreeMeasures, after: LabelFreeMeasures, *, drift: NDArray[np.float64] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Compare two encoders on the same N images and views, by :func:`judged`.

    Returns {"verdict", "reason", "measures": [a row each], "samples", "rule"}. ``drift`` [M]: see ``dense_drift``.
    """

    def mean(name: str) -> Change:
        old, new = (getattr(measures, name) for measures in (before, after))
        return Change(float(old.mean()), float(new.mean()), *paired_means(old, new, seed=seed)[1:])

    changes = {
        "neighbour consistency": mean("consistency"),
        "view retrieval": mean("retrieval"),
        "effective rank": _rank(before, after, seed),
        "effective rank, centred": _rank(before, after, seed, centred=True),
        "cluster stability": mean("stability"),
    }
    word, why = judged(*(changes[name] for name in DECISIVE))
    measures = [{"measure": name, **change.shown()} for name, change in changes.items()]
    if drift is not None:  # how far the dense features moved; no part of the rule
        moved = Change(0.0, float(drift.mean()), *paired_means(np.zeros_like(drift), drift, seed=seed)[1:])
        measures.append({"measure": "drift of patch features", **moved.shown(), "change": "shown only"})
    return {
        "verdict": word,
        "reason": f"{why} Judged without labels, on {len(before.consistency)} images.",
        "measures": measures,
        "samples": {"images": len(before.consistency), "cluster_pairs": len(before.stability)},
        "rule": {"fall": FALL, "min_change": MIN_CHANGE, "kept": KEPT, "collapse": COLLAPSE, "mean_alone": MEAN_ALONE},
    }


def not_measured(needs: str) -> dict[str, Any]:
    return {"verdict": "not measured", "reason": f"A verdict without labels needs {needs}."}


def judged(consistency: Change, retrieval: Change, rank: Change, centred: Change) -> tuple[str, str]:
    """The word and its reason; what fell or rose must do so by its interval too.

    "worse" where view retrieval, neighbour consistency or an effective rank fell far, but "no clear change" where a
    rank fell by less than a collapse and the consistency rose; "no collapse seen" where only that; "no clear change"
    where neither.
    """
    moved, found = (
        f"{100 * change.before:.1f} % before, {100 * change.after:.1f} % now (95 % interval of the change "
        f"{signed(100 * change.low)} to {signed(100 * change.high)})" for change in (consistency, retrieval)
    )  # fmt: skip
    if consistency.high < -MIN_CHANGE:
        return WORSE, f"Two views of an image share fewer of their neighbours than before: {moved}."
    if retrieval.high < -FALL:
        return WORSE, f"Fewer images are found by another view of them: {found}."
    limits = ((" (centred)", centred, COLLAPSE), ("", rank, MEAN_ALONE), (" (centred)", centred, KEPT))
    for kind, change, least in limits:
        if change.after < least * change.before and change.high < 0:
            fell = f"The effective rank of the features{kind} fell from {change.before:.1f} to {change.after:.1f}: "
            if least == KEPT and consistency.low > 0:
                return UNCLEAR, f"{fell}fewer directions; but two views share more of their neighbours: {moved}."
            return WORSE, f"{fell}on so few directions fewer images are told apart."
    if consistency.low <= MIN_CHANGE:
        neither = "Two views of an image share neither clearly more nor clearly fewer of their neighbours than before"
        return UNCLEAR, f"{neither}: {moved}; it counts where the interval lies beyond {100 * MIN_CHANGE:.0f} points."
    return SOUND, (
        f"Two views of an image share more of their neighbours than before: {moved}. That rules a collapse out and "
        "proves no gain: with labels k-NN accuracy may have fallen by a few points."
    )


def _rank(before: LabelFreeMeasures, after: LabelFreeMeasures, seed: int, *, centred: bool = False) -> Change:
    """Effective ranks; the difference is bootstrapped over images, in pairs.

    An effective rank of a resample is lower than that of as many different images, about alike for both encoders; the
    interval is moved so that its centre is the measured difference.
    """
    old, new = (rank_of_rows(x.features, centred=centred) for x in (before, after))
    difference, low, high, drawn = bootstrap_interval(
        lambda rows: new(rows) - old(rows), len(before.features), replicates=REPLICATES, seed=seed
    )
    shift, every = difference - float(np.median(drawn)), np.arange(len(before.features))
    return Change(old(every), new(every), low + shift, high + shift)
