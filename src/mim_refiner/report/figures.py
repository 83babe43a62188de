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
from mim_refiner.files import read_regular, reading, write_bytes
from mim_refiner.report.tables import STAGES

DPI = 150
TEXT, AXIS = "#222222", "#8a8a8a"
# Okabe-Ito colours: told apart with colour-blind eyes; markers tell them apart in grey print
STYLES = {"before": ("#555555", "o"), "after": ("#0072B2", "s"), "full": ("#D55E00", "^")}
MORE_STYLES = (("#009E73", "D"), ("#CC79A7", "v"), ("#E69F00", "P"))
POOLINGS = {"cls": "class token", "mean": "mean of patch tokens"}
SHADE = "#F0E442"
LEGEND_LETTERS = 62  # a line of the legend, with about 6 for each mark
LABEL_ROOM = 0.25  # share of the axis that the name of a phase takes
_LINES = [STYLES["after"], STYLES["full"], *MORE_STYLES, STYLES["before"]]
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
    figure.suptitle(f"{measure_of(record)} by block, with 95 % intervals", fontsize=11)
    return save_figure(figure, path)


def poolings_of(record: Mapping[str, Any]) -> list[str]:
    """The poolings of any of the curves, in their order."""
    return list(dict.fromkeys(pooling for by_pooling in record["curves"].values() for pooling in by_pooling))


def measure_of(record: Mapping[str, Any]) -> str:
    """What the curves of a record are of."""
    return "neighbour consistency" if record.get("measure") == "consistency" else "k-NN accuracy"


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


def draw_log(axis: Axes, lines: Lines, starts: Mapping[str, int]) -> None:
    """Lines over training steps; ``starts``: where phases begin, which are marked."""
    for position, (name, (steps, values)) in enumerate(lines.items()):
        colour, marker = _LINES[position % len(_LINES)]
        dash = ("-", "--", ":")[position // len(_LINES) % 3]
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
        try:
            record = json.loads(line)
            step, *_ = [int(record[key]) for key in ("total_step", "step") if key in record]
            by_step[step] = record
        except Exception:  # a crashed file system leaves anything
            continue
    return [by_step[step] for step in sorted(by_step)]


def series_of(records: Sequence[Mapping[str, Any]], key: str, label: str, factor: float = 1) -> Lines:
    """{line name: (steps, values times ``factor``)} of one metric, or of ``key/<block>`` for every block."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        for name, value in record.items():
            matches = name.startswith(key) if key.endswith("/") else name == key
            if matches and isinstance(value, int | float):
                steps, values = series.setdefault(label + name[len(key) :], ([], []))
                steps.append(int(record.get("total_step", record.get("step", 0))))
                values.append(factor * float(value))
    return series


def phase_starts(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """{phase: step at which it begins}, on the axis of all steps."""
    starts: dict[str, int] = {}
    for record in records:
        step = int(record.get("total_step", record.get("step", 0)))
        starts.setdefault(str(record.get("phase", "")), step - int(record.get("step", step)))
    starts.pop("", None)
    return starts


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


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write the PNG atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return write_bytes(path, buffer.getvalue())
