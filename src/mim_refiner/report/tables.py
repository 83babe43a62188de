"""Tables of measured numbers: before and after for the terminal, several models as Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from mim_refiner.reporting import UNSCALED, in_points, metric_title, number_of, signed

STAGES = {
    "before": "before",
    "after": "after this run",
    "raw": "its raw weights",
    "average": "its averaged weights",
    "full": "after the full recipe",
}
DEMO_STAGES = {"before": "start", "after": "live run", "full": "full refinement"}
LATEX = str.maketrans({"\\": "\\textbackslash ", **{letter: f"\\{letter}" for letter in "_%&#$"}})
METRICS = ("knn_top1", "linear_top1", "cluster_accuracy", "nmi", "rank", "rank_centred")  # of summary.json


def shown(metric: str, value: float | None, sign: str = "", fine: int = 1) -> str:
    """A value or, with ``sign`` "+", a difference of a metric: shares in percent; ``fine`` digits of others."""
    if value is None:
        return "–"
    scaled, digits = (value, fine) if metric in UNSCALED else (100 * value, 1)
    return signed(scaled, digits) if sign else f"{scaled:.{digits}f}"


def interval_text(ci95: Sequence[float], metric: str = "knn_top1", sign: str = "+", fine: int = 1) -> str:
    """A 95 % interval, of a difference ``+0.6 to +3.3``."""
    return " to ".join(shown(metric, bound, sign, fine) for bound in ci95)


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
    by = [in_points(part["knn_difference"], *part["ci95"]) for part in (live, full)]
    word = "no clear change: the interval holds zero" if live["verdict"] == "no clear change" else live["verdict"]
    on = f"On {live['test_images']:,} test images the" if "test_images" in live else "The"
    return f"{on} live run changed k-NN accuracy by {by[0]}: {word}. The shipped full refinement changed it by {by[1]}."


def comparison_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of text for the stages and metrics that ``summary`` (summary.json) holds.

    A cell after the first stage shows its difference to it.
    """
    titles = stage_titles(summary)
    found = {metric: [stage_cell(summary, metric, stage, next(iter(titles))) for stage in titles] for metric in METRICS}
    rows = [[metric_title(metric, unit=True), *cells] for metric, cells in found.items() if {*cells} != {"–"}]
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
        cells = [stage_cell(summary, metric, stage, "before") for metric in DEMO_METRICS]
        if paired := paired_change(summary, stage):
            cells[0] = f"{cells[0][:-1]}; {interval_text(paired['ci95'])})"
        rows.append([title, *cells])
    return ["encoder", *DEMO_METRICS.values()], rows


def stage_cell(summary: Mapping[str, Any], metric: str, stage: str, first: str) -> str:
    """The value of a stage, in brackets its difference to the ``first`` one."""
    value, start = ((summary.get(name) or {}).get(metric) for name in (stage, first))
    if value is None or start is None or stage == first:
        return shown(metric, value)
    return f"{shown(metric, value)} ({shown(metric, value - start, '+')})"


