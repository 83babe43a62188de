"""The page's figures: one panel each, as SVG that follows the page's light or dark theme, with SVG and PNG to keep."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mim_refiner.report.figures import MORE_STYLES, POOLINGS, SHADE, STYLES, phase_starts, series_of
from mim_refiner.report.tables import STAGES

TEXT, AXIS, GRID = "#222222", "#8a8a8a", "#dddddd"
# What the light figure's colours are called in the page's style sheet, which has a dark value for each.
THEMED = {
    TEXT: "var(--ink)",
    AXIS: "var(--muted)",
    GRID: "var(--line)",
    SHADE.lower(): "var(--shade)",
    **{colour.lower(): f"var(--{name})" for name, (colour, _) in STYLES.items()},
    **{colour.lower(): f"var(--more-{number})" for number, (colour, _) in enumerate(MORE_STYLES)},
}
WIDTH, HEIGHT = 4.8, 3.3  # inches
LEGEND_LETTERS = 62  # a line of the legend, with about 6 for each mark
LABEL_ROOM = 0.25  # share of the axis that the name of a phase takes
PNG_DPI = 130


@dataclass(frozen=True)
class Panel:
    """A drawn figure: ``inline`` for the page, ``svg`` and ``png`` as data URIs to download."""

    name: str
    title: str
    alt: str
    inline: str
    svg: str
    png: str


def block_curve_panels(record: Mapping[str, Any], prefix: str = "") -> list[Panel]:
    """k-NN accuracy by block with 95 % bands, a panel for each pooling; ``record`` is of kind knn_by_block."""
    curves: Mapping[str, Mapping[str, Any]] = record["curves"]
    panels = []
    for pooling in dict.fromkeys(pooling for by_pooling in curves.values() for pooling in by_pooling):
        figure, axis = new_figure()
        for number, block in enumerate(sorted(record.get("head_blocks", []))):
            label = None if number else "blocks with heads"
            axis.axvspan(block - 0.5, block + 0.5, color=SHADE, alpha=0.25, linewidth=0, label=label)
        said = []
        for position, (model, by_pooling) in enumerate(curves.items()):
            if pooling not in by_pooling:
                continue
            curve = by_pooling[pooling]
            colour, marker = STYLES.get(model, MORE_STYLES[position % len(MORE_STYLES)])
            low, high = ([100 * pair[side] for pair in curve["ci95"]] for side in (0, 1))
            percent = [100 * value for value in curve["value"]]
            axis.fill_between(curve["blocks"], low, high, color=colour, alpha=0.18, linewidth=0)
            axis.plot(curve["blocks"], percent, color=colour, marker=marker, ms=4, lw=1.6, label=name_of(model))
            peak = max(range(len(percent)), key=percent.__getitem__)
            said.append(f"{name_of(model)}: best block {curve['blocks'][peak]} with {percent[peak]:.1f} %, "
                        f"last block {percent[-1]:.1f} %")  # fmt: skip
        axis.set_xlabel("encoder block (from 0)")
        axis.set_ylabel("k-NN accuracy (%)")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlim(-0.6, max(by[pooling]["blocks"][-1] for by in curves.values() if pooling in by) + 0.6)
        legend(axis)
        title = POOLINGS.get(pooling, pooling)
        alt = f"k-NN by block, {title}. " + "; ".join(said)
        panels.append(finish(figure, f"{prefix}block-curves-{pooling}", title, alt))
    return panels


LOG_GROUPS = (  # key of metrics.jsonl (with / for one a block), title
    ("loss/", "loss of each head"),
    ("loss", "loss"),
    ("alignment/", "alignment of each head (cosine)"),
    ("neighbor_similarity/", "neighbour similarity (cosine)"),
    ("knn_top1/", "online k-NN accuracy (%)"),
    ("lr", "learning rate (peak of all groups)"),
)


def learning_panels(records: Sequence[Mapping[str, Any]], prefix: str = "") -> list[Panel]:
    """Curves of a run's metrics.jsonl, one panel a quantity and one line a head; phases are marked."""
    panels = []
    for key, title in LOG_GROUPS:
        lines = series(records, key, 100 if key.startswith("knn") else 1)
        if key == "loss" and len(series(records, "loss/", 1)) == 1:
            continue  # the sum over one head is that head
        if lines:
            figure, axis = new_figure()
            _draw_log(axis, lines, phase_starts(records))
            ends = "; ".join(f"{name} ends at {values[-1]:.3g}" for name, (_, values) in list(lines.items())[:12])
            name = key.rstrip("/").replace("_", "-") + ("-by-head" if key.endswith("/") else "")
            panels.append(finish(figure, f"{prefix}{name}", title, f"{title} by training step. {ends}"))
    return panels


