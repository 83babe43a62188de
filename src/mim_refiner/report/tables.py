"""One table of the metrics before and after (and after the full recipe)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

STAGES = {"before": "before", "after": "after this run", "full": "after the full recipe"}
# (title, factor to the shown unit, digits)
METRICS: dict[str, tuple[str, float, int]] = {
    "knn_top1": ("k-NN accuracy (%)", 100, 1),
    "linear_top1": ("linear probe accuracy (%)", 100, 1),
    "cluster_accuracy": ("cluster accuracy (%)", 100, 1),
    "nmi": ("cluster NMI (%)", 100, 1),
    "rank": ("effective rank", 1, 1),
}


def comparison_rows(
    summary: Mapping[str, Any], titles: Mapping[str, str] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of text for the stages and metrics that ``summary`` (summary.json) holds.

    A cell after the first stage shows its difference to it. ``titles`` renames stages, e.g. {"before": "MAE"}.
    """
    stages = [stage for stage in STAGES if isinstance(summary.get(stage), Mapping)]
    header = ["metric", *((titles or {}).get(stage, STAGES[stage]) for stage in stages)]
    rows = []
    for metric, (title, factor, digits) in METRICS.items():
        values = [summary[stage].get(metric) for stage in stages]
        if all(value is None for value in values):
            continue
        cells = []
        for position, value in enumerate(values):
            cell = "-" if value is None else f"{factor * value:.{digits}f}"
            if position and value is not None and values[0] is not None:
                cell += f" ({factor * (value - values[0]):+.{digits}f})"
            cells.append(cell)
        rows.append([title, *cells])
    return header, rows


def comparison_table(summary: Mapping[str, Any], titles: Mapping[str, str] | None = None) -> Table:
    """Return a rich table for the terminal."""
    header, rows = comparison_rows(summary, titles)
    table = Table(box=None, pad_edge=False)
    for position, name in enumerate(header):
        table.add_column(name, justify="right" if position else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