def results_rows(
    results: Sequence[Mapping[str, Any]], change: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of text: a row a number, a column a model, in the order in which they occur.

    ``results`` and ``change`` are lists of records as ``evaluate`` returns them. A cell holds the value and its 95 %
    interval, a later model's also the paired difference to the first (with * where its interval leaves zero out).
    """
    models = list(dict.fromkeys(str(record["model"]) for record in results))
    values = {(record["model"], _row_key(record)): record for record in results}
    changes = {(record["model"], _row_key(record)): record for record in change}
    with_sets = any("set" in record for record in results)
    rows = []
    for key in dict.fromkeys(key for _, key in values):
        cells = [_cell(key[1], values.get((model, key)), changes.get((model, key))) for model in models]
        place = [*key[:1], metric_title(key[1], unit=True), *key[2:]]
        rows.append([*map(str, place if with_sets else place[1:]), *cells])
    header = ["metric", "block", "pooling", *_short_names(models)]
    return (["set", *header] if with_sets else header), rows


def further_verdicts(verdict: Mapping[str, Any]) -> list[str]:
    """Those on further encoders, a line each."""
    found = {STAGES[name]: value for name, value in verdict.items() if name in STAGES and isinstance(value, Mapping)}
    found |= verdict.get("others", {})
    return [f"{name}: {value['verdict']}. {value['reason']}" for name, value in found.items()]


def measures_rows(verdict: Mapping[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    """Return (header, rows) of text for the measures without labels that a verdict stands on or has beside it."""
    rows = []
    for row in verdict.get("measures") or (verdict.get("label_free") or {}).get("measures") or ():
        unscaled = "rank" in row["measure"] or "drift" in row["measure"]
        metric, title = ("rank", row["measure"]) if unscaled else ("consistency", f"{row['measure']} (%)")
        numbers = [shown(metric, row[key], fine=2) for key in ("before", "after")]
        change = f"{shown(metric, row['difference'], '+', 2)} ({interval_text(row['ci95'], metric, fine=2)})"
        rows.append([title, *numbers, change, row["change"]])
    return (["measure", "before", "after", "change (95 % interval)", "reading"], rows) if rows else None


def readout_rows(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of text: what each way to read an encoder gives, and its cost on every image."""
    rows = []
    for row in record["rows"]:
        cost, change = row["cost"], row["change"]
        extra = "" if not cost["extra"] else f" + {100 * cost['extra']:.1f} %"
        learned = f", {cost['parameters']:,} learned weights" if cost["parameters"] else ""
        rows.append(
            [
                row["name"],
                f"{shown('knn_top1', row['value'])} ({interval_text(row['ci95'], sign='')})",
                "–" if change is None else f"{shown('knn_top1', change[0], '+')} ({interval_text(change[1:])})",
                shown("knn_top1", row["knn_top1"]),
                f"{cost['blocks']} of {cost['depth']} blocks{extra}{learned}",
            ]
        )
    return ["read-out", "classifier (%)", "change", "k-NN accuracy (%)", "cost"], rows


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = ["---"] * name_columns(header) + ["---:"] * (len(header) - name_columns(header))
    return "\n".join([line(header), line(rule), *map(line, rows)]) + "\n"


def latex_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A tabular with the rules of the package booktabs."""
    columns = "l" * name_columns(header) + "r" * (len(header) - name_columns(header))
    body = [" & ".join(cell.translate(LATEX) for cell in row) + " \\\\" for row in (header, *rows)]
    lines = [f"\\begin{{tabular}}{{{columns}}}", "\\toprule", body[0], "\\midrule", *body[1:], "\\bottomrule"]
    return "\n".join([*lines, "\\end{tabular}"]) + "\n"


def name_columns(header: Sequence[str]) -> int:
    """How many columns are names, which stand to the left; the others are numbers, which stand to the right."""
    return header.index("pooling") + 1 if "pooling" in header else 1


def _row_key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record.get("set", ""), record["metric"], record["block"], record["pooling"]


def _cell(metric: str, record: Mapping[str, Any] | None, change: Mapping[str, Any] | None) -> str:
    if record is None or record.get("value") is None:
        return "–"
    text = shown(metric, record["value"], fine=2)
    if record.get("ci95"):
        text += f" [{', '.join(shown(metric, bound, fine=2) for bound in record['ci95'])}]"
    if change:
        low, high = change["ci95"]
        text += f" ({shown(metric, change['difference'], '+', 2)}{'*' if low > 0 or high < 0 else ''})"
    return text


def _short_names(models: Sequence[str]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    tried = (["/".join(PurePath(model).parts[-count:]) for model in models] for count in range(1, 6))
    return next((names for names in tried if len({*names}) == len(models)), list(models))


def left_out_lines(facts: Mapping[str, Any] | None) -> list[str]:
    """What of the data was not read or not used, in words; ``facts`` as ``ImageSet.facts`` gives them."""
    facts = facts or {}
    lost = facts.get("left_out", ())
    lines = [f"left out: {number_of(each['count'], each['what'])} (first: {each['first']})" for each in lost]
    if (unreadable := facts.get("unreadable") or {}).get("count"):
        some = "; ".join(f"{name}: {reason}" for name, reason in unreadable["first"])
        lines.append(f"left out: {number_of(unreadable['count'], 'images that cannot be read')} ({some})")
    if facts.get("no_labels"):
        lines.append(f"no labels: {facts['no_labels']}")
    if shared := facts.get("also_in_train"):
        lines.append(f"{shared['count']} of {shared['compared']} test images compared are among the training images")
    return lines
