"""The protocols on frozen features behind one interface: a job in, results out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mim_refiner.core.metrics import effective_rank
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import TrainLoader
from mim_refiner.data.views import ViewSpec
from mim_refiner.data.workers import worker_count
from mim_refiner.evaluation.clustering import clustering_protocol
from mim_refiner.evaluation.features import Features, ImageTransform
from mim_refiner.evaluation.jobs import Job
from mim_refiner.evaluation.knn import AccuracyScore, knn_protocol
from mim_refiner.evaluation.linear_probe import FeatureSet, LinearProbeScore, paper_sets, probe_sets
from mim_refiner.evaluation.low_shot import low_shot_protocol
from mim_refiner.evaluation.results import Result

RANK_ROWS = 10_000  # rows that the effective rank looks at


def knn(job: Job) -> list[Result]:
    """k-NN of every block and pooling, and of the last few blocks concatenated."""
    how: dict[str, Any] = {"k": job.settings.knn_k, "temperature": job.settings.knn_temperature, "standardize": True}
    pair = job.of_blocks(job.train), job.of_blocks(job.test)
    found = [("knn_top1", how, knn_protocol(*pair, job.run, **how))]
    together = job.last_blocks(job.settings.knn_last)
    if len(together) > 1:
        train, test = (_concatenated(features, together, job.poolings) for features in (job.train, job.test))
        scores = knn_protocol(train, test, job.run, **how)
        found.append((f"knn_top1_last{len(together)}", {**how, "blocks": list(together)}, scores))
    return [job.accuracy("knn", name, score, shown, key) for name, shown, by in found for key, score in by.items()]


def linear(job: Job) -> list[Result]:
    """The linear probe of every block and pooling, and the paper's grid over feature sets, in one pass."""
    settings = job.settings.linear
    singles: list[FeatureSet] = [(key,) for key in job.of_blocks(job.train).keys]
    concatenates = settings.last > 1 or (settings.concatenate and len(job.poolings) > 1)
    grid = paper_sets(job.last_blocks(max(1, settings.last)), job.poolings, settings) if concatenates else []
    sets = list(dict.fromkeys(singles + grid))
    scores = probe_sets(
        job.train,
        job.test,
        sets,
        settings,
        seed=job.run.seed,
        device=job.run.device,
        epoch_features=_augmented(job, sets) if settings.augment else None,
    )
    results = []
    for feature_set in sets:
        for suffix, accuracy, shown in selections(scores[feature_set], settings.model_dump()):
            blocks = sorted({key[0] for key in feature_set})
            name = f"linear_top1{f'_last{len(blocks)}' if len(blocks) > 1 else ''}{suffix}"
            key = blocks[-1], "+".join(dict.fromkeys(key[1] for key in feature_set))
            results.append(job.accuracy("linear", name, accuracy, {**shown, "blocks": blocks}, key))
    return results + (_grid_results(job, {chosen: scores[chosen] for chosen in grid}) if len(grid) > 1 else [])


def low_shot(job: Job) -> list[Result]:
    """Logistic regression on 1, 2, 5 images a class, or on those of published lists.

    Lists with as many images of their largest class are splits of one number.
    """
    settings = job.settings.low_shot
    suffix = "_reference" if settings.scoring == "reference" else ""
    by_shots: dict[int, list[str]] = {}
    for path in settings.split_files:
        assert job.train.labels is not None
        by_shots.setdefault(int(job.train.labels[job.listed(path)].bincount().max()), []).append(path)
    drawn = {shots: [job.listed(path) for path in paths] for shots, paths in by_shots.items()}
    scores = low_shot_protocol(
        job.of_blocks(job.train), job.of_blocks(job.test), settings, seed=job.run.seed, drawn=drawn or None
    )
    results = []
    for (key, shots), score in scores.items():
        shown = {**settings.model_dump(), "shots": shots, "accuracy_by_split": score.by_split}
        if drawn:
            shown |= {"splits": len(drawn[shots]), "split_files": [str(job.lists[path]) for path in by_shots[shots]]}
        results.append(job.accuracy("low_shot", f"low_shot_{shots}_top1{suffix}", score, shown, key))
    return results


