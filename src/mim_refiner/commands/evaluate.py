"""``evaluate``: the protocols on one encoder, or on several side by side."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mim_refiner.analysis.verdict import verdict, word_of
from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.commands.inputs import open_images, open_pair, tell_trained_on, tell_unreadable
from mim_refiner.core.collectives import rank
from mim_refiner.core.device import pick_device
from mim_refiner.core.identity import weights_sha256
from mim_refiner.core.launch import join_processes, refuse_difference, together
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError, InputError
from mim_refiner.evaluation.cache import FeatureCache
from mim_refiner.evaluation.clustering import said_of_few
from mim_refiner.evaluation.results import Result, paired_change
from mim_refiner.evaluation.settings import EvaluationSettings
from mim_refiner.evaluation.suite import (
    NEEDS_LABELS,
    check_protocols,
    class_numbers,
    evaluate_backbone,
    suite_protocols,
    suite_settings,
    write_results,
)
from mim_refiner.files import dotted, name_of, read_regular, reading, write_bytes, write_json
from mim_refiner.models.backbone import Backbone
from mim_refiner.report.tables import latex_table, markdown_table, results_rows
from mim_refiner.reporting import Reporter, listener, metric_title
from mim_refiner.settings import as_list, setting_texts

TRANSFER_PROTOCOLS = ("knn", "linear")  # unless protocols are named


@together()
def evaluate(
    *,
    model: Any,
    data: Any,
    test: str | None = None,
    compare: Any = None,
    suite: str | None = None,
    protocols: str | Sequence[str] | None = None,
    blocks: str = "-1",
    pooling: str | Sequence[str] | None = None,
    norm: bool = False,
    shifted: str | Sequence[str] | None = None,
    transfer: str | None = None,
    out: str | None = None,
    cache: str | None = None,
    cache_size: str | None = None,
    settings: str | Sequence[str] | Mapping[str, Any] | None = None,
    device: str = "auto",
    seed: int = 0,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Measure frozen features of ``model`` (and of each of ``compare`` in the same way) on labelled images.

    ``suite`` quick, paper or dense names protocols and settings at once; ``protocols`` (default knn, linear,
    clustering) chooses its own. ``shifted``: "NAME=SRC" test sets for the protocol robustness (ImageNet-A, -R, Sketch;
    a folder kind/severity/class as ImageNet-C is expanded). ``transfer``: a CSV file name,train[,test] of further data
    sets. ``cache``: folder of the feature cache or "off"; ``cache_size`` such as "5GB".

    Returns {"results": [a record a number], "seconds": {model: {protocol: seconds}}, "feature_cache"}, with ``compare``
    also {"change": [paired differences to ``model``]}, with ``transfer`` {"transfer": [a record a set and metric]}.
    Processes that torchrun started compute a part of the features each, and rank 0 writes.
    With ``out`` every number is a JSON file in evaluation/ there, beside results.md and results.tex.
    Raises MimRefinerError with one line on bad input.
    """
    reporter = listener(reporter)
    protocols, pooling = (each and as_list(each) for each in (protocols, pooling))
    # first of all: what follows depends on the rank
    run = Run(join_processes(pick_device(device), reporter), seed=seed, reporter=reporter)
    how = EvaluationSettings.from_overrides(setting_texts(settings), suite_settings(suite))
    kept = FeatureCache.open(cache, cache_size)
    if protocols is not None:
        check_protocols(protocols)
    backbones = _loaded(model, compare)
    train, held_out = open_pair(data, test, run.reporter, channels=next(iter(backbones.values())).info.in_chans)
    chosen = tuple(protocols) if protocols else suite_protocols(suite, train) if suite else NEEDS_LABELS
    sets = _shifted_sets(as_list(shifted or ()), partial(open_images, reporter=run.reporter, channels=train.channels))
    further = _transfer_list(Path(transfer)) if transfer else []
    transferred = (tuple(protocols) if protocols else TRANSFER_PROTOCOLS) if further else ()
    if rest := how.unread({*chosen, *transferred}, test=held_out is not None and not further):
        reporter.warning(f"--set {', '.join(rest)}: nothing that is measured here reads it")
    opened = [images for images in (train, held_out, *sets.values()) if images is not None]
    place = {"blocks": blocks, "poolings": pooling, "norm": norm}
    refuse_difference(lambda: {
        **place, **dotted(how.model_dump()), "seed": seed, "protocols": chosen, "transfer": transfer,
        "models": [weights_sha256(backbone.model) for backbone in backbones.values()],
        "data": [images.source.fingerprint() for images in opened],
    })  # fmt: skip
    written, seconds = out if rank() == 0 else None, dict[str, dict[str, float]]()
    options: dict[str, Any] = {**place, "settings": how, "out": written, "run": run, "cache": kept}
    summary = _summary(_measured(backbones, chosen, train, held_out, seconds, shifted=sets, **options))
    if said := tell_trained_on(backbones, data if test is None else test, run.reporter):
        summary["measured_on"] = said
    summary["data"] = {name: images.facts() for name, images in (("train", train), ("test", held_out)) if images}
    for images in opened:
        tell_unreadable(images, run.reporter)
    rows = []
    for name, source, tests in further:
        pair = open_pair(source, tests, run.reporter, channels=train.channels)
        found = _measured(backbones, transferred, *pair, seconds, prefix=f"transfer-{name}-", **options)
        rows += [{"set": name, **_row(who, result)} for who, results in found.items() for result in results.values()]
    if further:
        summary["transfer"] = rows + _means(rows, len(further))
    run.reporter.done()
    summary["seconds"] = seconds
    if kept is not None:
        summary["feature_cache"] = kept.summary()
    if written:
        _write_tables(Path(written), summary)
        summary["out"] = str(Path(written) / "evaluation")
    return summary


