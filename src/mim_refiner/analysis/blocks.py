"""k-NN accuracy by block: where in the encoder the class information sits, and what refinement changed.

The method rests on one observation: in a masked image model the accuracy peaks before the last block (paper section 2).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mim_refiner._version import __version__
from mim_refiner.core.metrics import paired_interval
from mim_refiner.data.decode import ImageSet
from mim_refiner.errors import InputError
from mim_refiner.evaluation.results import Result
from mim_refiner.evaluation.suite import evaluate_backbone
from mim_refiner.files import write_bytes, write_json
from mim_refiner.models.backbone import Backbone

KIND = "knn_by_block"  # names the JSON form for readers such as report.figures


@dataclass(frozen=True)
class BlockCurves:
    """``record`` is the JSON form; ``correct`` holds {"<model>/<pooling>": bool [blocks, N]} for paired comparisons."""

    record: dict[str, Any]
    correct: dict[str, NDArray[np.bool_]]

    def write(self, folder: str | Path, name: str = "blocks") -> Path:
        """Write ``<name>.json`` and ``<name>.npz`` atomically; return the JSON's path."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **self.correct)  # type: ignore[arg-type]  # numpy's stub mistakes the names
        write_bytes(Path(folder) / f"{name}.npz", buffer.getvalue())
        return write_json(Path(folder) / f"{name}.json", self.record)


def knn_by_block(
    models: Mapping[str, Backbone],
    train: ImageSet,
    test: ImageSet | None,
    *,
    head_blocks: Sequence[int] = (),
    **options: Any,
) -> BlockCurves:
    """Measure the k-NN accuracy of every block of one or more encoders ({"before": ..., "after": ...}).

    ``options`` go to ``evaluate_backbone`` (poolings, norm, settings, device, seed, reporter). ``head_blocks`` are
    marked in figures. Raises DataError without labels.
    """
    results = {
        name: evaluate_backbone(backbone, train, test, protocols=("knn",), blocks="all", **options)
        for name, backbone in models.items()
    }
    return curves_from_results(results, head_blocks=head_blocks)


def curves_from_results(results: Mapping[str, Mapping[str, Result]], *, head_blocks: Sequence[int] = ()) -> BlockCurves:
    """Collect the ``knn_top1`` results of {model: evaluate_backbone(...)} into curves and statements.

    With several models the first is the baseline, and ``change`` holds paired differences to it where blocks agree.
    Raises InputError when a model has no k-NN result.
    """
    curves: dict[str, dict[str, Any]] = {}
    correct: dict[str, NDArray[np.bool_]] = {}
    measured: list[Result] = []
    for model, found in results.items():
        curves[model] = {}
        knn = sorted((r for r in found.values() if r.metric == "knn_top1"), key=lambda r: r.block)
        if not knn:
            raise InputError(f"block curves of {model!r}: no k-NN result; evaluate with protocol knn and blocks all")
        measured += knn
        for pooling in dict.fromkeys(r.pooling for r in knn):
            row = [r for r in knn if r.pooling == pooling]
            hits = np.stack([r.correct for r in row if r.correct is not None])
            correct[f"{model}/{pooling}"] = hits
            curves[model][pooling] = _curve(row, hits)
    first = measured[0]
    record = {
        "kind": KIND,
        "head_blocks": list(head_blocks),
        "curves": curves,
        "change": _changes(curves, correct),
        "statements": [peak_statement(m, p, c) for m, by in curves.items() for p, c in by.items()],
        "norm": first.norm,
        "settings": dict(first.settings),
        "data": dict(first.data),
        "seed": first.seed,
        "version": __version__,
    }
    return BlockCurves(record, correct)


def _curve(row: Sequence[Result], hits: NDArray[np.bool_]) -> dict[str, Any]:
    values = [r.value for r in row]
    peak = int(np.argmax(values))
    difference, low, high = paired_interval(hits[-1], hits[peak])
    return {
        "blocks": [r.block for r in row],
        "value": values,
        "ci95": [list(r.ci95 or (r.value, r.value)) for r in row],
        "peak_block": row[peak].block,
        "peak_before_last": peak < len(row) - 1 and low > 0,
        "peak_minus_last": {"value": difference, "ci95": [low, high]},
    }


def peak_statement(model: str, pooling: str, curve: Mapping[str, Any]) -> str:
    """Say in one sentence whether the curve peaks before the last block.

    The interval is paired (same test images). It does not account for the peak being the best of all blocks.
    """
    value, (low, high) = curve["peak_minus_last"]["value"], curve["peak_minus_last"]["ci95"]
    top, last, end = max(curve["value"]), curve["value"][-1], curve["blocks"][-1]
    head = f"{model}, {pooling} pooling: k-NN peaks at block {curve['peak_block']} ({100 * top:.1f} %)"
    if curve["peak_block"] == end:
        return f"{head}, which is the last block."
    gap = f"{100 * value:.1f} points above the last block {end} ({100 * last:.1f} %)"
    interval = f"95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
    clear = "the peak is before the last block" if curve["peak_before_last"] else "not clearly before the last block"
    return f"{head}, {gap}; {interval}: {clear}."


def _changes(curves: Mapping[str, Mapping[str, Any]], correct: Mapping[str, NDArray[np.bool_]]) -> dict[str, Any]:
    """Paired difference of every later model to the first, by pooling and block."""
    baseline, *others = curves
    changes: dict[str, Any] = {}
    for model in others:
        for pooling, curve in curves[model].items():
            reference = curves[baseline].get(pooling)
            if reference is None or reference["blocks"] != curve["blocks"]:
                continue
            before, after = correct[f"{baseline}/{pooling}"], correct[f"{model}/{pooling}"]
            if before.shape != after.shape:
                continue
            intervals = [paired_interval(b, a) for b, a in zip(before, after, strict=True)]
            changes.setdefault(model, {})[pooling] = {
                "value": [value for value, _, _ in intervals],
                "ci95": [[low, high] for _, low, high in intervals],
            }
    return changes