def clustering(job: Job) -> list[Result]:
    """Mini-batch k-means on the test features, and the separation of the classes."""
    test = job.of_blocks(job.test)
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
        for metric in ("accuracy", "nmi", "ami", "ari", "silhouette", "davies_bouldin"):
            name, correct = ("cluster_accuracy", score.correct) if metric == "accuracy" else (metric, None)
            found = {"ci95": score.interval(metric), "drawn": score.drawn.get(metric), "correct": correct}
            results.append(job.result("clustering", name, key, getattr(score, metric), settings=options, **found))
    return results


def rank(job: Job) -> list[Result]:
    """Effective rank of the train features, as published (RankMe) and centred; needs no labels."""
    rows = np.sort(np.random.default_rng(job.run.seed).permutation(len(job.train))[:RANK_ROWS])
    options = {"rows": len(rows), "features": "raw, of train"}
    return [
        job.result("rank", name, key, effective_rank(job.train[key][rows], centred=centred), settings=options)
        for key in job.of_blocks(job.train).keys
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


def _grid_results(job: Job, scores: dict[FeatureSet, LinearProbeScore]) -> list[Result]:
    """The whole grid as one number: the best probe on test (the paper's), and the best on the held-out part."""
    probes = len(scores) * len(job.settings.linear.learning_rates)

    def one(feature_set: FeatureSet, metric: str, accuracy: AccuracyScore, shown: dict[str, Any]) -> Result:
        blocks, poolings = sorted({key[0] for key in feature_set}), dict.fromkeys(key[1] for key in feature_set)
        shown = {**shown, "probes": probes, "blocks": blocks, "chosen_pooling": "+".join(poolings)}
        return job.accuracy("linear", metric, accuracy, shown, (blocks[-1], "grid"))

    best = max(scores, key=lambda feature_set: scores[feature_set].best.accuracy)
    options = job.settings.linear.model_dump()
    (_, accuracy, shown), *_ = selections(scores[best], options)
    results = [one(best, "linear_top1_grid_best", accuracy, shown)]
    chosen = max(scores, key=lambda feature_set: scores[feature_set].held_out_accuracy or 0.0)
    return results + [one(chosen, "linear_top1_grid", accuracy, shown)
                      for suffix, accuracy, shown in selections(scores[chosen], options) if not suffix]  # fmt: skip


def _augmented(job: Job, sets: list[FeatureSet]) -> Any:
    """Features of random crops and flips, new ones every epoch (the paper's training augmentation)."""
    blocks = sorted({key[0] for feature_set in sets for key in feature_set})
    low, high = job.settings.linear.crop_scale
    crops = RandomCrops(float(low), float(high), seed=job.run.seed)

    def features(epoch: int) -> Features:
        # not cached: used once, and fifty such entries would push everything else out
        return job.features_of(
            job.train_images,
            job.train.indices,
            blocks=blocks,
            transform=crops.of_epoch(epoch),
            phase=f"linear: augmented epoch {epoch + 1} of {job.settings.linear.epochs}",
            cache=None,
        )

    return features


class RandomCrops:
    """Random resized crops of ``low`` to ``high`` of the area, flipped half the time; a function of seed and epoch.

    The training loader cuts them, in processes that stay for all epochs.
    """

    def __init__(self, low: float, high: float, *, seed: int) -> None:
        self.low, self.high, self.seed = low, high, seed
        self.loader: TrainLoader | None = None

    def of_epoch(self, epoch: int) -> ImageTransform:
        """The crops of one epoch; every epoch is to be of the same images, size and batch."""

        def batches(
            images: ImageSet, size: int, batch_size: int, indices: NDArray[np.int64] | None
        ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            rows = np.arange(len(images)) if indices is None else indices
            if self.loader is None:
                spec = ViewSpec("probe", size, scale=(self.low, self.high), jitter_prob=0.0, gray_prob=0.0)
                workers = worker_count(-1, cached=images.cached)
                self.loader = TrainLoader(images, [spec], batch_size, self.seed, workers, rows=rows)
            for start, batch in zip(range(0, len(rows), batch_size), self.loader.epoch(epoch), strict=True):
                yield batch.views[0], torch.from_numpy(rows[start : start + batch_size])

        return ImageTransform(f"random crop {self.low}-{self.high} and flip, seed {self.seed} epoch {epoch}", batches)


def _concatenated(features: Features, blocks: tuple[int, ...], poolings: tuple[str, ...]) -> Features:
    values = {(blocks[-1], name): torch.cat([features[block, name] for block in blocks], 1) for name in poolings}
    return dataclasses.replace(features, values=values)
