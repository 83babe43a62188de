"""The protocols that go back to the images: attentive probes, fine-tuning, long tail, robustness, segmentation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mim_refiner.core.knn import knn_predict
from mim_refiner.core.metrics import class_iou, mean_iou_interval
from mim_refiner.data.source_base import evenly
from mim_refiner.data.thumbnails import encode, thumbnail_sheet
from mim_refiner.evaluation.attentive import AttentiveScore, Blocks, attentive_protocol, sources_of
from mim_refiner.evaluation.corruptions import corrupted
from mim_refiner.evaluation.features import Features, patch_grid
from mim_refiner.evaluation.finetune import FinetuneSettings, LabelledRows, finetune, published, share_of
from mim_refiner.evaluation.jobs import Job
from mim_refiner.evaluation.knn import AccuracyScore, knn_protocol, required_labels
from mim_refiner.evaluation.linear_probe import fitted_probe, linear_probe
from mim_refiner.evaluation.protocols import selections
from mim_refiner.evaluation.results import Result
from mim_refiner.evaluation.segmentation import check_segmentation, segmentation_blocks, segmentation_protocol
from mim_refiner.evaluation.splits import class_groups, imbalanced_subset, list_name
from mim_refiner.reporting import number_of

SHOWN_QUERIES = 3  # of a probe with several, beside their mean
Predict = Callable[[Tensor, Tensor | None], Tensor]  # (features [N, D], classes that may occur or None) -> classes [N]


def attentive(job: Job) -> list[Result]:
    """Probes that attend to the patch tokens of every block to report, and of a learned mixture of blocks."""
    settings = job.settings.attentive
    how: dict[str, Any] = {"image_size": job.image_size, "batch_size": job.settings.batch_size, "run": job.run}
    how["folder"] = job.cache.made_folder() if job.cache else None
    sources = sources_of(job.backbone, job.blocks, settings.mixture)
    scores = attentive_protocol(job.backbone, *job.labelled(), sources, settings, **how)
    results = []
    for (blocks, pooler), score in scores.items():
        facts = {"block_weights": score.weights, "queries": score.queries, "parameters": score.parameters}
        options = {**settings.model_dump(), "blocks": list(blocks), **facts}
        for suffix, accuracy, shown in selections(score.accuracy, options):
            name = f"attentive_top1{'_mixture' if len(blocks) > 1 else ''}{suffix}"
            results.append(job.accuracy("attentive", name, accuracy, shown, (blocks[-1], pooler)))
    results[0] = dataclasses.replace(results[0], record=_attention(job, scores))
    return results


def _attention(job: Job, scores: Mapping[tuple[Blocks, str], AttentiveScore]) -> dict[str, Any] | None:
    """What the report draws: where the probes look in the first test images, each map as bright as its maximum."""
    if not (rows := job.test.indices[: job.settings.attentive.maps].tolist()):
        return None
    probes = []
    for (blocks, pooler), score in scores.items():
        maps = score.attention[:, :, job.settings.attentive.class_token and job.backbone.info.has_cls :]
        grid = patch_grid(job.backbone, job.image_size, maps.shape[2])
        several = score.queries > 1
        named = {f"mean of {score.queries} queries" if several else "its query": maps.mean(1)}
        named |= {f"query {number + 1}": maps[:, number] for number in range(SHOWN_QUERIES * several)}
        shown = [{"name": name, "png": [_picture(each, grid) for each in found]} for name, found in named.items()]
        place = f"block {blocks[0]}" if len(blocks) == 1 else f"mixture of blocks {', '.join(map(str, blocks))}"
        probes.append({"name": f"{pooler}, {place}", "top1": score.accuracy.best.accuracy, "grid": grid, "maps": shown})
    images = job.test_images
    return {
        "kind": "attention",
        "images": [{"name": images.source.name(row), "jpeg": thumbnail_sheet(images, [row])["jpeg"]} for row in rows],
        "probes": probes,
    }


def _picture(attention: np.ndarray[Any, Any], grid: tuple[int, int]) -> str:
    shades = (255 * attention / max(float(attention.max()), 1e-12)).astype(np.uint8).reshape(*grid, 1)
    return encode(shades.repeat(3, axis=2), "PNG")


def finetuning(job: Job) -> list[Result]:
    """Fine-tune on every share of the labels, or on every published list."""
    settings, results = job.settings.finetune, []
    train, test = job.labelled()
    for name, share, rows, facts in _parts(job, train):
        own, row = published(settings, share, job.backbone.info.embed_dim, job.settings.given("finetune"))
        score = _tuned(job, rows, test, f"fine-tuning on {100 * share:.3g} % of the labels ({row})", own)
        options = {**own.model_dump(), "share": share, "train_images": len(rows.rows), "row": row, **facts}
        results.append(job.accuracy("finetune", name, score, options))
    pooling = ("cls" if job.backbone.info.has_cls else "mean") if settings.pooling == "auto" else settings.pooling
    last: dict[str, Any] = {"block": job.backbone.info.depth - 1, "pooling": pooling, "norm": True}
    return [dataclasses.replace(item, **last) for item in results]


def _parts(job: Job, train: LabelledRows) -> Iterator[tuple[str, float, LabelledRows, dict[str, Any]]]:
    """(metric, share of the labels, images, facts) of every part of the labels to train on."""
    settings = job.settings.finetune
    for path in settings.split_files:
        rows = train.select(job.listed(path))
        share = len(rows.rows) / len(train.rows)
        yield f"finetune_{list_name(path, settings.split_files)}_top1", share, rows, {"list": str(job.lists[path])}
    for share in settings.shares if not settings.split_files else ():
        name = "finetune_top1" if share >= 1 else f"finetune_{100 * share:g}pct_top1"
        yield name, share, share_of(train, share, job.run.seed), {}


def long_tail(job: Job) -> list[Result]:
    """k-NN, probe and fine-tuning from a long-tailed subset of train: overall, many, medium and few."""
    settings = job.settings.long_tail
    labels, truth = (required_labels(part, "chosen").numpy() for part in (job.train, job.test))
    chosen = imbalanced_subset(labels, imbalance=settings.imbalance, largest=settings.largest, seed=job.run.seed)
    groups = class_groups(labels[chosen], truth, settings)
    key = job.main_key
    subset, test = (dataclasses.replace(part, values={key: part[key]}) for part in (job.train.select(chosen), job.test))
    results = []
    for method in settings.methods:
        if method == "knn":
            k = min(job.settings.knn_k, len(subset))
            score = knn_protocol(subset, test, job.run, k=k, temperature=job.settings.knn_temperature)[key]
        elif method == "linear":
            probe = linear_probe(subset, test, job.settings.linear, job.run)[key]
            score = probe.selected or probe.best
        else:
            whole, tested = job.labelled()
            score = _tuned(job, whole.select(chosen), tested, "fine-tuning on the long tail", job.settings.finetune)
        sizes = sorted(np.bincount(labels[chosen]).tolist(), reverse=True)
        options = {**settings.model_dump(), "method": method, "train_images": len(chosen), "class_sizes": sizes}
        results.append(job.accuracy("long_tail", f"long_tail_{method}_top1", score, options))
        for name, members in groups.items():
            part = AccuracyScore.of(torch.from_numpy(score.correct[members]))
            shown = {**options, "test_images": int(members.sum())}
            results.append(job.accuracy("long_tail", f"long_tail_{method}_{name}", part, shown))
    return results


def robustness(job: Job) -> list[Result]:
    """Accuracy under common corruptions, mean over kinds and severities, and on shifted sets."""
    settings, predictors, results = job.settings.robustness, _classifiers(job), []
    how: dict[str, Any] = {"blocks": job.main_key[:1], "poolings": job.main_key[1:]}
    clean = job.test.select(evenly(len(job.test), settings.images))
    shown = {
        **settings.model_dump(),
        "images": len(clean),
        "k": job.settings.knn_k,
        "probe": {"epochs": job.settings.linear.epochs, "selection": "best rate on a held-out part of train"},
    }

    def hits(features: Features, what: str) -> dict[str, Tensor]:
        truth, x = required_labels(features, what), features[job.main_key].to(job.run.device)
        return {name: predict(x, truth.unique()).cpu() == truth for name, predict in predictors.items()}

    by_set = {"clean": hits(clean, "clean")}
    for kind, severity in product(settings.kinds, settings.severities):
        transform, phase = corrupted(kind, severity, job.run.seed), f"robustness: {kind} {severity}"
        found = job.features_of(job.test_images, clean.indices, transform=transform, phase=phase, **how)
        by_set[f"{kind}/{severity}"] = hits(dataclasses.replace(found, labels=clean.labels), kind)
    for name in predictors:
        each = {set_name: correct[name].numpy() for set_name, correct in by_set.items()}
        sets = {set_name: float(correct.mean()) for set_name, correct in each.items()}
        together = np.stack([correct for set_name, correct in each.items() if set_name != "clean"])
        details = {**shown, "classifier": name, "accuracy_by_set": sets, "clean": sets["clean"]}
        results.append(job.accuracy("robustness", f"robustness_{name}_top1", _mean_over_sets(together), details))
    for set_name, (images, numbers) in job.shifted.items():
        phase = f"robustness: {set_name} ({number_of(len(images), 'images')})"
        features = job.features_of(images, None, phase=phase, **how).renumbered(numbers)
        slug = "".join(letter if letter.isalnum() else "-" for letter in set_name).strip("-")
        for name, correct in hits(features, set_name).items():
            details = {**shown, "classifier": name, "set": images.description, "images": len(features)}
            results.append(job.accuracy("robustness", f"shift_{slug}_{name}_top1", AccuracyScore.of(correct), details))
    return results


def segmentation(job: Job) -> list[Result]:
    """The two numbers of the segmentation probe."""
    settings, images = job.settings.segmentation, (job.train_images, job.test_images)
    confusions = segmentation_protocol(job.backbone, *images, settings, run=job.run, cache=job.cache)
    value, low, high = mean_iou_interval(confusions, seed=job.run.seed)
    whole, blocks = confusions.sum(0), segmentation_blocks(job.backbone.info.depth, settings)
    shown = {
        **settings.model_dump(),
        "window": check_segmentation(settings, job.backbone),
        "blocks": list(blocks),
        "iou_by_class": [None if np.isnan(value) else value for value in class_iou(confusions).tolist()],
    }
    key, known = (blocks[-1], "patches"), {"settings": shown, "norm": settings.norm}
    miou = {"ci95": (min(low, value), max(high, value)), "confusions": confusions, **known}
    right = float(np.trace(whole) / max(1, whole.sum()))
    return [
        job.result("segmentation", "miou", key, value, **miou),
        job.result("segmentation", "pixel_accuracy", key, right, **known),
    ]


def _classifiers(job: Job) -> dict[str, Predict]:
    """Fitted on the clean train features. Told which classes occur (ImageNet-A holds 200 of 1000) they choose among
    those."""
    settings, key, device = job.settings, job.main_key, job.run.device
    bank, labels = job.train[key].to(device), required_labels(job.train, "train").to(device)

    def knn(x: Tensor, present: Tensor | None) -> Tensor:
        kept = torch.ones_like(labels, dtype=torch.bool) if present is None else torch.isin(labels, present.to(device))
        near = min(settings.knn_k, int(kept.sum()))
        return knn_predict(bank[kept], labels[kept], x, k=near, temperature=settings.knn_temperature)

    made: dict[str, Predict] = {"knn": knn} if "knn" in settings.robustness.classifiers else {}
    if "linear" in settings.robustness.classifiers:
        made["linear"] = fitted_probe(job.train, key, settings.linear, job.run)
    return made


def _mean_over_sets(correct: np.ndarray[Any, Any]) -> AccuracyScore:
    """Mean of [sets, N] and its interval over images: the sets are fixed, every image is seen in all of them."""
    by_image = correct.mean(0)
    half = 1.96 * by_image.std(ddof=min(1, len(by_image) - 1)) / np.sqrt(len(by_image))
    value = float(by_image.mean())
    return AccuracyScore(value, (max(0.0, value - half), min(1.0, value + half)), by_image)


def _tuned(job: Job, train: LabelledRows, test: LabelledRows, what: str, settings: FinetuneSettings) -> AccuracyScore:
    job.run.reporter.phase(what, 0)
    return finetune(job.backbone, train, test, settings, image_size=job.image_size, run=job.run)
