"""PNG figures of the analysis: atlas, regimes, block similarity, head behaviour. From result JSON only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mim_refiner.errors import InputError
from mim_refiner.report.figures import (
    draw_band,
    draw_log,
    legend,
    measure_of,
    panels,
    phase_starts,
    read_metrics,
    save_figure,
    series_of,
)
from mim_refiner.report.tables import STAGES

REGIME_COLOURS = {"early": "#56B4E9", "middle": "#F0E442", "late": "#E69F00"}
MEASURES = {
    "knn_top1": "k-NN accuracy (%)",
    "probe_top1": "ridge probe accuracy (%)",
    "consistency": "neighbour consistency (%)",
    "rank": "effective rank",
}
HEAD_METRICS = {
    "alignment/": "alignment (cosine)",
    "neighbor_similarity/": "neighbour similarity (cosine)",
    "neighbor_age/": "neighbour age (samples)",
    "neighbor_accuracy/": "neighbour accuracy",
}


def atlas_map(record: Mapping[str, Any], path: str | Path) -> Path:
    """Heat map of an atlas: blocks across, pooling and norm down, a panel a measure; the recommended cell framed."""
    cells: Sequence[Mapping[str, Any]] = record["cells"]
    shown = [name for name in MEASURES if name in cells[0]]
    figure, axes = panels(len(shown), columns=len(shown))
    rows = list(dict.fromkeys((cell["norm"], cell["pooling"]) for cell in cells))
    blocks = sorted({cell["block"] for cell in cells})
    chosen = record["recommendation"]
    for axis, measure in zip(axes, shown, strict=True):
        scale = 1 if measure == "rank" else 100
        values = {(cell["norm"], cell["pooling"], cell["block"]): scale * cell[measure] for cell in cells}
        table = [[values[(*row, block)] for block in blocks] for row in rows]
        axis.grid(False)
        image = axis.imshow(
            table, aspect="auto", cmap="viridis", extent=(-0.5, len(blocks) - 0.5, len(rows) - 0.5, -0.5)
        )
        figure.colorbar(image, ax=axis, location="bottom", shrink=0.8).set_label(MEASURES[measure], fontsize=8)
        axis.set_yticks(range(len(rows)), [f"{pooling}, {'final norm' if norm else 'raw'}" for norm, pooling in rows])
        axis.set_xticks(range(len(blocks)), [str(block) for block in blocks], fontsize=7 if len(blocks) > 14 else 9)
        axis.set_xlabel("encoder block (from 0)")
        if len(blocks) <= 12:
            _write_values(axis, table)
        _frame(axis, blocks.index(chosen["block"]), rows.index((chosen["norm"], chosen["pooling"])))
    figure.suptitle("Atlas: which block, pooling and norm (frame: recommended)", fontsize=11)
    return save_figure(figure, path)


def regimes_plot(record: Mapping[str, Any], path: str | Path) -> Path:
    """k-NN and reconstruction error by block with the three regimes, and below each block's share of the improvement.

    ``record``: of ``analysis.regimes``. A column for each model.
    """
    models: Mapping[str, Mapping[str, Any]] = record["models"]
    what = measure_of(record)
    figure, axes = panels(2 * len(models), columns=len(models))
    for column, (name, model) in enumerate(models.items()):
        blocks = list(range(len(model["knn"])))
        top, bottom = axes[column], axes[column + len(models)]
        for axis in (top, bottom):
            _shade_regimes(axis, model["regimes"])
            axis.set_xlim(-0.5, len(blocks) - 0.5)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        draw_band(top, blocks, model["knn"], model["knn_ci95"], "#0072B2", "o", f"{what} (%)")
        top.set_ylabel(f"{what} (%)", color="#0072B2")
        other = top.twinx()
        other.plot(blocks, model["error"], color="#D55E00", marker="s", markersize=4, label="reconstruction error")
        other.set_ylabel("reconstruction error", color="#D55E00")
        top.set_title(STAGES.get(name, name), fontsize=10, pad=16)
        for side, label, colour in ((-0.2, what, "#0072B2"), (0.2, "reconstruction", "#D55E00")):
            shares = model["knn_share" if label == what else "reconstruction_share"]
            places = [block + side for block in blocks]
            bottom.bar(places, [100 * share for share in shares], 0.4, color=colour, label=label)
        bottom.axhline(0, color="#555555", linewidth=0.8)
        bottom.set_ylabel("share of the improvement (%)")
        bottom.set_xlabel("encoder block (from 0)")
        bottom.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{what} and reconstruction by block: early, middle and late regime", fontsize=11)
    return save_figure(figure, path)


def similarity_map(record: Mapping[str, Any], path: str | Path) -> Path:
    """Heat maps of the CKA between blocks, within each model and across; ``record``: ``analysis.similarity``."""
    matrices: Mapping[str, Any] = record["matrices"]
    figure, axes = panels(len(matrices), columns=len(matrices))
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        rows, _, columns = name.partition("/")
        axis.grid(False)
        values = [[float("nan") if value is None else float(value) for value in row] for row in matrix]
        image = axis.imshow(values, vmin=0, vmax=1, cmap="magma", origin="lower")
        axis.set_title(f"{rows} and {columns}" if columns else rows, fontsize=10)
        axis.set_ylabel(f"block of {rows}")
        axis.set_xlabel(f"block of {columns or rows}")
    figure.colorbar(image, ax=axes, shrink=0.8).set_label("linear CKA")
    figure.suptitle("Similarity of blocks", fontsize=11)
    return save_figure(figure, path)


def head_behaviour(metrics: str | Path, path: str | Path) -> Path:
    """What the heads did in a run, by block: alignment, neighbour similarity, age and accuracy (labels given).

    ``metrics`` is the metrics.jsonl of a run. Raises InputError when it holds none of them.
    """
    records = read_metrics(metrics)
    found = [(series_of(records, key, "block "), label) for key, label in HEAD_METRICS.items()]
    shown = [(lines, label) for lines, label in found if lines]
    if not shown:
        raise InputError(f"{metrics}: no head metrics to draw; give the metrics.jsonl of a refine run")
    figure, axes = panels(len(shown), columns=min(2, len(shown)))
    for axis, (lines, label) in zip(axes, shown, strict=True):
        draw_log(axis, lines, phase_starts(records))
        axis.set_ylabel(label)
    legend(axes[0])
    figure.suptitle("Heads during training", fontsize=11)
    return save_figure(figure, path)


def _write_values(axis: Axes, table: Sequence[Sequence[float]]) -> None:
    low, high = min(map(min, table)), max(map(max, table))
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            dark = value < low + 0.6 * (high - low)
            axis.text(
                column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color="white" if dark else "black"
            )


def _frame(axis: Axes, column: int, row: int) -> None:
    left, right, top, bottom = column - 0.5, column + 0.5, row - 0.5, row + 0.5
    axis.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color="#D55E00", linewidth=2.5)


def _shade_regimes(axis: Axes, regimes: Mapping[str, Sequence[int]]) -> None:
    for name, blocks in regimes.items():
        if blocks:
            axis.axvspan(blocks[0] - 0.5, blocks[-1] + 0.5, color=REGIME_COLOURS[name], alpha=0.18, linewidth=0)
            centre = (blocks[0] + blocks[-1]) / 2
            axis.text(centre, 1.0, name, transform=axis.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)
