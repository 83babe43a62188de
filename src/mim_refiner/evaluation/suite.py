"""The evaluation of one encoder: features once, then every protocol on them, one JSON file per number."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mim_refiner.data.decode import ImageSet
from mim_refiner.errors import DataError, InputError, did_you_mean
from mim_refiner.evaluation.features import (
    Features,
    extract_features,
    resolve_blocks,
    resolve_poolings,
    square_image_size,
)
from mim_refiner.evaluation.protocols import NEEDS_LABELS, PROTOCOLS, RUNNERS, Context
from mim_refiner.evaluation.results import Result, result_name
from mim_refiner.evaluation.settings import EvaluationSettings
from mim_refiner.evaluation.splits import stratified_split
from mim_refiner.files import write_json
from mim_refiner.models.backbone import Backbone
from mim_refiner.reporting import NullReporter, Reporter


def evaluate_backbone(
    backbone: Backbone,
    train: ImageSet,
    test: ImageSet | None,
    *,
    protocols: Sequence[str] = NEEDS_LABELS,
    blocks: str | Sequence[int] = (-1,),
    poolings: Sequence[str] | None = None,
    knn_blocks: str | Sequence[int] | None = None,
    norm: bool = False,
    settings: EvaluationSettings | None = None,
    out_dir: str | Path | None = None,
    name_prefix: str = "",
    model_sha256: str | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> dict[str, Result]:
    """Run ``protocols`` for every block and pooling; return {result name: Result}, e.g. ``knn_top1-block11-cls``.

    ``test=None`` holds a stratified share of train out. ``knn_blocks`` (None: as ``blocks``) lets the cheap k-NN cover
    more blocks than the rest, from the same forward pass. With ``out_dir`` each result goes to
    ``evaluation/<name_prefix><name>.json`` there. The k-NN bank, the probe's training set and the rank come from train,
    accuracies and clusters from test. Raises InputError for unknown names, DataError when labels are missing.
    """
    settings = settings or EvaluationSettings()
    reporter = reporter or NullReporter()
    _check_protocols(protocols)
    _check_labels(protocols, train, test)
    wanted = resolve_blocks(blocks, backbone.info.depth)
    knn_wanted = resolve_blocks(blocks if knn_blocks is None else knn_blocks, backbone.info.depth)
    every = tuple(dict.fromkeys(wanted + knn_wanted)) if "knn" in protocols else wanted
    names = resolve_poolings(poolings, backbone.info)
    device = next(backbone.parameters()).device if device is None else torch.device(device)
    size = settings.image_size or square_image_size(backbone.info)
    context = Context(
        dataclasses.replace(settings, image_size=size),
        seed,
        device,
        _describe(train, test, settings, seed),
        model_sha256,
    )
    bank, queries = _features(backbone, train, test, every, names, norm, context, reporter)

    results: dict[str, Result] = {}
    for protocol in dict.fromkeys(protocols):
        reporter.phase(protocol, 0)
        chosen = knn_wanted if protocol == "knn" else wanted
        found = RUNNERS[protocol](_of_blocks(bank, chosen), _of_blocks(queries, chosen), context)
        results.update({result.name: result for result in found})
    if out_dir is not None:
        for name, result in results.items():
            write_json(Path(out_dir) / "evaluation" / f"{name_prefix}{name}.json", result.to_json())
    return results


def summary_metrics(results: Mapping[str, Result], *, block: int, pooling: str) -> dict[str, Any]:
    """Return the ``summary.json`` entry of one encoder, for one block (counted from 0) and pooling.

    {"knn_top1", "linear_top1", "cluster_accuracy", "nmi", "rank"} (None where not measured) and
    {"knn_by_block": {pooling: [accuracy of each measured block, in order]}}.
    """
    metrics: dict[str, Any] = {}
    for metric in ("knn_top1", "linear_top1", "cluster_accuracy", "nmi", "rank"):
        found = results.get(result_name(metric, block, pooling))
        metrics[metric] = None if found is None else found.value
    by_block: dict[str, list[float]] = {}
    for result in sorted(results.values(), key=lambda result: result.block):
        if result.metric == "knn_top1":
            by_block.setdefault(result.pooling, []).append(result.value)
    return {**metrics, "knn_by_block": by_block}


def _features(
    backbone: Backbone,
    train: ImageSet,
    test: ImageSet | None,
    blocks: tuple[int, ...],
    poolings: tuple[str, ...],
    norm: bool,
    context: Context,
    reporter: Reporter,
) -> tuple[Features, Features]:
    """Features of the train and test images; without a test set, two parts of the train images' features."""

    def extract(images: ImageSet, what: str) -> Features:
        reporter.phase(f"features of the {what} images", len(images))
        return extract_features(
            backbone,
            images,
            blocks=blocks,
            poolings=poolings,
            norm=norm,
            image_size=context.settings.image_size,
            batch_size=context.settings.batch_size,
            device=context.device,
            precision=context.settings.precision,
            progress=lambda done, _: reporter.update(done, {}),
        )

    bank = extract(train, "train")
    if test is not None:
        return bank, _with_labels_of(train, test, extract(test, "test"))
    labels = np.zeros(len(bank), dtype=np.int64) if bank.labels is None else bank.labels.numpy()
    kept, held = stratified_split(labels, context.settings.test_share, context.seed)
    return bank.select(kept), bank.select(held)


