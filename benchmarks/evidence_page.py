"""The page of evidence: the results of studies (<study>.json) and of single experiments (earlier.yaml) as tables."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mim_refiner.files import read_json, write_bytes
from mim_refiner.report.panels import finish, new_figure

COLOURS = {"supported": "#0072b2", "not supported": "#d55e00", "not decidable here": "#555555"}
METRICS = {"knn_top1": "k-NN", "linear_top1": "linear probe", "linear_top1_best": "linear probe, best on test",
           "low_shot": "logistic regression"}  # fmt: skip
POOLINGS = {"cls": "class token", "mean": "mean of patches"}
HEAD = """# Evidence: which parts of the method carry the gain?

Every row is a statement that could have come out the other way. *Supported*: the 95 % interval of the difference
lies above zero; *not supported*: below; *not decidable here*: it includes zero at this size. With one seed the interval
covers the test images only, not what another training seed would give; with several it covers both. All of it is
small: encoders of a few million parameters, images of 32 px, minutes to hours of a CPU. What the paper finds at
ImageNet size is in [The method](method.md). CIFAR-10's test set holds near-duplicates of training images
([Evaluation](evaluation.md)), for all arms alike. Negative results stay.

*Made by `benchmarks/evidence.py --page`; do not edit by hand.*
"""


def write_page(folder: Path, page: Path) -> None:
    """Write ``page`` from all results in ``folder``, and its figures beside it."""
    studies = [read_json(file) for file in sorted(folder.glob("*.json"))]
    earlier = folder / "earlier.yaml"
    rows = yaml.safe_load(earlier.read_text()) if earlier.exists() else []
    for study in studies:
        write_bytes(page.parent / "figures" / f"evidence-{study['study']}.svg", figure(study))
    write_bytes(page, "\n".join([HEAD, *map(section, studies), *([single(rows)] if rows else [])]).encode())


def section(study: Mapping[str, Any]) -> str:
    """One study: claims, figure, arms, command."""
    images, claims = study["images"], primary(study)
    lines = [
        f"## {study['title']}", "",
        f"{images['train']:,} training images ({study['draws']:,} draws in both phases), bank {images['bank']:,}, test "
        f"{images['test']:,}; verdicts by {named(study['metric'])}; start {study['start_sha256'][:12]}, torch "
        f"{study['torch']}, {study['date']}.", "",
        "| the paper | our question | difference in points [95 %] | seeds | verdict |", "|---|---|---:|---:|---|",
        *(f"| {each['paper']} | {each['claim']} | {interval(each)} | {each['seeds']} | {each['verdict']} |"
          for each in claims), "",
    ]  # fmt: skip
    if claims:
        lines += [f"![differences with intervals](figures/evidence-{study['study']}.svg)", ""]
    lines += [
        arms_table(study),
        "",
        "```bash",
        study["command"],
        "```",
        "",
        f"Settings: `{' '.join(study['settings'])}`.",
        "",
    ]
    if study["untried"]:
        lines += [f"Not run yet: {'; '.join(study['untried'])}.", ""]
    return "\n".join(lines)


def single(rows: Sequence[Mapping[str, Any]]) -> str:
    """Experiments that were no arm of a study, as LOG.md has them."""
    lines = [
        "## Single experiments",
        "",
        "Measured one by one, with the code of their day; LOG.md has the entries in full.",
        "",
        "| the paper | our question | result [95 %] | seeds | size | verdict |",
        "|---|---|---|---:|---|---|",
    ]
    keys = ("paper", "claim", "result", "seeds", "size", "verdict")
    lines += [f"| {' | '.join(str(row[key]) for key in keys)} |" for row in rows]
    lines += ["", "Commands, in the order of the rows:", ""]
    return "\n".join(
        [*lines, *(f"{number}. `{row['command']}` ({row['date']})" for number, row in enumerate(rows, 1)), ""]
    )


def markdown(summary: Mapping[str, Any]) -> str:
    """All arms and all claims by every measure: results.md of a study's folder."""
    lines = [f"# {summary['title']}", "", arms_table(summary), ""]
    lines += ["| claim | measure | difference [95 %] | seeds | verdict |", "|---|---|---:|---:|---|"]
    lines += [
        f"| {each['claim']} | {named(each['metric'])} | {interval(each)} | {each['seeds']} | {each['verdict']} |"
        for each in summary["claims"]
    ]
    return "\n".join(lines) + "\n"


def arms_table(summary: Mapping[str, Any]) -> str:
    """Mean and deviation over seeds of every arm."""
    metrics = list(
        dict.fromkeys(key for arm in summary["arms"].values() for key in arm if key not in ("says", "seeds"))
    )
    lines = [f"| arm | seeds | {' | '.join(map(named, metrics))} |", "|---|---:|" + "---:|" * len(metrics)]
    for arm in summary["arms"].values():
        lines.append(f"| {arm['says']} | {len(arm['seeds'])} | {' | '.join(cell(arm.get(key)) for key in metrics)} |")
    return "\n".join(lines)


def cell(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    return f"{found['mean']:.1f}" + ("" if found["sd"] is None else f" ± {found['sd']:.1f}")


def interval(claim: Mapping[str, Any]) -> str:
    low, high = claim["ci95"]
    return f"{claim['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"


def named(metric: str) -> str:
    name, _, pooling = metric.partition(" ")
    name, _, labels = name.partition("@")
    few = f" from {labels} of the labels" if labels else ""
    return f"{METRICS.get(name, name)}{few}, {POOLINGS.get(pooling, pooling)}"


def primary(study: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The claims by the measure that was named before anything was measured."""
    return [claim for claim in study["claims"] if claim["metric"] == claim.get("by", study["metric"])]


def figure(study: Mapping[str, Any]) -> bytes:
    """Differences with their intervals, one line a claim, as SVG."""
    drawn, axis = new_figure()
    claims = primary(study)[::-1]
    for place, claim in enumerate(claims):
        low, high = claim["ci95"]
        axis.plot([low, high], [place, place], color=COLOURS[claim["verdict"]], linewidth=2)
        axis.plot([claim["difference"]], [place], "o", color=COLOURS[claim["verdict"]])
    axis.axvline(0, color="#555555", linewidth=0.8)
    names = {arm: found["says"] for arm, found in study["arms"].items()}
    axis.set_yticks(range(len(claims)), [f"{names[c['better']]} over {names[c['than']]}" for c in claims], fontsize=7)
    axis.set_ylim(-0.6, max(1, len(claims)) - 0.4)
    axis.set_xlabel(f"gain in points of {named(study['metric'])}")
    panel = finish(drawn, f"evidence-{study['study']}", study["title"], "Differences of arms with 95 % intervals.")
    return base64.b64decode(panel.svg.partition(",")[2])
