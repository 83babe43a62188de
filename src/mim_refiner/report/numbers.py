"""The page's tables: metrics with intervals, the atlas, cost, and what differs between runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mim_refiner.files import dotted
from mim_refiner.report.run_files import RunFiles
from mim_refiner.report.tables import METRICS, STAGES, demo_sentence, interval_text, paired_change, stage_titles

HEADLINES = {  # of each verdict, and its tone
    "better": ("The refined encoder is better.", "good"),
    "no clear change": ("No clear change.", "open"),
    "no collapse seen": ("No collapse seen.", "open"),
    "worse": ("The refined encoder is worse.", "bad"),
    "not measured": ("Not measured.", "open"),
}


def verdict_view(run: RunFiles) -> dict[str, Any]:
    """{"headline", "tone" (good, bad, open), "reason", "further": [lines]}."""
    verdict = run.summary.get("verdict")
    if not isinstance(verdict, Mapping):
        if run.metrics and not run.summary:
            last = run.metrics[-1]
            reason = (
                f"it stands at step {last.get('total_step', last.get('step'))} ({last.get('phase', 'training')}); "
                "run the same command again to finish it"
            )
            return {"headline": "This run is not finished.", "tone": "open", "reason": reason, "further": []}
        reason = "no before and after here; refine measures both, evaluate --compare does so for two encoders"
        return {"headline": "No verdict.", "tone": "open", "reason": reason, "further": []}
    word, sentence = str(verdict.get("verdict", "")), demo_sentence(run.summary)
    headline, tone = HEADLINES.get(word, (word[:1].upper() + word[1:] + ".", "open"))
    further = [
        f"{STAGES[stage]}: {value['verdict']}. {value['reason']}"
        for stage, value in verdict.items()
        if stage in STAGES and isinstance(value, Mapping)
    ]
    further += [str(verdict["dense"])] if "dense" in verdict else []
    return {
        "headline": headline,
        "tone": tone,
        "reason": sentence or str(verdict.get("reason", "")),
        "further": [] if sentence else further,
    }


def metric_rows(run: RunFiles) -> dict[str, Any]:
    """{"stages": [(key, title)], "rows": [{"title", "cells": [{"value", "interval", "change", "change_interval"}]}]}.

    Values are those of summary.json; intervals come from evaluation/<stage>-<metric>-block..-<pooling>.json.
    """
    stages = stage_titles(run.summary)
    rows = []
    for metric, (title, factor, digits) in METRICS.items():
        values = [run.summary[stage].get(metric) for stage in stages]
        if all(value is None for value in values):
            continue
        cells: list[dict[str, Any]] = []
        for stage, value in zip(stages, values, strict=True):
            cell: dict[str, Any] = {"value": None, "interval": None, "change": None, "change_interval": None}
            if value is not None:
                cell["value"] = f"{factor * value:.{digits}f}"
                cell["interval"] = _interval(_ci95(run, stage, metric, value), factor, digits)
            if cells and value is not None and values[0] is not None:
                cell["change"] = f"{factor * (value - values[0]):+.{digits}f}"
                paired = paired_change(run.summary, stage) if metric == "knn_top1" else None
                cell["change_interval"] = interval_text(paired["ci95"]) if paired else None
            cells.append(cell)
        rows.append({"title": title, "cells": cells})
    return {"stages": list(stages.items()), "rows": rows}


def _ci95(run: RunFiles, stage: str, metric: str, value: float) -> Sequence[float] | None:
    """The interval of the very number in the summary."""
    for stem, record in run.results.items():
        same = stem.startswith(f"{stage}-") and record.get("metric") == metric
        if same and record.get("ci95") and abs((record["value"] or 0.0) - value) < 1e-12:
            interval: Sequence[float] = record["ci95"]
            return interval
    return None


def _interval(pair: Sequence[float] | None, factor: float, digits: int) -> str | None:
    return None if pair is None else " to ".join(f"{factor * bound:.{digits}f}" for bound in pair)


def atlas_tables(run: RunFiles) -> list[dict[str, Any]]:
    """Heat tables of every atlas record: a row a block, a column a pooling and norm, shaded from worst to best."""
    tables = []
    for where, record in run.of_kind("atlas").items():
        cells, measure = record.get("cells") or [], str(record.get("measure", ""))
        columns = list(dict.fromkeys((cell["pooling"], bool(cell["norm"])) for cell in cells))
        value = {(cell["block"], cell["pooling"], bool(cell["norm"])): cell.get(measure) for cell in cells}
        known = [number for number in value.values() if number is not None]
        if not known:
            continue
        low, high = min(known), max(known)
        advice: Mapping[str, Any] = record.get("recommendation") or {}
        chosen = (advice.get("block"), advice.get("pooling"), advice.get("norm"))
        rows = []
        for block in sorted({cell["block"] for cell in cells}):
            shown = [value.get((block, *column)) for column in columns]
            rows.append(
                {
                    "block": block,
                    "cells": [
                        {
                            "text": "–" if number is None else f"{100 * number:.1f}",
                            "heat": 0 if number is None else round(100 * (number - low) / max(high - low, 1e-12)),
                            "chosen": (block, *column) == chosen,
                        }
                        for number, column in zip(shown, columns, strict=True)
                    ],
                }
            )
        names = {"knn_top1": "k-NN accuracy (%)", "consistency": "neighbour consistency (%), no labels"}
        tables.append(
            {
                "title": STAGES.get(where.removeprefix("atlas-"), where),
                "measure": names.get(measure, measure),
                "columns": [f"{pooling}, {'final norm' if norm else 'raw'}" for pooling, norm in columns],
                "rows": rows,
                "advice": str(advice.get("reason", "")),
            }
        )
    return tables


def readout_tables(run: RunFiles) -> list[dict[str, Any]]:
    """ "Refine or read out?" of every readout record: {"sentence", "rows": [{"name", "cells"}]} of text."""
    tables = []
    for record in run.of_kind("readout").values():
        rows = []
        for row in record["rows"]:
            cost, change, knn = row["cost"], row["change"], row["knn_top1"]
            extra = "" if not cost["extra"] else f" + {100 * cost['extra']:.1f} %"
            learned = f", {cost['parameters']:,} learned weights" if cost["parameters"] else ""
            cells = [
                f"{100 * row['value']:.1f} ({_interval(row['ci95'], 100, 1)})",
                "–" if change is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * each for each in change)),
                "–" if knn is None else f"{100 * knn:.1f}",
                f"{cost['blocks']} of {cost['depth']} blocks{extra}{learned}",
            ]
            rows.append({"name": row["name"], "cells": cells})
        tables.append({"sentence": record["sentence"], "rows": rows})
    return tables


def cost_rows(run: RunFiles) -> dict[str, str]:
    """Seconds and speed, in words."""
    rows: dict[str, str] = {}
    for name, seconds in (run.summary.get("seconds") or {}).items():
        if isinstance(seconds, int | float):
            rows[f"{name} time"] = duration(seconds)
    speeds = [record["images_per_s"] for record in run.metrics if isinstance(record.get("images_per_s"), int | float)]
    if speeds:
        rows["speed (median)"] = f"{sorted(speeds)[len(speeds) // 2]:.0f} images/s"
    if run.metrics:
        last = run.metrics[-1]
        steps = int(last["total_step"] if "total_step" in last else last.get("step") or 0)
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


def run_row(run: RunFiles, name: str) -> dict[str, Any]:
    """One line of the comparison of runs."""
    verdict = run.summary.get("verdict") or {}
    cells = []
    for metric, (title, factor, digits) in METRICS.items():
        before, after = ((run.summary.get(stage) or {}).get(metric) for stage in ("before", "after"))
        text = "–" if after is None else f"{factor * after:.{digits}f}"
        if before is not None and after is not None:
            text += f" ({factor * (after - before):+.{digits}f})"
        cells.append({"title": title, "text": text})
    word = str(verdict.get("verdict", "no verdict"))
    seconds = (run.summary.get("seconds") or {}).get("total")
    return {
        "name": name,
        "verdict": word,
        "tone": HEADLINES.get(word, ("", "open"))[1],
        "interval": interval_text(verdict["ci95"]) if verdict.get("ci95") else None,
        "cells": cells,
        "time": "–" if seconds is None else duration(seconds),
    }


def recipe_differences(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """[{"key", "values": [one a run]}] of every recipe key in which the runs differ."""
    recipes = [dotted(run.recipe) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    rows = [{"key": key, "values": [recipe.get(key) for recipe in recipes]} for key in keys]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"])]