def _with_labels_of(train: ImageSet, test: ImageSet, features: Features) -> Features:
    """Number the test classes as the train classes, by name: two folders may hold different subsets of classes."""
    number = class_numbers(train, test)
    if features.labels is None or number is None:
        return features
    return dataclasses.replace(features, labels=number[features.labels])


def class_numbers(train: ImageSet, test: ImageSet) -> torch.Tensor | None:
    """Return the number in train of every test class [classes], None where both number them alike.

    Raises DataError for a test class that train lacks.
    """
    if not train.class_names or not test.class_names or tuple(train.class_names) == tuple(test.class_names):
        return None
    unknown = sorted(set(test.class_names) - set(train.class_names))
    if unknown:
        raise DataError(
            f"{test.description}: class {unknown[0]!r} does not occur in {train.description}; "
            "use the same class names in both"
        )
    return torch.tensor([train.class_names.index(name) for name in test.class_names])


def _of_blocks(features: Features, blocks: Sequence[int]) -> Features:
    return dataclasses.replace(
        features, values={key: value for key, value in features.values.items() if key[0] in blocks}
    )


def _describe(train: ImageSet, test: ImageSet | None, settings: EvaluationSettings, seed: int) -> dict[str, Any]:
    def one(images: ImageSet) -> dict[str, Any]:
        return {"source": images.description, "images": len(images), "fingerprint": images.source.fingerprint()}

    held_out = {"share_of_train": settings.test_share, "split_seed": seed, "stratified": train.labels is not None}
    return {"train": one(train), "test": one(test) if test is not None else held_out}


def _check_protocols(protocols: Sequence[str]) -> None:
    for name in protocols:
        if name not in PROTOCOLS:
            raise InputError(
                f"protocol {name!r} is unknown{did_you_mean(name, PROTOCOLS)}; choose from {', '.join(PROTOCOLS)}"
            )
    if not protocols:
        raise InputError(f"no protocol named; choose from {', '.join(PROTOCOLS)}")


def _check_labels(protocols: Sequence[str], train: ImageSet, test: ImageSet | None) -> None:
    needy = [name for name in protocols if name in NEEDS_LABELS]
    for images in (train, test):
        if needy and images is not None and images.labels is None:
            raise DataError(
                f"{images.description}: no labels, and protocol {needy[0]} needs them; "
                "give class folders, a label column or labels array"
            )