def _loaded(model: Any, compare: Any) -> dict[str, Backbone]:
    """The encoders by the names of their sources."""
    others = list(compare) if isinstance(compare, list | tuple) else [] if compare is None else [compare]
    backbones: dict[str, Backbone] = {}
    for number, source in enumerate((model, *others)):
        name = name_of(source)
        if name in backbones and isinstance(source, str):
            raise InputError("--compare names a model twice (or --model again); give different ones")
        backbones[f"{name} {number}" if name in backbones else name] = load_backbone(source)
    return backbones


def _measured(
    backbones: Mapping[str, Backbone],
    protocols: Sequence[str],
    train: ImageSet,
    test: ImageSet | None,
    seconds: dict[str, dict[str, float]],
    *,
    prefix: str = "",
    out: str | None,
    run: Run,
    **options: Any,
) -> dict[str, dict[str, Result]]:
    """Of every model; the first has file names without a prefix, the others compare-, compare2-, ..."""
    results = {}
    for number, (name, backbone) in enumerate(backbones.items()):
        run.reporter.message(f"evaluating {name}: {', '.join(protocols)}")
        position = "" if number == 0 else "compare-" if number == 1 else f"compare{number}-"
        taken = seconds.setdefault(name + (f" ({prefix.rstrip('-')})" if prefix else ""), {})
        results[name] = evaluate_backbone(backbone, train, test, protocols=protocols, run=run, seconds=taken, **options)
        if out is not None:
            write_results(results[name].values(), out, position + prefix)
    if few := said_of_few(results[name].values()):
        run.reporter.message(few)
    return results


def _summary(found: Mapping[str, Mapping[str, Result]]) -> dict[str, Any]:
    """The numbers, of several models also the paired differences to the first and whether they leave zero out."""
    rows = [_row(source, result) for source, results in found.items() for result in results.values()]
    (_, first), *others = found.items()
    if not others:
        return {"results": rows}
    change, judged = [], {}
    for source, results in others:
        for name, before in first.items():
            if name in results and (interval := paired_change(before, results[name])):
                difference, low, high = interval
                place = {"model": source, "metric": before.metric, "block": before.block, "pooling": before.pooling}
                change.append(place | {"difference": difference, "ci95": [low, high], "verdict": word_of(low, high)})
        if said := _verdict(first, results):
            judged[source] = said
    summary: dict[str, Any] = {"results": rows, "change": change}
    if said := judged.pop(others[0][0], None):
        summary["verdict"] = said | ({"others": judged} if judged else {})
    return summary


