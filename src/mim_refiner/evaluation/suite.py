"""The evaluation of one encoder: features once, then every protocol on them, one JSON file per number."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mim_refiner.core.device import resolve_precision
from mim_refiner.core.modules import device_of
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.labels import shown_names
from mim_refiner.data.masks import has_masks
from mim_refiner.data.name_lists import NameList, match_names
from mim_refiner.data.source_base import ImageSource
from mim_refiner.errors import DataError, InputError, did_you_mean
from mim_refiner.evaluation import protocols as runners
from mim_refiner.evaluation.cache import FeatureCache
from mim_refiner.evaluation.features import own_image_size, resolve_blocks, resolve_poolings
from mim_refiner.evaluation.finetune import row_of
from mim_refiner.evaluation.jobs import Job
from mim_refiner.evaluation.results import Result
from mim_refiner.evaluation.segmentation import check_segmentation
from mim_refiner.evaluation.settings import EvaluationSettings
from mim_refiner.evaluation.splits import list_name, stratified_split
from mim_refiner.files import write_json
from mim_refiner.models.backbone import Backbone
from mim_refiner.reporting import number_of

RUNNERS: dict[str, Callable[[Job], Iterable[Result]]] = {
    "knn": runners.knn,
    "linear": runners.linear,
    "attentive": runners.attentive,
    "clustering": runners.clustering,
    "rank": runners.rank,
    "low_shot": runners.low_shot,
    "finetune": runners.finetuning,
    "long_tail": runners.long_tail,
    "robustness": runners.robustness,
    "segmentation": runners.segmentation,
}
NEEDS_LABELS = ("knn", "linear", "clustering")  # what runs unless protocols are named
IMAGES_ALONE = {"attentive", "finetune", "segmentation"}  # and no pooled features
PROTOCOLS = tuple(RUNNERS)
SUITES: dict[str, tuple[str, ...]] = {
    "quick": ("knn", "linear", "low_shot", "clustering", "rank"),
    "paper": ("knn", "linear", "low_shot", "clustering", "finetune", "long_tail", "robustness"),
    "dense": ("segmentation",),
}


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
    run: Run | None = None,
    cache: FeatureCache | None = None,
    shifted: Mapping[str, ImageSet] | None = None,
    seconds: dict[str, float] | None = None,
) -> dict[str, Result]:
    """Run ``protocols`` for every block and pooling; return {result name: Result}, e.g. ``knn_top1-block11-cls``.

    ``test=None`` holds a stratified share of train out. ``knn_blocks`` (None: as ``blocks``) lets the cheap k-NN cover
    more blocks than the rest, from the same forward pass. Fine-tuning, long-tailed training and robustness look at the
    deepest of ``blocks`` and the first pooling. The k-NN bank, the probe's training set and the rank come from train,
    accuracies and clusters from test. ``shifted``: further labelled test sets for the protocol robustness.
    ``seconds`` is filled with the wall time of every protocol. Raises InputError for unknown names, DataError when
    labels (or masks, for segmentation) are missing.
    """
    settings = settings or EvaluationSettings()
    run = run or Run(device_of(backbone))
    run = dataclasses.replace(run, precision=resolve_precision(settings.precision, run.device))
    seconds = {} if seconds is None else seconds
    check_protocols(protocols)
    _check_data(protocols, train, test)
    if "segmentation" in protocols:
        check_segmentation(settings.segmentation, backbone)
    if "finetune" in protocols:
        row_of(settings.finetune.recipe, backbone.info.embed_dim)
    depth = backbone.info.depth
    job = Job(
        backbone=backbone,
        train_images=train,
        test_images=train if test is None else test,
        blocks=resolve_blocks(blocks, depth),
        knn_blocks=resolve_blocks(blocks if knn_blocks is None else knn_blocks, depth),
        poolings=resolve_poolings(poolings, backbone.info),
        norm=norm,
        image_size=settings.image_size or own_image_size(backbone.info),
        settings=settings,
        run=run,
        cache=cache,
        shifted={name: (images, class_numbers(train, images)) for name, images in (shifted or {}).items()},
        lists=published_lists(protocols, settings, train, test, run),
    )
    results: list[Result] = []
    started = time.perf_counter()
    if set(protocols) != {"segmentation"}:
        job = _with_features(job, set(protocols))
        seconds["features"] = time.perf_counter() - started
    for protocol in dict.fromkeys(protocols):
        started = time.perf_counter()
        run.reporter.phase(protocol, 0)
        results += RUNNERS[protocol](job)
        seconds[protocol] = time.perf_counter() - started
    return {result.name: result for result in results}


def write_results(results: Iterable[Result], folder: str | Path, prefix: str = "") -> None:
    """Each result as ``evaluation/<prefix><name>.json`` of the folder, beside it the whole record of its protocol."""
    for result in results:
        write_json(Path(folder) / "evaluation" / f"{prefix}{result.name}.json", result.to_json())
        if result.record is not None:
            write_json(Path(folder) / "evaluation" / f"{prefix}{result.protocol}.json", result.record)


def suite_protocols(suite: str, images: ImageSet) -> tuple[str, ...]:
    """The protocols of a suite that ``images`` allow; InputError for an unknown one, DataError when nothing can run."""
    if suite not in SUITES:
        raise InputError(f"suite {suite!r} is unknown{did_you_mean(suite, SUITES)}; choose from {', '.join(SUITES)}")
    chosen = SUITES[suite]
    masks = suite in ("dense", "paper") and has_masks(images.source)
    if suite == "paper" and masks:
        chosen = (*chosen, "segmentation")
    runnable = tuple(n for n in chosen if n == "rank" or (masks if n == "segmentation" else images.labels is not None))
    if not {*runnable} - {"rank"}:
        lacking = "masks" if suite == "dense" else f"labels ({images.source.no_labels})"
        raise DataError(f"{images.source.counted}: no {lacking}, and suite {suite} needs them; give data that has them")
    return runnable


def suite_settings(suite: str | None) -> EvaluationSettings:
    """The settings a suite starts from; those of no suite are the defaults."""
    return {"paper": EvaluationSettings.paper, "quick": EvaluationSettings.quick}.get(suite or "", EvaluationSettings)()


def summary_metrics(results: Mapping[str, Result], *, block: int, pooling: str) -> dict[str, Any]:
    """Return the ``summary.json`` entry of one encoder, for one block (counted from 0) and pooling.

    {"knn_top1", "linear_top1", "cluster_accuracy", "nmi", "rank", "rank_centred"} (None where not measured) and
    {"knn_by_block": {pooling: [accuracy of each measured block, in order]}}.
    """
    found = {each.metric: each.value for each in results.values() if (each.block, each.pooling) == (block, pooling)}
    by_block: dict[str, list[float]] = {}
    for result in sorted(results.values(), key=lambda result: result.block):
        if result.metric == "knn_top1":
            by_block.setdefault(result.pooling, []).append(result.value)
    metrics = ("knn_top1", "linear_top1", "cluster_accuracy", "nmi", "rank", "rank_centred")
    return {metric: found.get(metric) for metric in metrics} | {"knn_by_block": by_block}


def _with_features(job: Job, protocols: Set[str]) -> Job:
    """Add the features of the train and test images, of every block that some protocol looks at, from one forward pass.

    Without a test set they are two parts of the train images' features.
    """
    needed = {*(job.blocks if protocols - IMAGES_ALONE else ()), *(job.knn_blocks if "knn" in protocols else ())}
    last, settings = max(job.blocks), job.settings
    for protocol, count in (("knn", settings.knn_last), ("linear", settings.linear.last)):
        if protocol in protocols:
            needed |= {*range(max(0, last - count + 1), last)}
    train, test, blocks = job.train_images, job.test_images, tuple(sorted(needed))
    bank = job.features_of(train, None, blocks=blocks, phase="features of the train images")
    if test is not train:
        queries = job.features_of(test, None, blocks=blocks, phase="features of the test images")
        # two folders may hold different subsets of classes
        return dataclasses.replace(job, train=bank, test=queries.renumbered(class_numbers(train, test)))
    labels = np.zeros(len(bank), dtype=np.int64) if bank.labels is None else bank.labels.numpy()
    kept, held = stratified_split(labels, job.settings.test_share, job.run.seed)
    return dataclasses.replace(job, train=bank.select(kept), test=bank.select(held))


def class_numbers(train: ImageSet | ImageSource, test: ImageSet | ImageSource) -> torch.Tensor | None:
    """Number in train of every test class [classes], by name; None without labels. DataError for one it lacks."""
    if train.classes is None or test.classes is None:
        return None
    numbers, unknown = test.classes.numbers_in(train.classes)
    if unknown:
        verb = "class {} does" if len(unknown) == 1 else "classes {} do"
        raise DataError(
            f"{test.description}: {verb.format(shown_names(unknown))} not occur in {train.description} (it has "
            f"{shown_names(train.classes.names)}); use the same class names in both, or leave those images out"
        )
    return torch.from_numpy(numbers)


def published_lists(
    protocols: Sequence[str], settings: EvaluationSettings, train: ImageSet, test: ImageSet | None, run: Run
) -> dict[str, NameList]:
    """Published splits that ``protocols`` use, by file; InputError without test images, DataError for a misfit."""
    found: dict[str, NameList] = {}
    for protocol in protocols:
        files = {"low_shot": settings.low_shot.split_files, "finetune": settings.finetune.split_files}.get(protocol, ())
        names = [list_name(path, files) for path in files]
        twice = next((path for path, name in zip(files, names, strict=True) if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"{protocol}.split_files: two lists are called {twice}; name each once, in its own folder")
        if files and test is None:
            raise InputError(
                f"{protocol}.split_files: the lists name training images, of which a part is held out where there are "
                "no test images; give --test"
            )
        found |= {path: match_names(train.source, path) for path in files if path not in found}
    for each in found.values():
        run.reporter.message(str(each))
    return found


def check_protocols(protocols: Sequence[str]) -> None:
    """Raise InputError for an unknown protocol, or for none."""
    for name in protocols:
        if name not in PROTOCOLS:
            raise InputError(
                f"protocol {name!r} is unknown{did_you_mean(name, PROTOCOLS)}; choose from {', '.join(PROTOCOLS)}"
            )
    if not protocols:
        raise InputError(f"no protocol named; choose from {', '.join(PROTOCOLS)}")


NEEDS_RGB = ("finetune", "long_tail", "robustness", "segmentation")  # their image operations are made for photographs


def _check_data(protocols: Sequence[str], train: ImageSet, test: ImageSet | None) -> None:
    coloured = [name for name in protocols if name in NEEDS_RGB]
    if coloured and train.channels != 3:
        raise InputError(
            f"protocol {coloured[0]} takes RGB images, not {number_of(train.channels, 'channels')}; leave it out"
        )
    needy = [name for name in protocols if name not in ("rank", "segmentation")]
    if test is not None:
        class_numbers(train, test)  # refused now, not after all features
    for images in (train,) if test is None else (train, test):
        if needy and images.labels is None:
            raise DataError(
                f"{images.source.counted}: no labels, and protocol {needy[0]} needs them: {images.source.no_labels}"
            )
        if needy and images is train and len(train.class_names or ()) < 2:  # would always be right
            raise DataError(
                f"{train.description}: all images have the label {shown_names(train.class_names or ())}, and protocol "
                f"{needy[0]} needs two classes; give more"
            )
        if "segmentation" in protocols and not has_masks(images.source):
            raise DataError(
                f"{images.description}: no masks, and protocol segmentation needs them; "
                "give parquet with a column 'mask', or folders images/ and masks/"
            )
    if "segmentation" in protocols and test is None:
        raise DataError(f"{train.description}: segmentation holds no images out; give test images with masks")
