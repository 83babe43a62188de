"""Which images an analysis looks at, and the measurements that several commands share: atlas and label-free verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mim_refiner.analysis.atlas import Atlas, Key, label_free_atlas, labelled_atlas
from mim_refiner.analysis.augmented import PairedViews, paired_views
from mim_refiner.analysis.label_free import LabelFreeMeasures, dense_drift, label_free_measures
from mim_refiner.analysis.verdict import label_free_verdict
from mim_refiner.core.modules import evaluation_mode
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import eval_batches
from mim_refiner.data.photometric import normalize
from mim_refiner.data.source_base import sliced
from mim_refiner.evaluation.cache import FeatureCache
from mim_refiner.evaluation.features import Features, feature_sets, own_image_size
from mim_refiner.evaluation.splits import stratified_split
from mim_refiner.evaluation.suite import class_numbers
from mim_refiner.models.backbone import Backbone
from mim_refiner.reporting import Reporter
from mim_refiner.types import BackboneInfo

HELD_OUT = 0.2  # of the images, when there is no test set
DRIFT_IMAGES = 256


@dataclass(frozen=True)
class Limits:
    """Most images that each part looks at; more are thinned out evenly."""

    bank: int = 5000
    queries: int = 2000
    views: int = 2000  # label-free measures
    similarity: int = 1000


@dataclass(frozen=True)
class Samples:
    """Bank and query images by row number. Without a test set both come from one set, and no image is in both."""

    bank: ImageSet
    bank_rows: NDArray[np.int64]
    queries: ImageSet
    query_rows: NDArray[np.int64]
    view_rows: NDArray[np.int64]  # images of the query set for the label-free measures
    labelled: bool
    cache: FeatureCache | None = None  # of their features

    def described(self) -> dict[str, Any]:
        return {
            "bank": f"{len(self.bank_rows)} of {len(self.bank)} images",
            "queries": f"{len(self.query_rows)} of {len(self.queries)} images",
            "label_free": f"{len(self.view_rows)} images",
            "labels": self.labelled,
        }


def choose_samples(train: ImageSet, test: ImageSet | None, *, seed: int, cache: FeatureCache | None = None) -> Samples:
    """Thin bank and queries to the limits; without ``test`` a fifth of ``train`` is held out, stratified by class."""
    limits = Limits()
    labelled = train.labels is not None and (test is None or test.labels is not None)
    if test is None:
        labels = np.zeros(len(train), dtype=np.int64) if train.labels is None else train.labels
        kept, held = stratified_split(labels, HELD_OUT, seed)
        queries = train
    else:
        kept, held, queries = np.arange(len(train)), np.arange(len(test)), test
    views = np.arange(len(queries))  # nothing is learnt from them, so nothing has to be held out
    bank, rows = _thinned(kept, limits.bank), _thinned(held, limits.queries)
    return Samples(train, bank, queries, rows, _thinned(views, limits.views), labelled, cache)


def thinned(images: ImageSet, limit: int) -> ImageSet:
    """Every n-th image so that at most ``limit`` remain (even over sorted class folders)."""
    step = math.ceil(len(images) / limit)
    if step <= 1:
        return images
    return ImageSet(sliced(images.source, slice(None, None, step), f"[::{step}]"), channels=images.channels)


def default_key(info: BackboneInfo, pooling: str | None = None) -> Key:
    """The features that are used when nothing else is known: the last block, raw, class token where there is one."""
    return info.depth - 1, pooling or ("cls" if info.has_cls else "mean"), False


def atlas_of(
    backbone: Backbone,
    samples: Samples,
    run: Run,
    *,
    name: str,
    pooling: str | None = None,
    probe: bool = True,
    both: bool = True,
) -> tuple[Atlas, dict[bool, Features]]:
    """Atlas by k-NN (labels) or neighbour consistency, and the features of the query images (no labels: of the views).

    Every feature comes from one pass over the images of each kind, or from the cache. ``probe`` adds the ridge probe,
    ``both`` the two poolings side by side.
    """
    default = default_key(backbone.info, pooling)
    if not samples.labelled:
        views = _views(backbone, samples, run, name)
        run.reporter.phase(f"atlas: {name}", 0)
        progress = _progress(run.reporter)
        atlas = label_free_atlas(views, default=default, both=both, seed=run.seed, progress=progress)
        return atlas, dict(views.clean)
    bank, queries = bank_and_queries(backbone, samples, run, name)
    run.reporter.phase(f"atlas: {name}", 0)
    progress = _progress(run.reporter)
    return labelled_atlas(
        bank, queries, default=default, probe=probe, both=both, seed=run.seed, progress=progress
    ), queries


def knn_hits(backbone: Backbone, samples: Samples, run: Run, *, key: Key, name: str) -> NDArray[np.float64]:
    """[N]: whether k-NN of one block, pooling and norm classifies each query image rightly; needs labels."""
    block, pooling, norm = key
    options = {"blocks": (block,), "poolings": (pooling,), "norms": (norm,)}
    bank, queries = bank_and_queries(backbone, samples, run, name, **options)
    return labelled_atlas(bank, queries, default=key, probe=False, both=False, seed=run.seed).scores[key]


def measures_of(backbone: Backbone, samples: Samples, run: Run, *, key: Key, name: str) -> LabelFreeMeasures:
    """Label-free measures of one block, pooling and norm."""
    views = _views(backbone, samples, run, name, blocks=(key[0],), poolings=(key[1],), norms=(key[2],))
    run.reporter.phase(f"label-free measures: {name}", 0)
    found = [part[key[2]][key[0], key[1]] for part in (views.clean, views.first, views.second)]
    return label_free_measures(*found, seed=run.seed)


def judged_without_labels(
    models: Mapping[str, Backbone], samples: Samples, run: Run, *, pooling: str | None = None
) -> dict[str, Any]:
    """Label-free verdict on the last block of the first two of ``models``, further ones by name beside it."""
    first, *later = models
    keys = {name: default_key(backbone.info, pooling) for name, backbone in models.items()}
    measures = {name: measures_of(models[name], samples, run, key=keys[name], name=name) for name in models}
    verdicts = {
        name: label_free_verdict(
            measures[first], measures[name], drift=drift_of(models[first], models[name], samples, run), seed=run.seed
        )
        for name in later
    }
    return verdicts[later[0]] | {name: verdicts[name] for name in later[1:]}


def drift_of(before: Backbone, after: Backbone, samples: Samples, run: Run) -> NDArray[np.float64] | None:
    """1 - cosine of the last block's patch features, per image; None for encoders of different shape."""
    old, new = before.info, after.info
    if (old.embed_dim, old.patch_size, old.image_size) != (new.embed_dim, new.patch_size, new.image_size):
        return None
    rows = _thinned(samples.view_rows, DRIFT_IMAGES)
    parts = []
    with torch.inference_mode(), evaluation_mode(before), evaluation_mode(after):
        for pixels, _ in eval_batches(samples.queries, own_image_size(old), 64, indices=rows):
            patches = []
            for backbone in (before, after):
                inputs = normalize(pixels.to(run.device), backbone.info.mean, backbone.info.std)
                with run.autocast():
                    patches.append(backbone.to(run.device).forward_blocks(inputs, [-1])[0].patches.float())
            parts.append(dense_drift(*patches))
    return np.concatenate(parts)


