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
from mim_refiner.data.loaders import TrainLoader
from mim_refiner.evaluation.features import Features, feature_sets
from mim_refiner.evaluation.knn import required_labels
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.refiner import Refiner
from mim_refiner.report.figures import read_metrics
from mim_refiner.training.recipe import RefineRecipe

BANK_LIMIT, TEST_LIMIT, KNN_K = 5000, 1000, 10
MIN_KNN_IMAGES = 5  # of which one is held out
TRAINED_ON = "Measured on images it trained on."
Sets = dict[bool, Features]  # with the final norm, and without it


@dataclass(frozen=True)
class Warming:
    """Whose heads are warmed up, and the images that the encoder will then learn from."""

    refiner: Refiner
    draws: int


def draws_of(recipe: RefineRecipe, loader: TrainLoader) -> int:
    """The images of all steps of the refinement."""
    return recipe.refinement.epochs * loader.steps_per_epoch * recipe.batch_size


def told_by_warmup(folder: Path, draws: int) -> dict[str, Any]:
    """{"forecast": record} by what metrics.jsonl of a run folder has of its warm-up; empty without labels."""
    log = folder / "metrics.jsonl"
    seen = [record for record in (read_metrics(log) if log.is_file() else []) if "knn_heads" in record]
    if not seen:
        return {}
    return {"forecast": refinement_forecast(draws, seen[-1]["knn_top1"], seen[-1]["knn_heads"])}


class OnlineKnn:
    """k-NN top-1 of the given blocks: a fifth of the images (1,000 at most) looked up among the others (5,000 at most).

    Always the same ones. Never the test images of the verdict: what is kept as best depends on it. In the head warm-up
    (``warming``) the features are computed once, and what the last head makes of them is measured beside them.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: ImageSet,
        *,
        blocks: Sequence[int],
        pooling: str,
        run: Run,
        warming: Warming | None = None,
    ) -> None:
        self.backbone, self.blocks, self.pooling, self.run, self.warming = backbone, list(blocks), pooling, run, warming
        self.images, order = images, np.random.default_rng(0).permutation(len(images))
        self.size = min(TEST_LIMIT, len(images) // 5)
        self.test, self.bank = order[: self.size], order[self.size :][:BANK_LIMIT]
        self._frozen: tuple[Sets, Sets] | None = None

    def __call__(self) -> dict[str, float]:
        """Metrics ``knn_top1`` (the last block) and ``knn_top1/<block>``; of a frozen encoder also ``knn_heads``."""
        frozen = self.warming is not None and self.warming.refiner.encoder_frozen
        kept = self._frozen if frozen else None
        bank, test = kept or (self._features(self.bank, frozen), self._features(self.test, frozen))
        self._frozen = (bank, test) if frozen else None
        last = self.blocks[-1]
        metrics = {
            f"knn_top1/{block}": _accuracy(bank, test, *(sets[False][block, self.pooling] for sets in (bank, test)))
            for block in self.blocks
        }
        if frozen:
            metrics["knn_heads"] = _accuracy(bank, test, self._projected(bank), self._projected(test))
        # all ranks must agree: what is kept as best, and when a run stops, depends on it
        return from_rank_0({"knn_top1": metrics[f"knn_top1/{last}"], **metrics})

    def warmed_up(self, folder: Path) -> None:
        """Say what is to be expected of the refinement, by the log of the run ``folder``."""
        if self.warming:
            for found in told_by_warmup(folder, self.warming.draws).values():
                self.run.reporter.message(f"forecast: {found['reason']}")

    def _features(self, indices: NDArray[np.int64], normed: bool) -> Sets:
        return feature_sets(
            self.backbone,
            self.images,
            blocks=self.blocks,
            poolings=(self.pooling,),
            norms=(False, True) if normed else (False,),
            run=self.run,
            indices=indices,
        )

    @torch.inference_mode()
    def _projected(self, sets: Sets) -> Tensor:
        """What the last head's projector makes of the images [N, out_dim]."""
        assert self.warming is not None
        last = self.blocks[-1]
        projector = self.warming.refiner.head(last).projector
        with evaluation_mode(projector):
            features = sets[last == self.backbone.info.depth - 1][last, self.pooling]  # the last block's after the norm
            return projector(features.to(self.run.device)).float().cpu()


def _accuracy(bank_sets: Sets, test_sets: Sets, bank: Tensor, test: Tensor) -> float:
    labels, truth = required_labels(bank_sets[False], "bank"), required_labels(test_sets[False], "test")
    predicted = knn_predict(bank, labels, test, k=min(KNN_K, len(labels)))
    return predicted.eq(truth).float().mean().item()
