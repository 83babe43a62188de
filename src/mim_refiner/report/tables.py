"""Tables of measured numbers: before and after for the terminal, several models as Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from rich.table import Table

from mim_refiner.reporting import UNSCALED, metric_title

STAGES = {
    "before": "before",
    "after": "after this run",
    "raw": "its raw weights",
    "average": "its averaged weights",
    "full": "after the full recipe",
}
DEMO_STAGES = {"before": "start", "after": "live run", "full": "full refinement"}
# (title, factor to the shown unit, digits)
METRICS: dict[str, tuple[str, float, int]] = {
    name: (metric_title(name, unit=True), 1 if name in UNSCALED else 100, 1)
    for name in ("knn_top1", "linear_top1", "cluster_accuracy", "nmi", "rank", "rank_centred")
}


def stage_titles(summary: Mapping[str, Any]) -> dict[str, str]:
    """{stage: title} of the encoders that ``summary`` (summary.json) holds; the demo's have titles of their own."""
    titles = STAGES | DEMO_STAGES if "full" in summary else STAGES
    return {stage: title for stage, title in titles.items() if isinstance(summary.get(stage), Mapping)}


def paired_change(summary: Mapping[str, Any], stage: str) -> Mapping[str, Any] | None:
    """The verdict on the k-NN accuracy of a stage against the first: {"knn_difference", "ci95", "verdict"}, if any."""
    verdict = summary.get("verdict") or {}
    part = verdict if stage == "after" else verdict.get(stage)
    return part if isinstance(part, Mapping) and part.get("ci95") else None


def demo_sentence(summary: Mapping[str, Any]) -> str | None:
    """What the demo found, in one sentence; None for the summary of another run."""
    live, full = paired_change(summary, "after"), paired_change(summary, "full")
    if live is None or full is None:
        return None
    by = [f"{100 * part['knn_difference']:+.1f} points (95 % interval {interval_text(part['ci95'])})"
          for part in (live, full)]  # fmt: skip
    word = "no clear change: the interval holds zero" if live["verdict"] == "no clear change" else live["verdict"]
    return f"The live run changed k-NN accuracy by {by[0]}: {word}. The shipped full refinement changed it by {by[1]}."


def interval_text(ci95: Sequence[float], factor: float = 100, digits: int = 1) -> str:
    """A 95 % interval of a difference: ``+0.6 to +3.3``."""
    return " to ".join(f"{factor * bound:+.{digits}f}" for bound in ci95)


def comparison_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of text for the stages and metrics that ``summary`` (summary.json) holds.

    A cell after the first stage shows its difference to it.
    """
    titles = stage_titles(summary)
    rows = []
    for metric, (title, _, _) in METRICS.items():
        cells = [_stage_cell(summary, metric, stage, next(iter(titles))) for stage in titles]
        if any(cell != "-" for cell in cells):
            rows.append([title, *cells])
    return ["metric", *titles.values()], rows


# Short, so that they fit 80 columns
DEMO_METRICS = {
    "knn_top1": "k-NN accuracy (%)",
    "linear_top1": "linear probe (%)",
    "cluster_accuracy": "clusters (%)",
}


def demo_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of the demo's first screen: a row an encoder, k-NN with its paired 95 % interval."""
    rows = []
    for stage, title in stage_titles(summary).items():
        cells = [_stage_cell(summary, metric, stage, "before") for metric in DEMO_METRICS]
        if paired := paired_change(summary, stage):
            cells[0] = f"{cells[0][:-1]}; {interval_text(paired['ci95'])})"
        rows.append([title, *cells])
    return ["encoder", *DEMO_METRICS.values()], rows


def _stage_cell(summary: Mapping[str, Any], metric: str, stage: str, first: str) -> str:
    _, factor, digits = METRICS[metric]
    value, start = summary[stage].get(metric), summary[first].get(metric)
    if value is None:
        return "-"
    change = f" ({factor * (value - start):+.{digits}f})" if stage != first and start is not None else ""
    return f"{factor * value:.{digits}f}{change}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a rich table for the terminal: names to the left, numbers to the right."""
    table = Table(box=None, pad_edge=False)
    for position, name in enumerate(header):
        table.add_column(name, justify="right" if position else "left")
    for row in rows:
        table.add_row(*row)
    return table


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
        place = [*key[:1], metric_title(key[1], unit=True), *key[2:]]
        rows.append([*map(str, place if with_sets else place[1:]), *cells])
    header = ["metric", "block", "pooling", *_short_names(models)]
    return (["set", *header] if with_sets else header), rows


def measures_rows(measures: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of text for the measures behind a verdict without labels."""
    rows = []
    for row in measures:
        unscaled = "rank" in row["measure"] or "drift" in row["measure"]
        factor, digits = (1, 2) if unscaled else (100, 1)
        numbers = [f"{factor * row[key]:.{digits}f}" for key in ("before", "after")]
        change = f"{factor * row['difference']:+.{digits}f} ({interval_text(row['ci95'], factor, digits)})"
        rows.append([row["measure"] + ("" if unscaled else " (%)"), *numbers, change, row["change"]])
    return ["measure", "before", "after", "change (95 % interval)", "reading"], rows


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
