"""The protocols on frozen features behind one interface: a job in, results out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from mim_refiner.core.metrics import effective_rank
from mim_refiner.data.loaders import TrainLoader
from mim_refiner.data.views import ViewSpec
from mim_refiner.data.workers import worker_count
from mim_refiner.evaluation.clustering import clustering_protocol
from mim_refiner.evaluation.features import Features, ImageTransform
from mim_refiner.evaluation.jobs import Job
from mim_refiner.evaluation.knn import AccuracyScore, knn_protocol
from mim_refiner.evaluation.linear_probe import EpochFeatures, FeatureSet, LinearProbeScore, paper_sets, probe_sets
from mim_refiner.evaluation.low_shot import low_shot_protocol
from mim_refiner.evaluation.results import Result

RANK_ROWS = 10_000  # rows that the effective rank looks at


def knn(job: Job) -> list[Result]:
    """k-NN of every block and pooling, and of the last few blocks concatenated."""
    how: dict[str, Any] = {"k": job.settings.knn_k, "temperature": job.settings.knn_temperature, "standardize": True}
    pair = job.train.of_blocks(job.knn_blocks), job.test.of_blocks(job.knn_blocks)
    found = [("knn_top1", how, knn_protocol(*pair, job.run, **how))]
    together = job.last_blocks(job.settings.knn_last)
    if len(together) > 1:
        train, test = (_concatenated(features, together, job.poolings) for features in (job.train, job.test))
        scores = knn_protocol(train, test, job.run, **how)
        found.append((f"knn_top1_last{len(together)}", {**how, "blocks": list(together)}, scores))
    return [job.accuracy("knn", name, score, shown, key) for name, shown, by in found for key, score in by.items()]


def linear(job: Job) -> list[Result]:
    """The linear probe of every block and pooling, and the paper's grid over feature sets, in one pass.

    The whole grid is one number too: the best probe on test (the paper's), and the best on the held-out part.
    """
    settings = job.settings.linear
    singles: list[FeatureSet] = [(key,) for key in job.pair[0].keys]
    concatenates = settings.last > 1 or (settings.concatenate and len(job.poolings) > 1)
    grid = paper_sets(job.last_blocks(max(1, settings.last)), job.poolings, settings) if concatenates else []
    sets = list(dict.fromkeys(singles + grid))
    crops = augmented(job, sets) if settings.augment else None
    scores = probe_sets(job.train, job.test, sets, settings, job.run, crops)

    def told(chosen: FeatureSet, of_grid: str | None = None) -> Iterator[Result]:
        blocks, pooling = sorted({key[0] for key in chosen}), "+".join(dict.fromkeys(key[1] for key in chosen))
        for suffix, accuracy, shown in selections(scores[chosen], settings.model_dump()):
            if of_grid is None:
                name, shown = f"_last{len(blocks)}" if len(blocks) > 1 else "", {**shown, "blocks": blocks}
                yield job.accuracy("linear", f"linear_top1{name}{suffix}", accuracy, shown, (blocks[-1], pooling))
            elif of_grid == suffix:
                probes = len(grid) * len(settings.learning_rates)
                shown = {**shown, "probes": probes, "blocks": blocks, "chosen_pooling": pooling}
                yield job.accuracy("linear", f"linear_top1_grid{suffix}", accuracy, shown, (blocks[-1], "grid"))

    results = [result for chosen in sets for result in told(chosen)]
    if len(grid) > 1:
        results += told(max(grid, key=lambda chosen: scores[chosen].best.accuracy), "_best")
        results += told(max(grid, key=lambda chosen: scores[chosen].held_out_accuracy or 0.0), "")
    return results


def low_shot(job: Job) -> list[Result]:
    """Logistic regression on few images a class, or on published lists: those of one largest class are its splits."""
    settings = job.settings.low_shot
    suffix = "_reference" if settings.scoring == "reference" else ""
    by_shots: dict[int, list[str]] = {}
    for path in settings.split_files:
        assert job.train.labels is not None
        by_shots.setdefault(int(job.train.labels[job.listed(path)].bincount().max()), []).append(path)
    drawn = {shots: [job.listed(path) for path in paths] for shots, paths in by_shots.items()}
    scores = low_shot_protocol(*job.pair, settings, seed=job.run.seed, drawn=drawn or None)
    results = []
    for (key, shots), score in scores.items():
        shown = {**settings.model_dump(), "shots": shots, "accuracy_by_split": score.correct.mean(1).tolist()}
        if drawn:
            shown |= {"splits": len(drawn[shots]), "split_files": [str(job.lists[path]) for path in by_shots[shots]]}
        results.append(job.accuracy("low_shot", f"low_shot_{shots}_top1{suffix}", score, shown, key))
    return results


def clustering(job: Job) -> list[Result]:
    """Mini-batch k-means on the test features, and the separation of the classes."""
    test = job.pair[1]
    seeds, resamples = job.settings.cluster_seeds, job.settings.cluster_bootstrap
    results = []
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
            results.append(job.result("clustering", name, key, value, settings=options, **found))
    return results


def rank(job: Job) -> list[Result]:
    """Effective rank of the train features, as published (RankMe) and centred; needs no labels."""
    rows = np.sort(np.random.default_rng(job.run.seed).permutation(len(job.train))[:RANK_ROWS])
    options = {"rows": len(rows), "features": "raw, of train"}
    return [
        job.result("rank", name, key, effective_rank(job.train[key][rows], centred=centred), settings=options)
        for key in job.pair[0].keys
        for name, centred in (("rank", False), ("rank_centred", True))
    ]


def selections(
    score: LinearProbeScore, settings: Mapping[str, Any]
) -> Iterator[tuple[str, AccuracyScore, dict[str, Any]]]:
    """("_best" and "", accuracy, settings): the paper's selection on the test set, and the honest one."""
    options = {**settings, "accuracy_by_rate": score.by_rate}
    yield "_best", score.best, {**options, "selection": "best on test", "selected_rate": score.best_rate}
    if score.selected is not None:
        chosen = {"selection": "best on a held-out part of train", "selected_rate": score.selected_rate}
        yield "", score.selected, {**options, **chosen}


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