def _verdict(before: Mapping[str, Result], after: Mapping[str, Result]) -> dict[str, Any] | None:
    """On the k-NN accuracy of the last block where it was measured, else on the first measure that says which test
    images were right, those chosen on the test images last; None without one.
    """

    def rank(item: tuple[str, Result]) -> tuple[bool, bool, int]:
        return item[1].metric != "knn_top1", item[1].metric.endswith("_best"), -item[1].block

    for name, result in sorted(before.items(), key=rank):
        correct, theirs = result.correct, after[name].correct if name in after else None
        if correct is not None and theirs is not None and len(correct) == len(theirs):
            where = f"{metric_title(result.metric)} of block {result.block} ({result.pooling})"
            return verdict(correct, theirs, measure=where)
    return None


def _row(model: str, result: Result) -> dict[str, Any]:
    keys = ("metric", "value", "ci95", "block", "pooling")
    return {"model": model} | {key: value for key, value in result.to_json().items() if key in keys}


def _shifted_sets(specs: Sequence[str], opened: Callable[[str], ImageSet]) -> dict[str, ImageSet]:
    """{"name": images} of "NAME=SRC"; a folder kind/severity/class/image gives one set a kind and severity."""
    sets: dict[str, ImageSet] = {}
    for spec in specs:
        name, _, source = spec.partition("=")
        if not name or not source:
            raise InputError(f"--shifted {spec!r}: write it as NAME=SRC, such as sketch=data/imagenet-sketch")
        severities = sorted(path for path in Path(source).expanduser().glob("*/[1-5]") if path.is_dir())
        places = {f"{name}/{path.parent.name}/{path.name}": str(path) for path in severities} or {name: source}
        sets |= {name: opened(place) for name, place in places.items()}
    for name, images in sets.items():
        if images.labels is None:
            raise DataError(
                f"--shifted {name}: {images.source.counted} has no labels ({images.source.no_labels}); "
                "give labelled ones"
            )
    return sets


def _means(rows: Sequence[Mapping[str, Any]], sets: int) -> list[dict[str, Any]]:
    """Of every number that all data sets have."""
    names, groups = ("model", "metric", "block", "pooling"), defaultdict[tuple[Any, ...], list[float]](list)
    for row in rows:
        if row["value"] is not None:
            groups[tuple(row[name] for name in names)].append(row["value"])
    return [
        {"set": "mean", **dict(zip(names, key, strict=True)), "value": sum(values) / sets, "ci95": None}
        for key, values in groups.items()
        if len(values) == sets
    ]


def _transfer_list(path: Path) -> list[tuple[str, str, str]]:
    """(name, train, test or "") of every line of a CSV file; paths are relative to the working directory.

    Every set is opened once, so that a wrong path or class is found before the first measurement.
    """
    with reading(path, "give a list of data sets, a CSV name,train[,test]"):
        lines = read_regular(path).decode("utf-8-sig").splitlines()
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines) if any(cell.strip() for cell in row)]
    rows = [row for row in rows if row[0].lower() != "name" and not row[0].startswith("#")]
    for number, row in enumerate(rows, 1):
        if not 2 <= len(row) <= 3 or not all(row[:2]) or not re.fullmatch(r"[\w.-]+", row[0]):
            raise DataError(f"{path}: data set {number} is {','.join(row)!r}; write name,train[,test], a plain name")
    if not rows:
        raise DataError(f"{path}: names no data set; write a line name,train[,test] for each")
    if len({row[0] for row in rows}) < len(rows):
        raise DataError(f"{path}: two data sets have the same name; rename one")
    for row in rows:
        opened = [open_source(spec) for spec in row[1:] if spec]
        class_numbers(opened[0], opened[-1])
    return [(row[0], row[1], row[2] if len(row) == 3 else "") for row in rows]


def _write_tables(out: Path, summary: Mapping[str, Any]) -> None:
    if "change" in summary:  # for the report
        facts = {key: summary[key] for key in ("results", "change", "verdict", "measured_on") if key in summary}
        write_json(out / "evaluation" / "comparison.json", {"kind": "comparison", **facts})
    for name, change in (("results", summary.get("change", ())), ("transfer", ())):
        if summary.get(name):
            table = results_rows(summary[name], change)
            write_bytes(out / f"{name}.md", markdown_table(*table).encode(errors="backslashreplace"))
            write_bytes(out / f"{name}.tex", latex_table(*table).encode(errors="backslashreplace"))
