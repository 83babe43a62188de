"""PNG figures from the records of an analysis, drawn without pyplot: nothing global changes, no display is needed."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from mim_refiner.errors import InputError
from mim_refiner.files import read_regular, reading, write_bytes
from mim_refiner.report.tables import STAGES
from mim_refiner.reporting import metric_title

DPI = 150
TEXT, AXIS, GRID = "#222222", "#8a8a8a", "#dddddd"
# Okabe-Ito colours: told apart with colour-blind eyes; markers tell them apart in grey print
STYLES = {"before": ("#555555", "o"), "after": ("#0072B2", "s"), "full": ("#D55E00", "^")}
MORE_STYLES = (("#009E73", "D"), ("#CC79A7", "v"), ("#E69F00", "P"))
POOLINGS = {"cls": "class token", "mean": "mean of patch tokens"}
SHADE = "#F0E442"
LEGEND_LETTERS = 62  # a line of the legend, with about 6 for each mark
LABEL_ROOM = 0.25  # share of the axis that the name of a phase takes
REGIME_COLOURS = {"early": "#56B4E9", "middle": "#F0E442", "late": "#E69F00"}
MEASURES = {name: metric_title(name, unit=True) for name in ("knn_top1", "probe_top1", "consistency", "rank")}
HEAD_METRICS = {
    "alignment/": "alignment (cosine)",
    "neighbor_similarity/": "neighbour similarity (cosine)",
    "neighbor_age/": "neighbour age (samples)",
    "neighbor_accuracy/": "neighbour accuracy",
}
LINES = [STYLES["after"], STYLES["full"], *MORE_STYLES, STYLES["before"]]
Lines = Mapping[str, tuple[list[int], list[float]]]  # {name: (steps, values)}


def block_curves(record: Mapping[str, Any], path: str | Path) -> Path:
    """Draw ``record`` (analysis.blocks): k-NN accuracy by block with 95 % bands, a panel for each pooling."""
    poolings = poolings_of(record)
    figure, axes = panels(len(poolings), columns=len(poolings), share_y=True)
    for axis, pooling in zip(axes, poolings, strict=True):
        draw_curves(axis, record, pooling)
        axis.set_title(POOLINGS.get(pooling, pooling), fontsize=10)
    axes[0].set_ylabel(f"{measure_of(record)} (%)")
    legend(axes[0])
    return save_figure(figure, path, f"{measure_of(record)} by block, with 95 % intervals")


def poolings_of(record: Mapping[str, Any]) -> list[str]:
    """The poolings of any of the curves, in their order."""
    return list(dict.fromkeys(pooling for by_pooling in record["curves"].values() for pooling in by_pooling))


def measure_of(record: Mapping[str, Any]) -> str:
    """What the curves of a record are of."""
    return metric_title(record.get("measure", "knn_top1"))


def draw_curves(axis: Axes, record: Mapping[str, Any], pooling: str) -> list[str]:
    """A line with its band for each model that has this pooling; blocks with heads are shaded. Returns it in words."""
    for number, block in enumerate(sorted(record.get("head_blocks", []))):
        label = None if number else "blocks with heads"
        axis.axvspan(block - 0.5, block + 0.5, color=SHADE, alpha=0.25, linewidth=0, label=label)
    said = []
    for position, (model, by_pooling) in enumerate(record["curves"].items()):
        if pooling in by_pooling:
            curve, name = by_pooling[pooling], STAGES.get(model, model)
            blocks, percent = curve["blocks"], [100 * value for value in curve["value"]]
            colour, marker = STYLES.get(model, MORE_STYLES[position % len(MORE_STYLES)])
            draw_band(axis, blocks, curve["value"], curve["ci95"], colour, marker, name)
            peak = max(range(len(percent)), key=percent.__getitem__)
            said.append(f"{name}: best block {blocks[peak]} with {percent[peak]:.1f} %, last block {percent[-1]:.1f} %")
            axis.set_xlim(-0.6, blocks[-1] + 0.6)
    axis.set_xlabel("encoder block (from 0)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return said


def draw_band(
    axis: Axes, blocks: Sequence[int], shares: Sequence[float], ci95: Any, colour: str, marker: str, label: str
) -> None:
    """A line of shares in percent with its 95 % band."""
    low, high = ([100 * pair[side] for pair in ci95] for side in (0, 1))
    axis.fill_between(blocks, low, high, color=colour, alpha=0.18, linewidth=0)
    percent = [100 * share for share in shares]
    axis.plot(blocks, percent, color=colour, marker=marker, markersize=4, linewidth=1.6, label=label)


def draw_log(axis: Axes, lines: Lines, starts: Mapping[str, int], numbers: Mapping[str, int] | None = None) -> None:
    """Lines over training steps; ``starts``: where phases begin, which are marked; ``numbers`` choose the colours."""
    for position, (name, (steps, values)) in enumerate(lines.items()):
        position = position if numbers is None else numbers[name]
        colour, marker = LINES[position % len(LINES)]
        dash = ("-", "--", ":")[position // len(LINES) % 3]
        points = marker if len(steps) < 30 else ""
        axis.plot(steps, values, label=name, color=colour, linestyle=dash, linewidth=1.3, marker=points, ms=3)
    longest = max(steps[-1] for steps, _ in lines.values())
    places = sorted(starts.items(), key=lambda item: item[1])
    for position, (name, start) in enumerate(places):
        axis.axvline(start, color=AXIS, linewidth=0.8, linestyle=":")
        follows = places[position + 1][1] if position + 1 < len(places) else longest
        height = 1.0 if follows - start > LABEL_ROOM * longest else 1.07  # above the label of the phase that follows
        axis.annotate(name, (start, height), xycoords=("data", "axes fraction"), fontsize=9, va="bottom", color=AXIS)
    axis.set_xlabel("training step")


def legend(axis: Axes) -> None:
    """Below the figure, where it hides nothing."""
    handles, labels = axis.get_legend_handles_labels()
    columns = max(1, min(4, len(handles), LEGEND_LETTERS // (max(map(len, labels)) + 6)))
    place: Any = {"loc": "outside lower center", "ncols": columns, "frameon": False, "fontsize": 9, "labelcolor": TEXT}
    axis.figure.legend(handles, labels, **place)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl in step order: the last record of every step counts (a resumed run repeats some).

    A line cut short by a kill is left out. Raises InputError when the file cannot be read.
    """
    with reading(path, "give the metrics.jsonl of a run", InputError):
        lines = read_regular(path).split(b"\n")
    by_step: dict[int, dict[str, Any]] = {}
    for line in lines:
        with contextlib.suppress(Exception):  # a crashed file system leaves anything
            record = json.loads(line)
            step, *_ = [int(record[key]) for key in ("total_step", "step") if key in record]
            by_step[step] = record
    return [by_step[step] for step in sorted(by_step)]


