"""The page's tables: metrics with intervals, the atlas, cost, and what differs between runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mim_refiner.files import dotted
from mim_refiner.report import tables
from mim_refiner.report.figures import step_of
from mim_refiner.report.run_files import RunFiles
from mim_refiner.reporting import metric_title

KINDS = {  # what a folder is: title of its page
    "refinement": "Refinement report",
    "pretraining": "Pre-training report",
    "comparison": "Comparison of encoders",
    "analysis": "Analysis report",
    "evaluation": "Evaluation report",
}
HEADLINES = {  # of each verdict, and its tone
    "better": ("The refined encoder is better.", "good"),
    "no clear change": ("No clear change.", "open"),
    "no collapse seen": ("No collapse seen.", "open"),
    "worse": ("The refined encoder is worse.", "bad"),
    "not measured": ("Not measured.", "open"),
}


def kind_of(run: RunFiles) -> str:
    """What the folder holds, a key of KINDS."""
    if run.metrics or run.recipe or run.summary:
        return "pretraining" if run.recipe.get("command") == "pretrain" else "refinement"
    if run.of_kind("comparison"):
        return "comparison"
    return "analysis" if run.records.keys() - {"data"} else "evaluation"


def verdict_of(run: RunFiles) -> Mapping[str, Any]:
    """The verdict of a refinement, a comparison or an analysis; empty where there is none."""
    for record in (run.summary, *run.of_kind("comparison").values()):
        if isinstance(record.get("verdict"), Mapping):
            return dict(record["verdict"])
    return next(iter(run.of_kind("verdict").values()), {})


def _without_verdict(run: RunFiles) -> tuple[str, str]:
    """(headline, reason) of a folder that compares nothing."""
    kind = kind_of(run)
    if run.metrics and not run.summary:
        last = run.metrics[-1]
        return "This run is not finished.", (
            f"it stands at step {last.get('total_step', last.get('step'))} ({last.get('phase', 'training')}); "
            "run the same command again, without --overwrite, to finish it"
        )
    if kind == "pretraining":
        return (
            "The encoder is pre-trained.",
            f"refine it next: mim-refiner refine --model {run.path} --data IMAGES --out RUN",
        )
    if kind == "analysis":
        advice = ["analyze --compare sets a second one beside it", *(table["advice"] for table in atlas_tables(run))]
        return "One encoder, looked at.", [text for text in advice if text][-1]
    if kind == "evaluation":
        return "One encoder, measured.", "evaluate --compare sets a second one beside it and gives a verdict"
    return "No verdict.", "no before and after here; refine measures both, evaluate --compare does for two encoders"


def verdict_view(run: RunFiles) -> dict[str, Any]:
    """{"headline", "tone" (good, bad, open), "reason", "further": [lines], "next": [what to try]}."""
    verdict = verdict_of(run)
    if not verdict.get("verdict"):
        headline, reason = _without_verdict(run)
        return {"headline": headline, "tone": "open", "reason": reason, "further": [], "next": []}
    word, sentence = str(verdict.get("verdict", "")), tables.demo_sentence(run.summary)
    headline, tone = HEADLINES.get(word, (word[:1].upper() + word[1:] + ".", "open"))
    further = tables.further_verdicts(verdict)
    further += [f"forecast before it: {run.summary['forecast']['reason']}"] if "forecast" in run.summary else []
    further += [f"patch features: {verdict['dense']}"] if "dense" in verdict else []
    further += [str(verdict["clusters"])] if "clusters" in verdict else []
    return {
        "headline": headline if kind_of(run) == "refinement" else headline.replace("refined", "second"),
        "tone": tone,
        "reason": sentence or str(verdict.get("reason", "")),
        "further": [] if sentence else further,
        "next": [str(line) for line in verdict.get("next", [])],
    }


def compared_rows(run: RunFiles) -> tuple[list[str], list[list[str]]] | None:
    """(header, rows) of what evaluate --compare measured: a row a number, a column an encoder."""
    for record in run.of_kind("comparison").values():
        return tables.results_rows(record["results"], record.get("change", ()))
    return None


def metric_rows(run: RunFiles) -> dict[str, Any]:
    """{"stages": [(key, title)], "rows": [{"title", "cells": [{"value", "interval", "change", "change_interval"}]}]}.

    Values are those of summary.json; intervals come from evaluation/<stage>-<metric>-block..-<pooling>.json.
    """
    stages = tables.stage_titles(run.summary)
    rows = []
    for metric in tables.METRICS:
        values = {stage: run.summary[stage].get(metric) for stage in stages}
        cells: list[dict[str, Any]] = []
        for stage, value in values.items():
            first = values[next(iter(stages))]
            known = bool(cells) and None not in (value, first)
            ci95 = None if value is None else _ci95(run, stage, metric, value)
            paired = tables.paired_change(run.summary, stage) if known and metric == "knn_top1" else None
            cells.append(
                {
                    "value": None if value is None else tables.shown(metric, value),
                    "interval": tables.interval_text(ci95, metric, "") if ci95 else None,
                    "change": tables.shown(metric, value - first, "+") if known else None,
                    "change_interval": tables.interval_text(paired["ci95"]) if paired else None,
                }
            )
        if {*values.values()} - {None}:
            rows.append({"title": metric_title(metric, unit=True), "cells": cells})
    return {"stages": list(stages.items()), "rows": rows}


def _ci95(run: RunFiles, stage: str, metric: str, value: float) -> Sequence[float] | None:
    """The interval of the very number in the summary."""
    ours = [each for stem, each in run.results.items() if stem.startswith(f"{stage}-") and each["metric"] == metric]
    known = (each["ci95"] for each in ours if each.get("ci95") and abs((each["value"] or 0.0) - value) < 1e-12)
    return next(known, None)


def atlas_tables(run: RunFiles) -> Iterator[dict[str, Any]]:
    """Heat tables of every atlas record: a row a block, a column a pooling and norm, shaded from worst to best."""
    for where, record in run.of_kind("atlas").items():
        cells, measure = record.get("cells") or [], str(record.get("measure", ""))
        value = {(cell["block"], cell["pooling"], bool(cell["norm"])): cell.get(measure) for cell in cells}
        if not (known := [number for number in value.values() if number is not None]):
            continue
        low, high = min(known), max(known)
        heat = {key: round(100 * ((low if number is None else number) - low) / max(high - low, 1e-12))
                for key, number in value.items()}  # fmt: skip
        columns = list(dict.fromkeys(key[1:] for key in value))
        advice: Mapping[str, Any] = record.get("recommendation") or {}
        chosen = (advice.get("block"), advice.get("pooling"), advice.get("norm"))
        yield {
            "title": tables.STAGES.get(where.removeprefix("atlas-"), where),
            "measure": metric_title(measure, unit=True),
            "low": f"{100 * low:.1f}",
            "high": f"{100 * high:.1f}",
            "columns": [f"{pooling}, {'final norm' if norm else 'raw'}" for pooling, norm in columns],
            "rows": {
                block: [(tables.shown(measure, value.get(key)), heat.get(key, 0), key == chosen)
                        for key in ((block, *column) for column in columns)]
                for block in sorted({key[0] for key in value})
            },
            "advice": str(advice.get("reason", "")),
        }  # fmt: skip


def cost_rows(run: RunFiles) -> dict[str, str]:
    """Seconds and speed, in words."""
    rows: dict[str, str] = {}
    for name, seconds in (run.summary.get("seconds") or {}).items():
        rows |= {f"{name} time": duration(seconds)} if isinstance(seconds, int | float) else {}
    speeds = [record["images_per_s"] for record in run.metrics if isinstance(record.get("images_per_s"), int | float)]
    if speeds:
        rows["speed (median)"] = f"{sorted(speeds)[len(speeds) // 2]:.0f} images/s"
    if run.metrics:
        steps = step_of(run.metrics[-1])
        rows["training steps"] = str(steps)
        batch = run.recipe.get("batch_size")
        if isinstance(batch, int):
            rows["images seen"] = f"{batch * steps:,}"
    if run.environment.get("device"):
        rows["device"] = str(run.environment["device"])
    return rows


def duration(seconds: float) -> str:
    """E.g. ``3 min 26 s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def run_row(run: RunFiles, name: str, colour: str) -> dict[str, Any]:
    """One line of the comparison of runs."""
    verdict = verdict_of(run)
    word = str(verdict.get("verdict", "no verdict"))
    seconds = (run.summary.get("seconds") or {}).get("total")
    return {
        "name": name,
        "colour": colour,
        "verdict": word,
        "tone": HEADLINES.get(word, ("", "open"))[1],
        "interval": tables.interval_text(verdict["ci95"]) if verdict.get("ci95") else None,
        "cells": [
            {
                "title": metric_title(metric, unit=True),
                "text": tables.stage_cell(run.summary, metric, "after", "before"),
            }
            for metric in tables.METRICS
        ],
        "time": "–" if seconds is None else duration(seconds),
    }


def recipe_differences(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """[{"key", "values": [one a run]}] of every recipe key in which the runs differ; of runs of several commands, of
    those that all have."""
    recipes = [dotted(run.recipe) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    if len({recipe.get("command") for recipe in recipes}) > 1:
        keys = dict.fromkeys(key for key in keys if all(key in recipe for recipe in recipes))
    rows = [{"key": key, "values": [recipe.get(key) for recipe in recipes]} for key in keys]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"])]
