"""The protocols behind one interface: a job in, results out. First those on frozen features, then those that go back
to the images: attentive probes, fine-tuning, long tail, robustness, segmentation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mim_refiner.core.knn import knn_predict
from mim_refiner.core.metrics import class_iou, effective_rank, mean_iou_interval
from mim_refiner.data.loaders import TrainLoader
from mim_refiner.data.source_base import evenly
from mim_refiner.data.thumbnails import encode, thumbnail_sheet
from mim_refiner.data.views import ViewSpec
from mim_refiner.data.workers import worker_count
from mim_refiner.evaluation.attentive import AttentiveScore, Blocks, attentive_protocol, sources_of
from mim_refiner.evaluation.clustering import clustering_protocol
from mim_refiner.evaluation.corruptions import corrupted
from mim_refiner.evaluation.features import Features, ImageTransform, patch_grid
from mim_refiner.evaluation.finetune import FinetuneSettings, LabelledRows, finetune, published, share_of
from mim_refiner.evaluation.jobs import Job
from mim_refiner.evaluation.knn import AccuracyScore, knn_protocol, required_labels
from mim_refiner.evaluation.linear_probe import (
    EpochFeatures,
    FeatureSet,
    LinearProbeScore,
    fitted_probe,
    linear_probe,
    paper_sets,
    probe_sets,
)
from mim_refiner.evaluation.low_shot import low_shot_protocol
from mim_refiner.evaluation.results import Result
from mim_refiner.evaluation.segmentation import check_segmentation, segmentation_blocks, segmentation_protocol
from mim_refiner.evaluation.splits import class_groups, imbalanced_subset, list_name
from mim_refiner.reporting import number_of

RANK_ROWS = 10_000  # rows that the effective rank looks at
SHOWN_QUERIES = 3  # of a probe with several, beside their mean
Predict = Callable[[Tensor, Tensor | None], Tensor]  # (features [N, D], classes that may occur or None) -> classes [N]


def knn(job: Job) -> Iterator[Result]:
    """k-NN of every block and pooling, and of the last few blocks concatenated."""
    how: dict[str, Any] = {"k": job.settings.knn_k, "temperature": job.settings.knn_temperature, "standardize": True}
    pair = job.train.of_blocks(job.knn_blocks), job.test.of_blocks(job.knn_blocks)
    found = [("knn_top1", how, knn_protocol(*pair, job.run, **how))]
    together = job.last_blocks(job.settings.knn_last)
    if len(together) > 1:
        train, test = (_concatenated(features, together, job.poolings) for features in (job.train, job.test))
        last = knn_protocol(train, test, job.run, **how)
        found.append((f"knn_top1_last{len(together)}", {**how, "blocks": list(together)}, last))
    for name, shown, scores in found:
        yield from (job.accuracy("knn", name, score, shown, key) for key, score in scores.items())


def linear(job: Job) -> Iterator[Result]:
    """The linear probe of every block and pooling, and the paper's grid over feature sets, in one pass.

    The whole grid is one number too: the best probe on test (the paper's), and the best on held-out images.
    """
    settings = job.settings.linear
    singles: list[FeatureSet] = [(key,) for key in job.pair[0].keys]
    concatenates = settings.last > 1 or (settings.concatenate and len(job.poolings) > 1)
    grid = paper_sets(job.last_blocks(max(1, settings.last)), job.poolings, settings) if concatenates else []
    sets = list(dict.fromkeys(singles + grid))
    crops = augmented(job, sets) if settings.augment else None
    scores = probe_sets(job.train, job.test, sets, settings, job.run, crops)
    by = settings.selection(len(job.train), augmented=settings.augment)

    def told(chosen: FeatureSet, of_grid: str | None = None) -> Iterator[Result]:
        blocks, pooling = sorted({key[0] for key in chosen}), "+".join(dict.fromkeys(key[1] for key in chosen))
        for suffix, accuracy, shown in selections(scores[chosen], settings.model_dump(), by):
            if of_grid is None:
                name, shown = f"_last{len(blocks)}" if len(blocks) > 1 else "", {**shown, "blocks": blocks}
                yield job.accuracy("linear", f"linear_top1{name}{suffix}", accuracy, shown, (blocks[-1], pooling))
            elif of_grid == suffix:
                probes = len(grid) * len(settings.learning_rates)
                shown = {**shown, "probes": probes, "blocks": blocks, "chosen_pooling": pooling}
                yield job.accuracy("linear", f"linear_top1_grid{suffix}", accuracy, shown, (blocks[-1], "grid"))

    for chosen in sets:
        yield from told(chosen)
    if len(grid) > 1:
        yield from told(max(grid, key=lambda chosen: scores[chosen].best.accuracy), "_best")
        yield from told(max(grid, key=lambda chosen: scores[chosen].held_out_accuracy or 0.0), "")


def low_shot(job: Job) -> Iterator[Result]:
    """Logistic regression on few images a class, or on published lists: those of one largest class are its splits."""
    settings = job.settings.low_shot
    suffix = "_reference" if settings.scoring == "reference" else ""
    by_shots: dict[int, list[str]] = {}
    for path in settings.split_files:
        assert job.train.labels is not None
        by_shots.setdefault(int(job.train.labels[job.listed(path)].bincount().max()), []).append(path)
    drawn = {shots: [job.listed(path) for path in paths] for shots, paths in by_shots.items()}
    scores = low_shot_protocol(*job.pair, settings, seed=job.run.seed, drawn=drawn or None)
    for (key, shots), score in scores.items():
        shown = {**settings.model_dump(), "shots": shots, "accuracy_by_split": score.correct.mean(1).tolist()}
        if drawn:
            shown |= {"splits": len(drawn[shots]), "split_files": [str(job.lists[path]) for path in by_shots[shots]]}
        yield job.accuracy("low_shot", f"low_shot_{shots}_top1{suffix}", score, shown, key)


def clustering(job: Job) -> Iterator[Result]:
    """Mini-batch k-means on the test features, and the separation of the classes."""
    test = job.pair[1]
    seeds, resamples = job.settings.cluster_seeds, job.settings.cluster_bootstrap
    for key, score in clustering_protocol(test, num_seeds=seeds, resamples=resamples, seed=job.run.seed).items():
        options = {
            "algorithm": "mini-batch k-means",
            "clusters": len(np.unique(test.labels)) if test.labels is not None else 0,
            "seeds": seeds,
            "features": "standardised, L2-normalised",
            "inertia": score.inertia,
            "interval": f"bootstrap of the whole procedure, {resamples} resamples"
            if resamples
            else "Wilson, of the images under the clustering found: not of the clustering",
        }
        for metric, value in score.values.items():
            name, correct = ("cluster_accuracy", score.correct) if metric == "accuracy" else (metric, None)
            found = {"ci95": score.interval(metric), "drawn": score.drawn.get(metric), "correct": correct}
            yield job.result("clustering", name, key, value, settings=options, **found)


def rank(job: Job) -> Iterator[Result]:
    """Effective rank of the train features, as published (RankMe) and centred; needs no labels."""
    rows = np.sort(np.random.default_rng(job.run.seed).permutation(len(job.train))[:RANK_ROWS])
    options = {"rows": len(rows), "features": "raw, of train"}
    for key, (name, centred) in product(job.pair[0].keys, (("rank", False), ("rank_centred", True))):
        yield job.result("rank", name, key, effective_rank(job.train[key][rows], centred=centred), settings=options)


def selections(
    score: LinearProbeScore, settings: Mapping[str, Any], by: str
) -> Iterator[tuple[str, AccuracyScore, dict[str, Any]]]:
    """("_best" and "", accuracy, settings): the paper's selection on the test set, and the honest one."""
    options = {**settings, "accuracy_by_rate": score.by_rate}
    yield "_best", score.best, {**options, "selection": "best on test", "selected_rate": score.best_rate}
    if score.selected is not None:
        yield "", score.selected, {**options, "selection": by, "selected_rate": score.selected_rate}


def augmented(job: Job, sets: list[FeatureSet]) -> EpochFeatures:
    """Features of random resized crops and flips, new ones every epoch (the paper's training augmentation).

    The training loader cuts them, in processes that stay for all epochs. They are not cached: used once, and fifty
    such entries would push everything else out.
    """
    scale, rows, size = job.settings.linear.crop_scale, job.train.indices.numpy(), job.settings.batch_size
    spec = ViewSpec("probe", job.image_size, scale=scale, jitter_prob=0.0, gray_prob=0.0)
    workers = worker_count(-1, cached=job.train_images.cached)
    loader = TrainLoader(job.train_images, [spec], size, job.run.seed, workers, rows=rows)
    blocks = sorted({key[0] for feature_set in sets for key in feature_set})

    def features(epoch: int) -> Features:
        def crops(*_: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for chosen, batch in zip(torch.from_numpy(rows).split(size), loader.epoch(epoch), strict=True):
                yield batch.views[0], chosen

        phase = f"linear: augmented epoch {epoch + 1} of {job.settings.linear.epochs}"
        how: dict[str, Any] = {"transform": ImageTransform("random crops", crops), "phase": phase, "cache": None}
        return job.features_of(job.train_images, rows, blocks=blocks, **how)

    return features


def _concatenated(features: Features, blocks: tuple[int, ...], poolings: tuple[str, ...]) -> Features:
    values = {(blocks[-1], name): torch.cat([features[block, name] for block in blocks], 1) for name in poolings}
    return dataclasses.replace(features, values=values)


def attentive(job: Job) -> Iterator[Result]:
    """Probes that attend to the patch tokens of every block to report, and of a learned mixture of blocks."""
    settings = job.settings.attentive
    how: dict[str, Any] = {"image_size": job.image_size, "batch_size": job.settings.batch_size, "run": job.run}
    how["folder"] = job.cache.made_folder() if job.cache else None
    sources = sources_of(job.backbone, job.blocks, settings.mixture)
    scores = attentive_protocol(job.backbone, *job.labelled(), sources, settings, **how)
    record = _attention(job, scores)  # with the first result
    for (blocks, pooler), score in scores.items():
        facts = {"block_weights": score.weights, "queries": score.queries, "parameters": score.parameters}
        options = {**settings.model_dump(), "blocks": list(blocks), **facts}
        for suffix, accuracy, shown in selections(score.accuracy, options, settings.selection(len(job.train))):
            name = f"attentive_top1{'_mixture' if len(blocks) > 1 else ''}{suffix}"
            yield job.accuracy("attentive", name, accuracy, shown, (blocks[-1], pooler), record=record)
            record = None


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


def finetuning(job: Job) -> Iterator[Result]:
    """Fine-tune on every share of the labels, or on every published list."""
    settings, (train, test) = job.settings.finetune, job.labelled()
    pooling = settings.pooling_of(job.backbone.info)
    for name, share, rows, facts in _parts(job, train):
        own, row = published(settings, share, job.backbone.info.embed_dim, job.settings.given("finetune"))
        score = _tuned(job, rows, test, f"fine-tuning on {100 * share:.3g} % of the labels ({row})", own)
        options = {**own.model_dump(), "share": share, "train_images": len(rows.rows), "row": row, **facts}
        yield job.accuracy("finetune", name, score, options, (job.backbone.info.depth - 1, pooling), norm=True)


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


def long_tail(job: Job) -> Iterator[Result]:
    """k-NN, probe and fine-tuning from a long-tailed subset of train: overall, many, medium and few."""
    settings = job.settings.long_tail
    labels, truth = (required_labels(part, "chosen").numpy() for part in (job.train, job.test))
    chosen = imbalanced_subset(labels, imbalance=settings.imbalance, largest=settings.largest, seed=job.run.seed)
    groups = class_groups(labels[chosen], truth, settings)
    key = job.main_key
    subset, test = (dataclasses.replace(part, values={key: part[key]}) for part in (job.train.select(chosen), job.test))
    for method in settings.methods:
        how_chosen: dict[str, Any] = {}
        if method == "knn":
            k = min(job.settings.knn_k, len(subset))
            score = knn_protocol(subset, test, job.run, k=k, temperature=job.settings.knn_temperature)[key]
        elif method == "linear":
            probe = linear_probe(subset, test, job.settings.linear, job.run)[key]
            by = job.settings.linear.selection(len(subset))
            *_, (_, score, how_chosen) = selections(probe, {"epochs": job.settings.linear.epochs}, by)
        else:
            whole, tested = job.labelled()
            score = _tuned(job, whole.select(chosen), tested, "fine-tuning on the long tail", job.settings.finetune)
        sizes = sorted(np.bincount(labels[chosen]).tolist(), reverse=True)
        options = {**settings.model_dump(), "method": method, "train_images": len(chosen), "class_sizes": sizes}
        options |= {"probe": how_chosen} if how_chosen else {}
        yield job.accuracy("long_tail", f"long_tail_{method}_top1", score, options)
        for name, members in groups.items():
            part = AccuracyScore.of(torch.from_numpy(score.correct[members]))
            shown = {**options, "test_images": int(members.sum())}
            yield job.accuracy("long_tail", f"long_tail_{method}_{name}", part, shown)


def robustness(job: Job) -> Iterator[Result]:
    """Accuracy under common corruptions, mean over kinds and severities, and on shifted sets."""
    settings, predictors = job.settings.robustness, _classifiers(job)
    how: dict[str, Any] = {"blocks": job.main_key[:1], "poolings": job.main_key[1:]}
    clean = job.test.select(evenly(len(job.test), settings.images))
    shown = {
        **settings.model_dump(),
        "images": len(clean),
        "k": job.settings.knn_k,
        "probe": {"epochs": job.settings.linear.epochs, "selection": job.settings.linear.selection(len(job.train))},
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
        yield job.accuracy("robustness", f"robustness_{name}_top1", _mean_over_sets(together), details)
    for set_name, (images, numbers) in job.shifted.items():
        phase = f"robustness: {set_name} ({number_of(len(images), 'images')})"
        features = job.features_of(images, None, phase=phase, **how).renumbered(numbers)
        slug = "".join(letter if letter.isalnum() else "-" for letter in set_name).strip("-")
        for name, correct in hits(features, set_name).items():
            details = {**shown, "classifier": name, "set": images.description, "images": len(features)}
            yield job.accuracy("robustness", f"shift_{slug}_{name}_top1", AccuracyScore.of(correct), details)


def segmentation(job: Job) -> Iterator[Result]:
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
    yield job.result("segmentation", "miou", key, value, **miou)
    yield job.result("segmentation", "pixel_accuracy", key, right, **known)


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