def step_of(record: Mapping[str, Any]) -> int:
    """The step of a record of metrics.jsonl, counted over all phases."""
    return int(record.get("total_step", record.get("step") or 0))


def series_of(records: Sequence[Mapping[str, Any]], key: str, label: str, factor: float = 1) -> Lines:
    """{line name: (steps, values times ``factor``)} of one metric, or of ``key/<block>`` for every block."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        for name, value in record.items():
            matches = name.startswith(key) if key.endswith("/") else name == key
            if matches and isinstance(value, int | float):
                steps, values = series.setdefault(label + name[len(key) :], ([], []))
                steps.append(step_of(record))
                values.append(factor * float(value))
    return series


def phase_starts(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """{phase: step at which it begins}, on the axis of all steps."""
    starts: dict[str, int] = {}
    for record in records:
        starts.setdefault(str(record.get("phase", "")), step_of(record) - int(record.get("step", step_of(record))))
    starts.pop("", None)
    return starts


def panels(
    count: int, *, columns: int, share_y: bool = False, size: tuple[float, float] = (4.6, 3.4)
) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` axes of ``size`` (inches) in rows of ``columns``."""
    rows = -(-count // columns)
    figure = Figure(figsize=(size[0] * columns + 0.4, size[1] * rows + 0.5), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharey=share_y, squeeze=False)
    axes = list(grid.flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis in axes[:count]:
        axis.grid(axis="y", color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def save_figure(figure: Figure, path: str | Path, title: str) -> Path:
    """Write the PNG atomically."""
    figure.suptitle(title, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return write_bytes(path, buffer.getvalue())


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
        image = axis.imshow(table, aspect="auto", cmap="viridis")
        figure.colorbar(image, ax=axis, location="bottom", shrink=0.8).set_label(MEASURES[measure], fontsize=8)
        axis.set_yticks(range(len(rows)), [f"{pooling}, {'final norm' if norm else 'raw'}" for norm, pooling in rows])
        axis.set_xticks(range(len(blocks)), [str(block) for block in blocks], fontsize=7 if len(blocks) > 14 else 9)
        axis.set_xlabel("encoder block (from 0)")
        if len(blocks) <= 12:
            _write_values(axis, table)
        corner = blocks.index(chosen["block"]) - 0.5, rows.index((chosen["norm"], chosen["pooling"])) - 0.5
        axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#D55E00", linewidth=2.5, clip_on=False))
    return save_figure(figure, path, "Atlas: which block, pooling and norm (frame: recommended)")


def regimes_plot(record: Mapping[str, Any], path: str | Path) -> Path:
    """k-NN and reconstruction error by block with the three regimes, and below each block's share of the improvement.

    ``record``: of ``analysis.reconstruction``. A column for each model.
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
    return save_figure(figure, path, f"{what} and reconstruction by block: early, middle and late regime")


def similarity_map(record: Mapping[str, Any], path: str | Path) -> Path:
    """Heat maps of the CKA between blocks, within each model and across; ``record``: ``analysis.blocks``."""
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
    return save_figure(figure, path, "Similarity of blocks")


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
    return save_figure(figure, path, "Heads during training")


def _write_values(axis: Axes, table: Sequence[Sequence[float]]) -> None:
    low, high = min(map(min, table)), max(map(max, table))
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            colour = "white" if value < low + 0.6 * (high - low) else "black"
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)


def _shade_regimes(axis: Axes, regimes: Mapping[str, Sequence[int]]) -> None:
    for name, blocks in regimes.items():
        if blocks:
            axis.axvspan(blocks[0] - 0.5, blocks[-1] + 0.5, color=REGIME_COLOURS[name], alpha=0.18, linewidth=0)
            centre = (blocks[0] + blocks[-1]) / 2
            axis.text(centre, 1.0, name, transform=axis.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)
