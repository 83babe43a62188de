"""Tables of measured numbers: before and after for the terminal, several models as Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from rich.table import Table

STAGES = {
    "before": "before",
    "after": "after this run",
    "raw": "its raw weights",
    "average": "its averaged weights",
    "full": "after the full recipe",
}
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


UNSCALED = ("rank", "silhouette", "davies_bouldin")  # all other metrics are shares, shown in percent


def results_rows(
    results: Sequence[Mapping[str, Any]], change: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of text: a row a number, a column a model, in the order in which they occur.

    ``results`` and ``change`` are lists of records as ``evaluate`` returns them. A cell holds the value and its 95 %
    interval, a later model's also the paired difference to the first (with * where its interval leaves zero out).
    """
    models = list(dict.fromkeys(str(record["model"]) for record in results))
    keys = list(dict.fromkeys(_row_key(record) for record in results))
    values = {(record["model"], _row_key(record)): record for record in results}
    changes = {(record["model"], _row_key(record)): record for record in change}
    with_sets = any("set" in record for record in results)
    rows = []
    for key in keys:
        cells = [_cell(key[1], values.get((model, key)), changes.get((model, key))) for model in models]
        rows.append([*map(str, key if with_sets else key[1:]), *cells])
    header = ["metric", "block", "pooling", *_short_names(models)]
    return (["set", *header] if with_sets else header), rows


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table; numbers are right-aligned by their first occurrence in the header after the names."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    names = header.index("pooling") + 1
    rule = ["---"] * names + ["---:"] * (len(header) - names)
    return "\n".join([line(header), line(rule), *map(line, rows)]) + "\n"


def latex_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A tabular with the rules of the package booktabs."""
    names = header.index("pooling") + 1
    columns = "l" * names + "r" * (len(header) - names)
    body = [" & ".join(_latex(cell) for cell in row) + " \\\\" for row in (header, *rows)]
    lines = [f"\\begin{{tabular}}{{{columns}}}", "\\toprule", body[0], "\\midrule", *body[1:], "\\bottomrule"]
    return "\n".join([*lines, "\\end{tabular}"]) + "\n"


def _row_key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record.get("set", ""), record["metric"], record["block"], record["pooling"]


def _cell(metric: str, record: Mapping[str, Any] | None, change: Mapping[str, Any] | None) -> str:
    if record is None or record.get("value") is None:
        return "-"
    factor, digits = (1, 2) if metric in UNSCALED else (100, 1)
    text = f"{factor * record['value']:.{digits}f}"
    if record.get("ci95"):
        low, high = record["ci95"]
        text += f" [{factor * low:.{digits}f}, {factor * high:.{digits}f}]"
    if change:
        low, high = change["ci95"]
        text += f" ({factor * change['difference']:+.{digits}f}{'*' if low > 0 or high < 0 else ''})"
    return text


def _short_names(models: Sequence[str]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    for count in range(1, 6):
        names = ["/".join(PurePath(model).parts[-count:]) for model in models]
        if len(set(names)) == len(models):
            return names
    return list(models)


def _latex(text: str) -> str:
    for plain, escaped in (
        ("\\", "\\textbackslash "), ("_", "\\_"), ("%", "\\%"), ("&", "\\&"), ("#", "\\#"), ("$", "\\$"),
    ):  # fmt: skip
        text = text.replace(plain, escaped)
    return text


def left_out_lines(facts: Mapping[str, Any] | None) -> list[str]:
    """What of the data was not read or not used, in words; ``facts`` as ``ImageSet.facts`` gives them."""
    facts = facts or {}
    lines = [f"left out: {each['count']} {each['what']} (first: {each['first']})" for each in facts.get("left_out", ())]
    unreadable = facts.get("unreadable") or {}
    if unreadable.get("count"):
        some = "; ".join(f"{name}: {reason}" for name, reason in unreadable["first"])
        lines.append(f"{unreadable['count']} images cannot be read and are left out ({some})")
    if facts.get("no_labels"):
        lines.append(f"no labels: {facts['no_labels']}")
    shared = facts.get("also_in_train")
    if shared:
        lines.append(f"{shared['count']} of {shared['compared']} test images compared are among the training images")
    return lines
