"""The protocols that go back to the images: attentive probes, fine-tuning, long tail, robustness, segmentation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from mim_refiner.data.thumbnails import encode, thumbnail_sheet
from mim_refiner.evaluation.attentive import AttentiveScore, Blocks, alike, attentive_protocol, mixture_blocks
from mim_refiner.evaluation.features import Features
from mim_refiner.evaluation.finetune import FinetuneSettings, LabelledRows, finetune, share_of
from mim_refiner.evaluation.jobs import Job
from mim_refiner.evaluation.knn import AccuracyScore, knn_protocol
from mim_refiner.evaluation.linear_probe import linear_probe
from mim_refiner.evaluation.long_tail import class_groups, imbalanced_subset
from mim_refiner.evaluation.protocols import selections
from mim_refiner.evaluation.published import published
from mim_refiner.evaluation.results import Result
from mim_refiner.evaluation.robustness import classifiers, corrupted, score_sets
from mim_refiner.evaluation.segmentation import segmentation_protocol
from mim_refiner.evaluation.splits import list_name
from mim_refiner.types import height_width

SHOWN_QUERIES = 3  # of a probe with several, beside their mean


def attentive(job: Job) -> list[Result]:
    """Probes that attend to the patch tokens of every block to report, and of a learned mixture of blocks."""
    settings, size = job.settings.attentive, job.settings.image_size
    assert size is not None
    sources: list[Blocks] = [(block,) for block in job.blocks]
    mixture = mixture_blocks(job.backbone.info.depth, settings.mixture) if settings.mixture else ()
    if len(mixture) > 1 and alike(job.backbone, mixture):
        sources.append(mixture)
    scores = attentive_protocol(
        job.backbone,
        job.labelled(job.train, job.train_images),
        job.labelled(job.test, job.test_images),
        sources,
        settings,
        image_size=size,
        batch_size=job.settings.batch_size,
        run=job.run,
        folder=job.cache.made_folder() if job.cache else None,
    )
    results = []
    for (blocks, pooler), score in scores.items():
        facts = {"blocks": list(blocks), "block_weights": score.weights, "queries": score.queries}
        facts["parameters"] = score.parameters
        options = {**settings.model_dump(), **facts}
        for suffix, accuracy, shown in selections(score.accuracy, options):
            name = f"attentive_top1{'_mixture' if len(blocks) > 1 else ''}{suffix}"
            results.append(job.accuracy("attentive", name, accuracy, shown, (blocks[-1], pooler)))
    results[0] = dataclasses.replace(results[0], record=_attention(job, scores))
    return results


def _attention(job: Job, scores: Mapping[tuple[Blocks, str], AttentiveScore]) -> dict[str, Any] | None:
    """What the report draws: where the probes look in the first test images, each map as bright as its maximum."""
    rows = job.test.indices[: job.settings.attentive.maps].tolist()
    if not rows:
        return None
    probes = []
    for (blocks, pooler), score in scores.items():
        maps = score.attention[:, :, job.settings.attentive.class_token and job.backbone.info.has_cls :]
        grid = _grid(job, maps.shape[2])
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


def _grid(job: Job, patches: int) -> tuple[int, int]:
    """Rows and columns of the patches; hierarchical encoders end on a coarser grid."""
    sides, patch = height_width(job.settings.image_size or 0), job.backbone.info.patch_size
    height, width = sides[0] // patch[0], sides[1] // patch[1]
    if height * width == patches:
        return height, width
    side = math.isqrt(patches)
    return side, patches // side


def _picture(attention: np.ndarray[Any, Any], grid: tuple[int, int]) -> str:
    shades = (255 * attention / max(float(attention.max()), 1e-12)).astype(np.uint8).reshape(*grid, 1)
    return encode(shades.repeat(3, axis=2), "PNG")


def finetuning(job: Job) -> list[Result]:
    """Fine-tune on every share of the labels, or on every published list."""
    settings, results = job.settings.finetune, []
    train, test = job.labelled(job.train, job.train_images), job.labelled(job.test, job.test_images)
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
    assert job.train.labels is not None
    assert job.test.labels is not None
    labels = job.train.labels.numpy()
    chosen = imbalanced_subset(labels, imbalance=settings.imbalance, largest=settings.largest, seed=job.run.seed)
    groups = class_groups(labels[chosen], job.test.labels.numpy(), settings)
    key = job.main_key
    subset, test = (dataclasses.replace(part, values={key: part[key]}) for part in (job.train.select(chosen), job.test))
    results = []
    for method in settings.methods:
        if method == "knn":
            k = min(job.settings.knn_k, len(subset))
            how: dict[str, Any] = {"temperature": job.settings.knn_temperature, "device": job.run.device}
            score = knn_protocol(subset, test, k=k, **how)[key]
        elif method == "linear":
            probe = linear_probe(subset, test, job.settings.linear, seed=job.run.seed, device=job.run.device)[key]
            score = probe.selected or probe.best
        else:
            rows = job.labelled(job.train, job.train_images).select(chosen)
            tested, own = job.labelled(job.test, job.test_images), job.settings.finetune
            score = _tuned(job, rows, tested, "fine-tuning on the long tail", own)
        options = {
            **settings.model_dump(),
            "method": method,
            "train_images": len(chosen),
            "class_sizes": sorted(np.bincount(labels[chosen]).tolist(), reverse=True),
        }
        results.append(job.accuracy("long_tail", f"long_tail_{method}_top1", score, options))
        for name, members in groups.items():
            part = AccuracyScore.of(torch.from_numpy(score.correct[members]))
            shown = {**options, "test_images": int(members.sum())}
            results.append(job.accuracy("long_tail", f"long_tail_{method}_{name}", part, shown))
    return results


def robustness(job: Job) -> list[Result]:
    """Accuracy under common corruptions, mean over kinds and severities, and on shifted sets."""
    settings, key = job.settings.robustness, job.main_key
    made = classifiers(
        job.train,
        key,
        settings.classifiers,
        k=job.settings.knn_k,
        temperature=job.settings.knn_temperature,
        linear=job.settings.linear,
        seed=job.run.seed,
        device=job.run.device,
    )
    clean = job.test.select(_spaced(len(job.test), settings.images))
    shown = {
        **settings.model_dump(),
        "images": len(clean),
        "k": job.settings.knn_k,
        "probe": {"epochs": job.settings.linear.epochs, "selection": "best rate on a held-out part of train"},
    }
    scored = score_sets(made, key, _corrupted_sets(job, clean), job.run.device)
    results = []
    for name, by_set in scored.items():
        sets = {set_name: float(correct.mean()) for set_name, correct in by_set.items()}
        undisturbed = by_set.pop("clean")
        together = np.stack(list(by_set.values()))
        details = {**shown, "classifier": name, "accuracy_by_set": sets, "clean": float(undisturbed.mean())}
        results.append(job.accuracy("robustness", f"robustness_{name}_top1", _mean_over_sets(together), details))
    return results + _shifted_results(job, made, shown)


def segmentation(job: Job) -> list[Result]:
    """The two numbers of the segmentation probe."""
    settings, images = job.settings.segmentation, (job.train_images, job.test_images)
    score = segmentation_protocol(job.backbone, *images, settings, run=job.run, cache=job.cache)
    shown = {
        **settings.model_dump(),
        "window": score.window,
        "blocks": list(score.blocks),
        "iou_by_class": [None if np.isnan(value) else value for value in score.by_class],
    }
    key, known = (score.blocks[-1], "patches"), {"settings": shown, "norm": settings.norm}
    miou = {"ci95": score.ci95, "confusions": score.confusions, **known}
    return [
        job.result("segmentation", "miou", key, score.mean_iou, **miou),
        job.result("segmentation", "pixel_accuracy", key, score.pixel_accuracy, **known),
    ]


def _corrupted_sets(job: Job, clean: Features) -> Iterator[tuple[str, Features]]:
    block, pooling = job.main_key
    yield "clean", clean
    for kind in job.settings.robustness.kinds:
        for severity in job.settings.robustness.severities:
            transform, what = corrupted(kind, severity, job.run.seed), f"robustness: {kind} {severity}"
            how: dict[str, Any] = {"blocks": (block,), "poolings": (pooling,), "transform": transform, "what": what}
            found = job.features_of(job.test_images, clean.indices, **how)
            yield f"{kind}/{severity}", dataclasses.replace(found, labels=clean.labels)


def _shifted_results(job: Job, made: Any, shown: dict[str, Any]) -> list[Result]:
    block, pooling = job.main_key
    results = []
    for set_name, (images, numbers) in (job.shifted or {}).items():
        found = job.features_of(
            images, None, blocks=(block,), poolings=(pooling,), what=f"robustness: {set_name} ({len(images)} images)"
        )
        if numbers is not None and found.labels is not None:
            found = dataclasses.replace(found, labels=numbers[found.labels])
        for name, by_set in score_sets(made, job.main_key, [(set_name, found)], job.run.device).items():
            score = AccuracyScore.of(torch.from_numpy(by_set[set_name]))
            details = {**shown, "classifier": name, "set": images.description, "images": len(found)}
            slug = "".join(letter if letter.isalnum() else "-" for letter in set_name).strip("-")
            results.append(job.accuracy("robustness", f"shift_{slug}_{name}_top1", score, details))
    return results


def _mean_over_sets(correct: np.ndarray[Any, Any]) -> AccuracyScore:
    """Mean of [sets, N] and its interval over images: the sets are fixed, every image is seen in all of them."""
    by_image = correct.mean(0)
    half = 1.96 * by_image.std(ddof=min(1, len(by_image) - 1)) / np.sqrt(len(by_image))
    value = float(by_image.mean())
    return AccuracyScore(value, (max(0.0, value - half), min(1.0, value + half)), by_image)


def _tuned(job: Job, train: LabelledRows, test: LabelledRows, what: str, settings: FinetuneSettings) -> AccuracyScore:
    job.run.reporter.phase(what, 0)
    size = job.settings.image_size
    assert size is not None
    return finetune(job.backbone, train, test, settings, image_size=size, run=job.run)


def _spaced(count: int, limit: int | None) -> np.ndarray[Any, Any]:
    return np.arange(count) if limit is None or limit >= count else np.linspace(0, count - 1, limit).astype(int)
