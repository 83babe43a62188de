"""Online k-NN: how good the features are while a run goes on, on a fixed small bank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mim_refiner.analysis.forecast import refinement_forecast
from mim_refiner.core.collectives import from_rank_0
from mim_refiner.core.knn import knn_predict
from mim_refiner.core.modules import evaluation_mode
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.evaluation.features import Features, feature_sets
from mim_refiner.evaluation.knn import required_labels
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.refiner import Refiner
from mim_refiner.report.figures import read_metrics
from mim_refiner.training.recipe import Recipe

BANK_LIMIT, TEST_LIMIT, KNN_K = 5000, 1000, 10
MIN_KNN_IMAGES = 5  # of which one is held out
TRAINED_ON = "Measured on images it trained on."
Sets = dict[bool, Features]  # with the final norm, and without it


@dataclass
class OnlineKnn:
    """k-NN top-1 of the given blocks: a fifth of the images (1,000 at most) looked up among the others (5,000 at most).

    Always the same ones. Never the test images of the verdict: what is kept as best depends on it. In the head warm-up
    of a ``refiner`` the features are computed once, and what the last head makes of them is measured beside them;
    ``draws``: the images that its encoder will then learn from.
    """

    backbone: Backbone
    images: ImageSet
    blocks: Sequence[int]
    pooling: str
    run: Run
    refiner: Refiner | None = None
    draws: int = 0

    @classmethod
    def watching(cls, recipe: Recipe, backbone: Backbone, images: ImageSet, **more: Any) -> OnlineKnn | None:
        """As the recipe says; None without (enough) labels or when it turns it off."""
        watched = recipe.knn_every and images.labels is not None and len(images) >= MIN_KNN_IMAGES
        return cls(backbone, images, **more) if watched else None

    def __post_init__(self) -> None:
        order = np.random.default_rng(0).permutation(len(self.images))
        self.size = min(TEST_LIMIT, len(order) // 5)
        self.test, self.bank = order[: self.size], order[self.size :][:BANK_LIMIT]
        self._frozen: list[Sets] | None = None

    def __call__(self) -> dict[str, float]:
        """Metrics ``knn_top1`` (the last block) and ``knn_top1/<block>``; of a frozen encoder also ``knn_heads``."""
        frozen = self.refiner is not None and self.refiner.encoder_frozen
        kept = self._frozen if frozen else None
        pair = kept or [self._features(rows, frozen) for rows in (self.bank, self.test)]
        self._frozen = pair if frozen else None
        metrics = {
            f"knn_top1/{block}": _accuracy(pair, [sets[False][block, self.pooling] for sets in pair])
            for block in self.blocks
        }
        if frozen:
            metrics["knn_heads"] = _accuracy(pair, [self._projected(sets) for sets in pair])
        # all ranks must agree: what is kept as best, and when a run stops, depends on it
        return from_rank_0({"knn_top1": metrics[f"knn_top1/{self.blocks[-1]}"], **metrics})

    def forecast(self, folder: Path) -> dict[str, Any]:
        """{"forecast": record} by what metrics.jsonl of a run folder has of its warm-up; empty without one."""
        log = folder / "metrics.jsonl"
        seen = [record for record in (read_metrics(log) if log.is_file() else []) if "knn_heads" in record]
        if not seen:
            return {}
        return {"forecast": refinement_forecast(self.draws, seen[-1]["knn_top1"], seen[-1]["knn_heads"])}

    def warmed_up(self, folder: Path) -> None:
        """Say what is to be expected of the refinement, by the log of the run ``folder``."""
        for found in self.forecast(folder).values():
            self.run.reporter.message(f"forecast: {found['reason']}")

    def _features(self, indices: NDArray[np.int64], normed: bool) -> Sets:
        norms = (False, True) if normed else (False,)
        how: dict[str, Any] = {"blocks": self.blocks, "poolings": (self.pooling,), "norms": norms, "run": self.run}
        return feature_sets(self.backbone, self.images, **how, indices=indices)

    @torch.inference_mode()
    def _projected(self, sets: Sets) -> Tensor:
        """What the last head's projector makes of the images [N, out_dim]."""
        assert self.refiner is not None
        last = self.blocks[-1]
        projector = self.refiner.head(last).projector
        with evaluation_mode(projector):
            features = sets[last == self.backbone.info.depth - 1][last, self.pooling]  # the last block's after the norm
            return projector(features.to(self.run.device)).float().cpu()


def _accuracy(pair: Sequence[Sets], features: Sequence[Tensor]) -> float:
    labels, truth = (required_labels(sets[False], "chosen") for sets in pair)
    predicted = knn_predict(features[0], labels, features[1], k=min(KNN_K, len(labels)))
    return predicted.eq(truth).float().mean().item()