def comparison_panels(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Panel]:
    """Loss and online k-NN of several runs {name: records}, one line a run."""
    panels = []
    for key, title in (("loss", "loss"), ("knn_top1", "online k-NN accuracy (%)")):
        lines = {}
        for name, records in logs.items():
            found = series(records, key, 100 if key.startswith("knn") else 1)
            if found:
                lines[name] = found[next(iter(found))]
        if lines:
            figure, axis = new_figure()
            _draw_log(axis, lines, {})
            ends = "; ".join(f"{name} ends at {values[-1]:.3g}" for name, (_, values) in lines.items())
            panels.append(finish(figure, f"runs-{key}", title, f"{title} of the runs. {ends}"))
    return panels


def series(records: Sequence[Mapping[str, Any]], key: str, factor: float) -> dict[str, tuple[list[int], list[float]]]:
    """{line name: (steps, values)} of one metric, or with a final slash of every block of it, times ``factor``."""
    found = series_of(records, key, "block " if key.endswith("/") else key)
    return {name: (steps, [factor * value for value in values]) for name, (steps, values) in found.items()}


def name_of(model: str) -> str:
    """A stage in words."""
    return STAGES.get(model, model)


_LINES = [STYLES["after"], STYLES["full"], *MORE_STYLES, STYLES["before"]]


def _draw_log(axis: Axes, lines: Mapping[str, tuple[list[int], list[float]]], starts: Mapping[str, int]) -> None:
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
    if len(lines) > 1:
        legend(axis)


def new_figure() -> tuple[Figure, Axes]:
    """One axis in the colours that the page themes."""
    colours: Any = {"text.color": TEXT, "axes.labelcolor": TEXT, "axes.edgecolor": AXIS, "xtick.color": TEXT,
               "ytick.color": TEXT, "xtick.labelcolor": TEXT, "ytick.labelcolor": TEXT}  # fmt: skip
    with mpl.rc_context(colours):
        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=PNG_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
    axis.grid(axis="y", color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def legend(axis: Axes) -> None:
    """Below the axis, where it hides nothing."""
    handles, labels = axis.get_legend_handles_labels()
    columns = max(1, min(4, len(handles), LEGEND_LETTERS // (max(map(len, labels)) + 6)))
    figure = axis.figure
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9,
        labelcolor=TEXT,
    )  # fmt: skip


def finish(figure: Figure, name: str, title: str, alt: str) -> Panel:
    """The panel of a drawn figure; ``name`` is unique on the page."""
    svg = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = svg.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=PNG_DPI, facecolor="white")
    inline = re.sub(r"#[0-9a-f]{6}", lambda match: THEMED.get(match[0], match[0]), text)
    inline = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", inline)  # ids are unique on the whole page
    inline = re.sub(r"<svg ", '<svg aria-hidden="true" focusable="false" ', inline, count=1)
    standing = text.replace("<svg ", '<svg style="background:#fff" ', 1).encode()
    return Panel(
        name=name,
        title=title,
        alt=alt,
        inline=inline,
        svg="data:image/svg+xml;base64," + base64.b64encode(standing).decode(),
        png="data:image/png;base64," + base64.b64encode(png.getvalue()).decode(),
    )
