"""Which images an analysis looks at, and the measurements that several commands share: atlas and label-free verdict."""

from __future__ import annotations

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
from mim_refiner.data.source_base import Selection, evenly
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


def thinned(images: ImageSet, limit: int) -> ImageSet:
    """At most ``limit`` images, evenly spaced (even over sorted class folders)."""
    if len(images) <= limit:
        return images
    rows, source = evenly(len(images), limit), images.source
    text = f"{source.description}, {limit:,} of them, evenly spaced"
    return ImageSet(Selection(source, rows, text), channels=images.channels)


def default_key(info: BackboneInfo, pooling: str | None = None) -> Key:
    """The features that are used when nothing else is known: the last block, raw, class token where there is one."""
    return info.depth - 1, pooling or ("cls" if info.has_cls else "mean"), False


@dataclass(frozen=True)
class Samples:
    """Bank and query images by row number, and what is measured on them. No image is in both, also of a single set."""

    bank: ImageSet
    bank_rows: NDArray[np.int64]
    queries: ImageSet
    query_rows: NDArray[np.int64]
    view_rows: NDArray[np.int64]  # images of the query set for the label-free measures
    run: Run
    cache: FeatureCache | None = None  # of their features

    @classmethod
    def of(cls, train: ImageSet, test: ImageSet | None, run: Run, cache: FeatureCache | None = None) -> Samples:
        """Thin bank and queries to the limits; without ``test`` a fifth of ``train`` is held out, by class."""
        if test is None:
            labels = np.zeros(len(train), dtype=np.int64) if train.labels is None else train.labels
            kept, held = stratified_split(labels, HELD_OUT, run.seed)
        else:
            kept, held = np.arange(len(train)), np.arange(len(test))
        queries = train if test is None else test
        views = evenly(len(queries), VIEW_IMAGES)  # nothing is learnt from them, so nothing has to be held out
        bank, rows = kept[evenly(len(kept), BANK_IMAGES)], held[evenly(len(held), QUERY_IMAGES)]
        return cls(train, bank, queries, rows, views, run, cache)

    @property
    def labelled(self) -> bool:
        return self.bank.labels is not None and self.queries.labels is not None

    def described(self) -> dict[str, Any]:
        return {
            "bank": f"{len(self.bank_rows)} of {number_of(len(self.bank), 'images')}",
            "queries": f"{len(self.query_rows)} of {number_of(len(self.queries), 'images')}",
            "label_free": number_of(len(self.view_rows), "images"),
            "labels": self.labelled,
        }

    def atlas(
        self, backbone: Backbone, name: str, *, pooling: str | None = None, full: bool = True
    ) -> tuple[Atlas, dict[bool, Features]]:
        """Atlas by k-NN (labels) or neighbour consistency, and the features of the query images (no labels: of the
        views).

        Every feature comes from one pass over the images of each kind, or from the cache. ``full`` adds the two
        poolings side by side and, with labels, the ridge probe.
        """
        how: dict[str, Any] = {"default": default_key(backbone.info, pooling), "both": full, "run": self.run}
        if not self.labelled:
            views = self._views(backbone, name)
            self.run.reporter.phase(f"atlas: {name}", 0)
            return label_free_atlas(views, **how), dict(views.clean)
        bank, queries = self.features(backbone, name)
        self.run.reporter.phase(f"atlas: {name}", 0)
        return labelled_atlas(bank, queries, probe=full, **how), queries

    def knn_hits(self, backbone: Backbone, name: str) -> NDArray[np.float64]:
        """[N]: whether k-NN by the usual features classifies each query image rightly; needs labels."""
        block, pooling, norm = key = default_key(backbone.info)
        pair = self.features(backbone, name, blocks=(block,), poolings=(pooling,), norms=(norm,))
        return labelled_atlas(*pair, default=key, probe=False, both=False, run=self.run).scores[key]

    def measures(self, backbone: Backbone, name: str, pooling: str | None = None) -> LabelFreeMeasures:
        """Label-free measures of the usual features."""
        block, pooling, norm = default_key(backbone.info, pooling)
        views = self._views(backbone, name, blocks=(block,), poolings=(pooling,), norms=(norm,))
        self.run.reporter.phase(f"label-free measures: {name}", 0)
        return label_free_measures(*(part[norm][block, pooling] for part in views), seed=self.run.seed)

    def judged_without_labels(self, models: Mapping[str, Backbone], pooling: str | None = None) -> dict[str, Any]:
        """Label-free verdict on the last block of the first two of ``models``, further ones by name beside it.

        "not measured" where there are fewer than ``MIN_IMAGES`` images that the first one tells apart.
        """
        if len(self.view_rows) < MIN_IMAGES:
            return not_measured(f"{MIN_IMAGES} images or more; give them, or labels by --eval-data")
        first, *later = models
        measures = {name: self.measures(backbone, name, pooling) for name, backbone in models.items()}
        known = len(features := measures[first].features)
        if (told := distinct_rows(features)) < MIN_IMAGES:
            return not_measured(
                f"{MIN_IMAGES} images or more that differ; the first encoder tells {told} of {known} apart: they are "
                "copies, or it has collapsed"
            )
        verdicts = {}
        for name in later:
            drift = self._drift(models[first], models[name])
            verdicts[name] = label_free_verdict(measures[first], measures[name], drift=drift, seed=self.run.seed)
        return verdicts.pop(later[0]) | verdicts

    def _drift(self, before: Backbone, after: Backbone) -> NDArray[np.float64] | None:
        """1 - cosine of the last block's patch features, per image; None for encoders of different shape."""
        old, new = before.info, after.info
        if (old.embed_dim, old.patch_size, old.image_size) != (new.embed_dim, new.patch_size, new.image_size):
            return None
        rows, parts = self.view_rows[evenly(len(self.view_rows), DRIFT_IMAGES)], []
        with torch.inference_mode(), evaluation_mode(before), evaluation_mode(after):
            for pixels, _ in eval_batches(self.queries, own_image_size(old), 64, indices=rows):
                pair = (block_outputs(each.to(self.run.device), pixels, [-1], self.run)[0] for each in (before, after))
                parts.append(dense_drift(*(output.patches.float() for output in pair)))
        return np.concatenate(parts)

    def features(
        self, backbone: Backbone, name: str, **options: Any
    ) -> tuple[dict[bool, Features], dict[bool, Features]]:
        """Features {norm applied?: Features} of bank and query images, classes numbered as in the bank.

        ``options`` go to ``feature_sets``: everything unless blocks, poolings or norms are named.
        """
        sets = {"bank": (self.bank, self.bank_rows), "query": (self.queries, self.query_rows)}
        how: dict[str, Any] = {"run": self.run, "cache": self.cache, **options}
        bank, queries = (
            feature_sets(backbone, images, indices=rows, phase=f"features of the {what} images, {name}", **how)
            for what, (images, rows) in sets.items()
        )
        numbers = class_numbers(self.bank, self.queries)
        return bank, {norm: found.renumbered(numbers) for norm, found in queries.items()}

    def _views(self, backbone: Backbone, name: str, **options: Any) -> PairedViews:
        """The images for the label-free measures, twice augmented; ``options`` as of :meth:`features`."""
        options |= {"indices": self.view_rows, "what": f", {name}", "cache": self.cache}
        return paired_views(backbone, self.queries, self.run, **options)
