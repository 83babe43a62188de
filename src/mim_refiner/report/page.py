"""``report.html``: one offline file that tells a run, or compares several, from their result JSON alone."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

from mim_refiner._version import __version__
from mim_refiner.errors import InputError
from mim_refiner.files import dotted, reading, write_bytes
from mim_refiner.report import numbers
from mim_refiner.report.gallery import Gallery
from mim_refiner.report.panels import block_curve_panels, comparison_panels, learning_panels, run_colour
from mim_refiner.report.run_files import RunFiles, read_run
from mim_refiner.report.tables import STAGES, left_out_lines, measures_rows, readout_rows, results_rows

# On a narrow screen a line must not break at the hyphen of k-NN.
TEXT = re.compile(r"(<(?:p|h2|h3|th|td|caption|li|summary|figcaption)\b[^>]*>)([^<]*k-NN[^<]*)")
TERM = re.compile(r"k-NN(?: accuracy(?: \(%\))?)?[.,:;]?")
COMMAND = re.compile(r"(<li>[^<]*?)((?:mim-refiner \w|--\w)[^<]*)(?=</li>)")
OPTION = re.compile(r"(?<!\S)(?:--[\w-]+|mim-refiner)")
JSON_URI = "data:application/json;base64,"
TEMPLATES = ("page.html.j2", "run.html.j2", "macros.html.j2", "style.css", "script.js")


def write_report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page of one or more run folders; returns its path.

    ``out`` is the HTML file (default: report.html in the run's folder, or in the current one for several runs). The
    page needs no network and shows everything without scripts. Raises InputError for a folder without results.
    """
    read = [read_run(run) for run in runs]
    target = Path(out) if out is not None else (read[0].path / "report.html" if len(read) == 1 else Path("report.html"))
    with reading(", ".join(str(run.path) for run in read), "mend or delete its result files, report again", InputError):
        page = render(read).encode("utf-8", "backslashreplace")  # a path may be no UTF-8
    return write_bytes(target, page)


def render(runs: Sequence[RunFiles]) -> str:
    """The page as text."""
    folder = files("mim_refiner.report") / "templates"
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in TEMPLATES}
    environment = Environment(
        loader=DictLoader(texts), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"text": text_of, "stage": lambda name: STAGES.get(name, name)}
    short = [run.name for run in runs]
    # folders may share a name
    named = [(str(run.path) if short.count(run.name) > 1 else run.name, run) for run in runs]
    title, comparison = f"{numbers.KINDS[numbers.kind_of(runs[0])]}: {short[0]}", None
    if len(runs) > 1:
        title = f"Comparison of {', '.join(name for name, _ in named)}"
        comparison = {
            "rows": [numbers.run_row(run, name, run_colour(n)) for n, (name, run) in enumerate(named)],
            "recipe": numbers.recipe_differences(runs),
            "panels": comparison_panels({name: run.metrics for name, run in named}),
        }
    page = environment.get_template("page.html.j2").render(
        title=title,
        runs=[run_view(run, name, n, compact=len(runs) > 1) for n, (name, run) in enumerate(named)],
        comparison=comparison,
        style=texts["style.css"],
        script=texts["script.js"],
        version=__version__,
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
    page = COMMAND.sub(lambda found: f"{found[1]}<code>{_unbroken(OPTION, found[2])}</code>", page)
    return TEXT.sub(lambda found: found[1] + _unbroken(TERM, found[2]), page)


def _unbroken(words: re.Pattern[str], text: str) -> str:
    return words.sub(r'<span class="one">\g<0></span>', text)


def run_view(run: RunFiles, name: str, number: int, *, compact: bool) -> dict[str, Any]:
    """What the templates show of one run; ``compact`` leaves the pictures out (several runs on one page)."""
    prefix = f"run{number}-"
    curves = run.of_kind("knn_by_block")
    galleries = [] if compact else [*run.of_kind("gallery").values()]
    facts = run.config.get("mim_refiner", {})
    results = [{"model": "encoder", **record} for record in run.results.values()]
    files = {"summary.json": run.summary, "recipe.json": run.recipe, "evaluation.json": run.results}
    view: dict[str, Any] = {
        "id": prefix.rstrip("-"),
        "name": name,
        "path": str(run.path),
        "kind": numbers.kind_of(run),
        "verdict": numbers.verdict_view(run),
        "measures": measures_rows(numbers.verdict_of(run)),
        "compared": numbers.compared_rows(run),
        "metrics": numbers.metric_rows(run),
        "statements": [text for record in curves.values() for text in record.get("statements", [])],
        "block_panels": [panel for record in curves.values() for panel in block_curve_panels(record, prefix)],
        "curves": [record["curves"] for record in curves.values()],
        "atlases": list(numbers.atlas_tables(run)),
        "log_panels": learning_panels(run.metrics, prefix, run.recipe) if run.metrics else [],
        "no_gallery": next((str(record["reason"]) for record in run.of_kind("no gallery").values()), None),
        "gallery": Gallery(galleries[0]) if galleries else None,
        "readouts": [(record["sentence"], readout_rows(record)) for record in run.of_kind("readout").values()],
        "attention": {} if compact else run.of_kind("attention"),
        "compact": compact,
        "recipe": dotted(run.recipe),
        "environment": dotted(run.environment),
        "licence": facts.get("licence"),
        "architecture": facts.get("architecture") or run.config.get("architecture"),
        "cost": numbers.cost_rows(run),
        "skipped": run.skipped,
        "damaged": run.damaged,
        "data": data_lines(run),
        "downloads": [{"name": name, "uri": JSON_URI + base64.b64encode(json.dumps(value, indent=1).encode()).decode()}
                      for name, value in files.items() if value],
        "results": results_rows(results, ()) if results and not run.summary else None,
    }  # fmt: skip
    return view | {"sections": sections(view)}


def sections(view: Mapping[str, Any]) -> list[str]:
    """Of a refinement all, with a word on what is missing; of other folders those that have something to show."""
    pictures = [] if view["compact"] else ["neighbours", "clusters", "patches", "map"]
    has = {"blocks": view["block_panels"], "atlas": view["atlases"], "learning": view["log_panels"]}
    has |= dict.fromkeys(pictures, view["gallery"])
    return ["verdict", "numbers", *(name for name in has if view["kind"] == "refinement" or has[name]), "run"]


def data_lines(run: RunFiles) -> list[str]:
    """Which images were trained on and measured on, in words."""
    lines = []
    if run.recipe.get("data"):
        known = run.recipe.get("data_fingerprint", "not recorded")
        lines.append(f"trained on {run.recipe['data']} (fingerprint {known})")
        lines += [f"training images: {line}" for line in left_out_lines((run.summary.get("data") or {}).get("train"))]
    for facts in [*(record.get("data") or {} for record in run.results.values()), *run.of_kind("data").values()]:
        for part, name in (("train", "bank"), ("test", "test images")):
            source = facts.get(part) or {}
            if source.get("source"):
                lines += [f"{name}: {line}" for line in (source["source"], *left_out_lines(source))]
            elif source.get("share_of_train"):
                lines.append(f"test images: {100 * source['share_of_train']:.0f} % of the bank, held out")
    return list(dict.fromkeys(lines))


def text_of(value: Any) -> str:
    """One table cell: short floats, lists in one line."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(text_of(item) for item in value)
    return str(value)