def bank_and_queries(
    backbone: Backbone, samples: Samples, run: Run, name: str, **options: Any
) -> tuple[dict[bool, Features], dict[bool, Features]]:
    """Features {norm applied?: Features} of bank and query images, classes numbered as in the bank.

    ``options`` go to ``feature_sets``: everything unless blocks, poolings or norms are named.
    """
    options["cache"] = samples.cache
    bank = _features(backbone, samples.bank, samples.bank_rows, run, f"bank images, {name}", options)
    queries = _features(backbone, samples.queries, samples.query_rows, run, f"query images, {name}", options)
    number = class_numbers(samples.bank, samples.queries)
    if number is not None:
        queries = {
            norm: dataclasses.replace(found, labels=None if found.labels is None else number[found.labels])
            for norm, found in queries.items()
        }
    return bank, queries


def _features(
    backbone: Backbone, images: ImageSet, rows: NDArray[np.int64], run: Run, what: str, options: Mapping[str, Any]
) -> dict[bool, Features]:
    run.reporter.phase(f"features of the {what}", len(rows))
    return feature_sets(backbone, images, run=run, indices=rows, progress=_progress(run.reporter), **options)


def _views(backbone: Backbone, samples: Samples, run: Run, name: str, **options: Any) -> PairedViews:
    """The images for the label-free measures, twice augmented; ``options`` as of :func:`bank_and_queries`."""
    options |= {"indices": samples.view_rows, "what": f", {name}", "cache": samples.cache}
    return paired_views(backbone, samples.queries, run, **options)


def _progress(reporter: Reporter) -> Any:
    return lambda done, _: reporter.progress(done, {})


def _thinned(rows: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """At most ``limit`` rows, evenly spaced (even over sorted class folders)."""
    if len(rows) <= limit:
        return rows
    return rows[np.linspace(0, len(rows) - 1, limit).astype(np.int64)]
