"""Which images an analysis looks at, and the measurements that several commands share: atlas and label-free verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mim_refiner.analysis.atlas import Atlas, Key, label_free_atlas, labelled_atlas
from mim_refiner.analysis.label_free import (
    MIN_IMAGES,
    LabelFreeMeasures,
    PairedViews,
    dense_drift,
    distinct_rows,
    label_free_measures,
    paired_views,
)
from mim_refiner.analysis.verdict import label_free_verdict, not_measured
from mim_refiner.core.modules import evaluation_mode
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import eval_batches
from mim_refiner.data.source_base import evenly, sliced
from mim_refiner.evaluation.cache import FeatureCache
from mim_refiner.evaluation.features import Features, block_outputs, feature_sets, own_image_size
from mim_refiner.evaluation.splits import stratified_split
from mim_refiner.evaluation.suite import class_numbers
from mim_refiner.models.backbone import Backbone
from mim_refiner.reporting import number_of
from mim_refiner.types import BackboneInfo

HELD_OUT = 0.2  # of the images, when there is no test set
# Most images that each part looks at; more are thinned out evenly.
BANK_IMAGES, QUERY_IMAGES, VIEW_IMAGES, SIMILARITY_IMAGES, DRIFT_IMAGES = 5000, 2000, 2000, 1000, 256


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
            "bank": f"{len(self.bank_rows)} of {number_of(len(self.bank), 'images')}",
            "queries": f"{len(self.query_rows)} of {number_of(len(self.queries), 'images')}",
            "label_free": number_of(len(self.view_rows), "images"),
            "labels": self.labelled,
        }


def choose_samples(train: ImageSet, test: ImageSet | None, *, seed: int, cache: FeatureCache | None = None) -> Samples:
    """Thin bank and queries to the limits; without ``test`` a fifth of ``train`` is held out, stratified by class."""
    labelled = train.labels is not None and (test is None or test.labels is not None)
    if test is None:
        labels = np.zeros(len(train), dtype=np.int64) if train.labels is None else train.labels
        kept, held = stratified_split(labels, HELD_OUT, seed)
        queries = train
    else:
        kept, held, queries = np.arange(len(train)), np.arange(len(test)), test
    views = evenly(len(queries), VIEW_IMAGES)  # nothing is learnt from them, so nothing has to be held out
    bank, rows = kept[evenly(len(kept), BANK_IMAGES)], held[evenly(len(held), QUERY_IMAGES)]
    return Samples(train, bank, queries, rows, views, labelled, cache)


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
        return label_free_atlas(views, default=default, both=both, run=run), dict(views.clean)
    bank, queries = bank_and_queries(backbone, samples, run, name)
    run.reporter.phase(f"atlas: {name}", 0)
    return labelled_atlas(bank, queries, default=default, probe=probe, both=both, run=run), queries


def knn_hits(backbone: Backbone, samples: Samples, run: Run, *, key: Key, name: str) -> NDArray[np.float64]:
    """[N]: whether k-NN of one block, pooling and norm classifies each query image rightly; needs labels."""
    block, pooling, norm = key
    options = {"blocks": (block,), "poolings": (pooling,), "norms": (norm,)}
    bank, queries = bank_and_queries(backbone, samples, run, name, **options)
    return labelled_atlas(bank, queries, default=key, probe=False, both=False, run=run).scores[key]


def measures_of(backbone: Backbone, samples: Samples, run: Run, *, key: Key, name: str) -> LabelFreeMeasures:
    """Label-free measures of one block, pooling and norm."""
    views = _views(backbone, samples, run, name, blocks=(key[0],), poolings=(key[1],), norms=(key[2],))
    run.reporter.phase(f"label-free measures: {name}", 0)
    found = [part[key[2]][key[0], key[1]] for part in views]
    return label_free_measures(*found, seed=run.seed)


def judged_without_labels(
    models: Mapping[str, Backbone], samples: Samples, run: Run, *, pooling: str | None = None
) -> dict[str, Any]:
    """Label-free verdict on the last block of the first two of ``models``, further ones by name beside it.

    "not measured" where there are fewer than ``MIN_IMAGES`` images that the first one tells apart.
    """
    first, *later = models
    if len(samples.view_rows) < MIN_IMAGES:
        return not_measured(f"{MIN_IMAGES} images or more; give them, or labels by --eval-data")
    keys = {name: default_key(backbone.info, pooling) for name, backbone in models.items()}
    measures = {name: measures_of(models[name], samples, run, key=keys[name], name=name) for name in models}
    known = len(features := measures[first].features)
    if (told := distinct_rows(features)) < MIN_IMAGES:
        return not_measured(
            f"{MIN_IMAGES} images or more that differ; the first encoder tells {told} of {known} apart: they are "
            "copies, or it has collapsed"
        )
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
    rows, pair = samples.view_rows[evenly(len(samples.view_rows), DRIFT_IMAGES)], (before, after)
    parts = []
    with torch.inference_mode(), evaluation_mode(before), evaluation_mode(after):
        for pixels, _ in eval_batches(samples.queries, own_image_size(old), 64, indices=rows):
            outputs = [block_outputs(backbone.to(run.device), pixels, [-1], run)[0] for backbone in pair]
            parts.append(dense_drift(*(output.patches.float() for output in outputs)))
    return np.concatenate(parts)


def bank_and_queries(
    backbone: Backbone, samples: Samples, run: Run, name: str, **options: Any
) -> tuple[dict[bool, Features], dict[bool, Features]]:
    """Features {norm applied?: Features} of bank and query images, classes numbered as in the bank.

    ``options`` go to ``feature_sets``: everything unless blocks, poolings or norms are named.
    """

    def features(what: str, images: ImageSet, rows: NDArray[np.int64]) -> dict[bool, Features]:
        how: dict[str, Any] = {"cache": samples.cache, "phase": f"features of the {what} images, {name}", **options}
        return feature_sets(backbone, images, run=run, indices=rows, **how)

    bank = features("bank", samples.bank, samples.bank_rows)
    queries = features("query", samples.queries, samples.query_rows)
    number = class_numbers(samples.bank, samples.queries)
    return bank, {norm: found.renumbered(number) for norm, found in queries.items()}


def _views(backbone: Backbone, samples: Samples, run: Run, name: str, **options: Any) -> PairedViews:
    """The images for the label-free measures, twice augmented; ``options`` as of :func:`bank_and_queries`."""
    options |= {"indices": samples.view_rows, "what": f", {name}", "cache": samples.cache}
    return paired_views(backbone, samples.queries, run, **options)
