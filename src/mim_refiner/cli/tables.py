"""Results as tables for people; ``--json`` is the form for programs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mim_refiner.report.tables import (
    comparison_rows,
    demo_rows,
    demo_sentence,
    further_verdicts,
    left_out_lines,
    measures_rows,
    name_columns,
    readout_rows,
    results_rows,
    stage_titles,
)
from mim_refiner.reporting import metric_title, number_of
from mim_refiner.types import CheckpointReport

SHARES = ("top1", "accuracy", "nmi", "ami", "coverage")  # printed in percent

TITLES = {"recommendation": "features to use", "weights": "weights exported", "dense": "patch features"}
# of analyze: arrays, which files and the report show, and what was said at the beginning
IN_FILES = ("curves", "regimes", "figures", "records", "samples")
LAST = ("verdict", "recommendation")
FILE_WIDTH = 400  # columns of tables in a file or pipe
EXAMPLES_SHOWN = 3  # names listed below each kind of finding
LISTED = 30  # tensors left out that are shown unless all are asked for


def write_parts(file: TextIO, parts: Iterable[str | Table]) -> None:
    """Tables as wide as the terminal, or as COLUMNS says, and lines: broken at spaces on a terminal, whole in a file or
    pipe whatever COLUMNS says, which Python with readline (a notebook, pytest's workers) hands to what it starts.
    """
    known = file.isatty() or os.environ.get("COLUMNS")
    console = Console(file=file, highlight=False, width=None if known else FILE_WIDTH)
    for part in parts:
        plain = isinstance(part, str)
        console.print(escape(part) if isinstance(part, str) else part, soft_wrap=plain and not console.is_terminal)


def print_result(result: Any, file: TextIO) -> None:
    """Print a verb's result: measured stages as one table, lists of records as tables, the rest as ``key: value``; the
    verdict and the features to use come last.
    """
    if not isinstance(result, Mapping):
        return write_parts(file, [str(result)])
    stages = stage_titles(result)
    parts: list[str | Table] = [text_table("", *comparison_rows(result))] if stages else []
    left = {*stages, *(IN_FILES if "records" in result else ())}
    for key in sorted(result, key=lambda key: LAST.index(key) if key in LAST else -1):
        parts += printed(key, result[key], result) if key not in left else []
    write_parts(file, parts)


def printed(key: str, value: Any, result: Mapping[str, Any]) -> list[str | Table]:
    """Lines and tables of one entry of ``result``."""
    match key, value:
        case "verdict", Mapping():
            measures = measures_rows(value)
            tables = [text_table("measures that need no labels", *measures)] if measures else []
            return [*tables, *verdict_lines(value)]
        case "data", Mapping():
            return [f"{part} images: {line}" for part, facts in value.items() for line in left_out_lines(facts)]
        case "plan", {"phases": _}:
            return [plan_table(value)]
        case _, {"reason": reason}:  # it says all in words
            return [f"{TITLES.get(key, key.replace('_', ' '))}: {reason}"]
        case "measured_on", str():
            return [value]
        case "readout", _:
            return [text_table("refine or read out", *readout_rows(value))]
        case "results" | "transfer", [{"model": _}, *_]:
            return [text_table(key, *results_rows(value, result.get("change", ()) if key == "results" else ()))]
        case "change", [{"difference": _}, *_]:
            return ["in brackets: difference to the first model; * marks a 95 % interval that leaves zero out"]
        case "change", _:  # of curves, in files
            return []
        case _, [{}, *_]:
            columns = dict.fromkeys(name for record in value for name, item in record.items()
                                    if not isinstance(item, Mapping) and item != "")  # fmt: skip
            rows = [[format_value(name, record.get(name)) for name in columns] for record in value]
            return [text_table(key, list(columns), rows, names=len(columns))]
    return list(lines_of(key, value))


def print_first_screen(result: Any, file: TextIO) -> None:
    """The demo's result: one sentence, one table; everything else is in the report."""
    write_parts(file, [demo_sentence(result) or "", text_table("", *demo_rows(result))])


def lines_of(key: str, value: Any) -> list[str]:
    """Write a value as ``key: value`` lines: a nested mapping goes on one line each, a list of sentences one below the
    other; empty values are left out."""
    own, comma, name = key.partition(", ")
    title = f"{own.replace('_', ' ')}{comma}{name}"  # of a model or recipe, which stays as it is
    if value is None or value in ("", [], {}):
        return []
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return [f"{title}:", *(f"  {item}" for item in value)]
    if not isinstance(value, Mapping):
        return [f"{title}: {format_value(key, value)}"]
    plain, inner = list[str](), list[str]()
    for name, item in value.items():
        if isinstance(item, Mapping | list):
            inner += lines_of(f"{key}, {name}", item)
        else:
            plain.append(f"{metric_title(name)} {format_value(name, item)}")
    return ([f"{title}: {', '.join(plain)}"] if plain else []) + inner


def verdict_lines(verdict: Mapping[str, Any]) -> list[str]:
    """The statements about block curves, the verdict, that of further encoders, and what to try next, a line each."""
    lines = [str(statement) for statement in verdict.get("statements", [])]
    lines += [str(verdict["clusters"])] if "clusters" in verdict else []
    if isinstance(value := verdict.get("label_free"), Mapping):
        lines.append(f"without labels: {value['verdict']}. {value['reason']}")
    lines += [*further_verdicts(verdict), f"verdict: {verdict['verdict']}. {verdict['reason']}"]
    return lines + [f"what to try: {advice}" for advice in verdict.get("next", [])]


def text_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], names: int | None = None) -> Table:
    """Names to the left, numbers to the right; cells break at spaces where the terminal is narrow."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, show_header=bool(header))
    for position, column in enumerate(header):
        left = position < (name_columns(header) if names is None else names)
        table.add_column(escape(column), justify="left" if left else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def catalogue_parts(entries: Sequence[Mapping[str, Any]]) -> list[str | Table]:
    """What the choice of a model needs, one a line; NAME shows the rest."""
    rows = []
    for entry in entries:
        licence = str(entry["licence"]).partition(" (")[0].replace("unknown", "not stated")
        rows.append([*(str(entry[key]) for key in ("name", "architecture", "image_size", "data")), licence])
    table = text_table("", ("name", "architecture", "px", "images", "licence"), rows, names=5)
    table.columns[0].no_wrap, table.columns[0].min_width = True, max(len(row[0]) for row in rows)
    return [table, f"{len(entries)} models; mim-refiner models NAME shows source, size and hash of one"]


def plan_table(plan: Mapping[str, Any]) -> Table:
    """What a run will cost, a line each: images, phases, memory by part, what was chosen and what to change."""
    rows = [("images", f"{plan['images']}, {plan['batch']} a step")]
    for name, phase in plan["phases"].items():
        epochs, steps = number_of(phase["epochs"], "epochs"), number_of(phase["steps"], "steps")
        rows.append((name, f"{epochs}, {steps} of {phase['seconds']:.3g} s: {phase['time']}"))
    rows += [("in all", f"{plan['time']}, and what measuring the encoder takes"), *plan["memory"].items()]
    for name in ("settings", "views are cut", "sent a step and process", "forecast", "verdict", "to change"):
        if plan.get(name.replace(" ", "_")):
            rows.append((name, str(plan[name.replace(" ", "_")])))
    return text_table("", (), rows)


def format_value(name: str, value: Any) -> str:
    """Format one value: shares in percent, other floats with four digits, lists in one line."""
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return " ".join(format_value(name, item) for item in value)
    if isinstance(value, float) and 0 <= value <= 1 and any(word in name for word in SHARES):
        return f"{100 * value:.2f} %"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def print_findings(result: Mapping[str, Any], file: TextIO) -> None:
    """Print what was found, worst first, then classes, pixels and the model."""
    nothing = "nothing found: every image can be read, none is odd, none occurs twice"
    parts: list[Any] = [f"{result['data']}: {result['images_per_s']} images/s"]
    parts += [_table_of_kinds(result) if result["findings"] else nothing, *left_out_lines(result)]
    for title in ("pixels", "augmentations", "classes", "model"):
        if result.get(title):
            parts += [f"{title}:", *(line for fact in result[title].items() for line in _lines_of_fact(*fact))]
    parts.append(f"disk free: {result['disk_free_gb']} GB")
    if count := result["to_exclude"]:
        path = result.get("exclude_list") or "LIST, which --out DIR writes"
        parts.append(f"better left out: {number_of(count, 'images')} (refine --exclude {path})")
    write_parts(file, parts)


def _table_of_kinds(result: Mapping[str, Any]) -> Table:
    from mim_refiner.data.doctor import KINDS  # which needs torch

    rows = []
    for kind, count in result["counts"].items():
        listed, meaning = KINDS[kind]
        rows.append([kind, str(count), "yes" if listed else "no", meaning])
        told = [f"  {each['name']} {each['detail']}".rstrip() for each in result["findings"] if each["kind"] == kind]
        more = [f"  and {count - EXAMPLES_SHOWN} more"] if count > EXAMPLES_SHOWN else []
        rows += [["", "", "", line] for line in told[:EXAMPLES_SHOWN] + more]
    return text_table("", ("found", "images", "in the list", "what it means"), rows, names=4)


def _lines_of_fact(key: str, value: Any) -> list[str]:
    if key == "notes":
        return [f"  note: {note}" for note in value]
    if key == "coverage":
        value = f"{100 * value:.1f} % of the encoder's tensors"
    return [f"  {key.replace('_', ' ')}: {' '.join(map(str, value)) if isinstance(value, list) else value}"]


def print_report(report: CheckpointReport, file: TextIO, *, every_tensor: bool) -> None:
    """Print the encoder's facts, then the tensors that need attention (or all of them)."""
    listed = [tensor for tensor in report.tensors if every_tensor or tensor.status == "dropped"]
    shown = listed if every_tensor else listed[:LISTED]
    rows = [[each.name, "x".join(map(str, each.shape)), each.status, each.target or "-", each.reason] for each in shown]
    tensors = text_table("", ("tensor", "shape", "status", "goes to", "reason"), rows, names=5)
    more = f"... and {len(listed) - len(shown)} more left out; --tensors lists all"
    parts: list[Any] = [text_table("", (), [*map(list, _facts(report).items())]), *(["", tensors] if shown else [])]
    parts += [more] if len(listed) > len(shown) else []
    parts += [f"missing: {name}" for name in report.missing] + [f"note: {note}" for note in report.notes]
    write_parts(file, parts)


def _facts(report: CheckpointReport) -> dict[str, str]:
    heads = number_of(report.num_heads, "attention heads") if report.num_heads else "attention heads not told"
    channels = number_of(report.in_chans, "channels")
    size, patch = ("x".join(map(str, pair)) for pair in (report.image_size, report.patch_size))
    mean, std = (f"({' '.join(f'{value:g}' for value in values)})" for values in (report.mean, report.std))
    counts = Counter(tensor.status for tensor in report.tensors)
    class_token = "class token" if report.has_cls else "no class token"
    count = report.num_prefix_tokens - report.has_cls
    registers = f", {number_of(count, 'registers')}" if count else ""
    return {
        "file": report.source,
        "family": report.family,
        "architecture": report.architecture,
        "encoder": f"{report.encoder}: {number_of(report.depth, 'blocks')}, width {report.embed_dim}, {heads}",
        "image": f"{size} px, patches of {patch} px, {channels}",
        "tokens": f"{class_token}{registers}; pooling {report.pooling}",
        "mean, std": f"{mean}, {std}",
        "licence": report.licence,
        "coverage": f"{100 * report.coverage:.1f} % of the encoder's tensors",
        "tensors": ", ".join(f"{count} {status}" for status, count in counts.items()) or "none",
    }
