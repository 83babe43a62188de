"""PNG figures from result files, drawn without pyplot: nothing global changes and no display is needed."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mim_refiner.errors import InputError
from mim_refiner.files import read_json, read_regular, reading, write_bytes
from mim_refiner.report.tables import STAGES

DPI = 150
# Okabe-Ito colours: told apart with colour-blind eyes; markers tell them apart in grey print
STYLES = {"before": ("#555555", "o"), "after": ("#0072B2", "s"), "full": ("#D55E00", "^")}
MORE_STYLES = (("#009E73", "D"), ("#CC79A7", "v"), ("#E69F00", "P"))
POOLINGS = {"cls": "class token", "mean": "mean of patch tokens"}
SHADE = "#F0E442"


def block_curves(result: Mapping[str, Any] | str | Path, path: str | Path, *, title: str = "") -> Path:
    """Draw k-NN accuracy by block, a panel for each pooling, a line with its 95 % band for each model.

    ``result`` is the record (or JSON file) of ``analysis.blocks``; its ``head_blocks`` are shaded. Returns ``path``.
    Raises InputError for another kind of JSON.
    """
    record = read_record(result, "knn_by_block", "curves")
    curves: Mapping[str, Mapping[str, Any]] = record["curves"]
    poolings = list(dict.fromkeys(pooling for by_pooling in curves.values() for pooling in by_pooling))
    figure, axes = panels(len(poolings), columns=len(poolings), share_y=True)
    for axis, pooling in zip(axes, poolings, strict=True):
        shade_blocks(axis, record.get("head_blocks", []))
        for position, (model, by_pooling) in enumerate(curves.items()):
            if pooling in by_pooling:
                _draw_curve(axis, model, position, by_pooling[pooling])
        axis.set_title(POOLINGS.get(pooling, pooling), fontsize=10)
        axis.set_xlabel("encoder block (from 0)")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlim(-0.6, max(by[pooling]["blocks"][-1] for by in curves.values() if pooling in by) + 0.6)
    what = "neighbour consistency" if record.get("measure") == "consistency" else "k-NN accuracy"
    axes[0].set_ylabel(f"{what} (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(title or f"{what} by block, with 95 % intervals", fontsize=11)
    return save_figure(figure, path)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl in step order: the last record of every step counts (a resumed run repeats some).

    A line cut short by a kill is left out. Raises InputError when the file cannot be read.
    """
    with reading(path, "give the metrics.jsonl of a run", InputError):
        lines = read_regular(path).split(b"\n")
    by_step: dict[int, dict[str, Any]] = {}
    for line in lines:
        try:
            record = json.loads(line)
            step, *_ = [int(record[key]) for key in ("total_step", "step") if key in record]
            by_step[step] = record
        except Exception:  # a crashed file system leaves anything
            continue
    return [by_step[step] for step in sorted(by_step)]


def series_of(records: Sequence[Mapping[str, Any]], key: str, label: str) -> dict[str, tuple[list[int], list[float]]]:
    """{line name: (steps, values)} of one metric, or of ``key/<block>`` for every block."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        for name, value in record.items():
            matches = name.startswith(key) if key.endswith("/") else name == key
            if matches and isinstance(value, int | float):
                steps, values = series.setdefault(label + name[len(key) :], ([], []))
                steps.append(int(record.get("total_step", record.get("step", 0))))
                values.append(float(value))
    return series


def phase_starts(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """{phase: step at which it begins}, on the axis of all steps."""
    starts: dict[str, int] = {}
    for record in records:
        step = int(record.get("total_step", record.get("step", 0)))
        starts.setdefault(str(record.get("phase", "")), step - int(record.get("step", step)))
    starts.pop("", None)
    return starts


def read_record(result: Mapping[str, Any] | str | Path, kind: str, content: str) -> Mapping[str, Any]:
    """The record of an analysis, or its JSON file; InputError unless it is of ``kind`` and has ``content``."""
    if isinstance(result, str | Path):
        try:
            result = read_json(result)
        except OSError as error:
            raise InputError(f"{result}: cannot read ({error.strerror}); give the JSON of an analysis") from None
        except ValueError:
            raise InputError(f"{result}: not a JSON file; give the JSON of an analysis") from None
    if not isinstance(result, Mapping) or result.get("kind") != kind or not result.get(content):
        raise InputError(f"this figure needs the JSON of an analysis (kind '{kind}'); run mim-refiner analyze")
    return result


def panels(count: int, *, columns: int, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` axes in rows of ``columns``."""
    rows = -(-count // columns)
    figure = Figure(figsize=(4.6 * columns + 0.4, 3.4 * rows + 0.5), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharey=share_y, squeeze=False)
    axes = list(grid.flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis in axes[:count]:
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def _draw_curve(axis: Axes, model: str, position: int, curve: Mapping[str, Any]) -> None:
    colour, marker = STYLES.get(model, MORE_STYLES[position % len(MORE_STYLES)])
    percent = [100 * value for value in curve["value"]]
    low, high = ([100 * pair[side] for pair in curve["ci95"]] for side in (0, 1))
    axis.fill_between(curve["blocks"], low, high, color=colour, alpha=0.18, linewidth=0)
    axis.plot(
        curve["blocks"],
        percent,
        color=colour,
        marker=marker,
        markersize=4,
        linewidth=1.6,
        label=STAGES.get(model, model),
    )


def shade_blocks(axis: Axes, blocks: Sequence[int]) -> None:
    """Shade the blocks that carry heads."""
    for number, block in enumerate(sorted(blocks)):
        axis.axvspan(
            block - 0.5,
            block + 0.5,
            color=SHADE,
            alpha=0.25,
            linewidth=0,
            label="blocks with heads" if number == 0 else None,
        )


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write the PNG atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return write_bytes(path, buffer.getvalue())
