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
from matplotlib.figure import Figure

from mim_refiner.core.schedules import peak_learning_rate, warmup_cosine
from mim_refiner.errors import InputError
from mim_refiner.report import figures
from mim_refiner.report.figures import AXIS, TEXT, Lines, legend, measure_of

# What the light figure's colours are called in the page's style sheet, which has a dark value for each.
THEMED = {
    TEXT: "var(--ink)",
    AXIS: "var(--muted)",
    figures.GRID: "var(--line)",
    figures.SHADE.lower(): "var(--shade)",
    **{colour.lower(): f"var(--{name})" for name, (colour, _) in figures.STYLES.items()},
    **{colour.lower(): f"var(--more-{number})" for number, (colour, _) in enumerate(figures.MORE_STYLES)},
}
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
    found = []
    for pooling in figures.poolings_of(record):
        figure, axis = new_figure()
        said = figures.draw_curves(axis, record, pooling)
        axis.set_ylabel(f"{measure_of(record)} (%)")
        legend(axis)
        title = figures.POOLINGS.get(pooling, pooling)
        alt = f"{measure_of(record)} by block, {title}. {'; '.join(said)}"
        found.append(finish(figure, f"{prefix}block-curves-{pooling}", title, alt))
    return found


LOG_GROUPS = (  # key of metrics.jsonl (with / for one a block), title
    ("loss/", "loss of each head"),
    ("loss", "loss (sum over the heads)"),
    ("alignment/", "alignment of each head (cosine)"),
    ("neighbor_similarity/", "neighbour similarity (cosine)"),
    ("knn_top1/", "online k-NN accuracy (%)"),
    ("lr", "learning rate (of the group with the highest)"),
)


def learning_panels(
    records: Sequence[Mapping[str, Any]], prefix: str = "", recipe: Mapping[str, Any] | None = None
) -> list[Panel]:
    """Curves of a run's metrics.jsonl, one panel a quantity and one line a head; phases are marked.

    The learning rate is that of every step, by the ``recipe``: its peak falls between two lines of the log.
    """
    drawn, heads = [], _series(records, "loss/")
    for key, title in LOG_GROUPS:
        lines = _series(records, key)
        if key == "loss" and not heads:
            title = "loss"
        if key == "lr" and (found := rates(records, recipe or {})):
            lines, title = {"lr": found}, f"{title}, peak {max(found[1]):.3g}"
        if lines and (key != "loss" or len(heads) != 1):  # the sum over one head is that head
            name = key.rstrip("/").replace("_", "-") + ("-by-head" if key.endswith("/") else "")
            drawn.append(_log_panel(lines, figures.phase_starts(records), f"{prefix}{name}", title, "by training step"))
    return drawn


def comparison_panels(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Panel]:
    """Loss and online k-NN of several runs {name: records}, one line a run."""
    drawn = []
    numbers = {name: number for number, name in enumerate(logs)}
    for key, title in (("loss", "loss (sum over the heads)"), ("knn_top1", "online k-NN accuracy (%)")):
        found = {name: _series(records, key) for name, records in logs.items()}
        lines = {name: next(iter(each.values())) for name, each in found.items() if each}
        if lines:
            drawn.append(_log_panel(lines, {}, f"runs-{key}", title, "of the runs", numbers))
    return drawn


def _series(records: Sequence[Mapping[str, Any]], key: str) -> Lines:
    """Of one metric, or with a final slash of every block of it; k-NN in percent."""
    return figures.series_of(records, key, "block " if key.endswith("/") else key, 100 if key.startswith("knn") else 1)


def run_colour(number: int) -> str:
    """The colour of a run, by its place among those compared, as the style sheet calls it."""
    return THEMED[figures.LINES[number % len(figures.LINES)][0].lower()]


def rates(records: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]) -> tuple[list[int], list[float]] | None:
    """(steps, learning rate) of up to 400 steps and every peak of the phases so far; None where it cannot be told."""
    steps, values = list[int](), list[float]()
    try:
        for phase, start in figures.phase_starts(records).items():
            last = [record for record in records if record.get("phase") == phase][-1]
            a_epoch = last["step"] / last["epoch"]
            settings = recipe[{"warmup": "warmup", "pretrain": "training"}.get(phase, phase)]
            total, rise = round(settings["epochs"] * a_epoch), round(settings["warmup_epochs"] * a_epoch)
            shown = {*range(0, last["step"], max(1, last["step"] // 200)), min(rise, last["step"] - 1)}
            peak = peak_learning_rate(settings["base_lr"], recipe["batch_size"])
            how = {"total_steps": total, "warmup_steps": min(rise, total), "peak": peak, "end": settings["end_lr"]}
            for step in sorted(shown):
                steps.append(start + step + 1)
                values.append(warmup_cosine(step, **how))
    except (KeyError, TypeError, ZeroDivisionError, InputError):  # an older or damaged folder
        return None
    return (steps, values) if steps else None


def _log_panel(
    lines: Lines,
    starts: Mapping[str, int],
    name: str,
    title: str,
    how: str,
    numbers: Mapping[str, int] | None = None,
) -> Panel:
    figure, axis = new_figure()
    figures.draw_log(axis, lines, starts, numbers)
    axis.yaxis.set_major_formatter("{x:.4g}")  # no factor above the axis, where the phases are named
    if len(lines) > 1 or numbers is not None:
        legend(axis)
    ends = "; ".join(f"{line} ends at {values[-1]:.3g}" for line, (_, values) in list(lines.items())[:12])
    return finish(figure, name, title, f"{title} {how}. {ends}")


def new_figure() -> tuple[Figure, Axes]:
    """One axis in the colours that the page themes."""
    of_text = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "xtick.labelcolor", "ytick.labelcolor")
    colours: Any = dict.fromkeys(of_text, TEXT) | {"axes.edgecolor": AXIS}
    with mpl.rc_context(colours):
        figure, [axis] = figures.panels(1, columns=1, size=(4.4, 2.8))
    return figure, axis


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
