"""Online k-NN: how good the features are while a run goes on, on a fixed small bank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mim_refiner.core.collectives import from_rank_0
from mim_refiner.core.knn import knn_predict
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.evaluation.features import extract_features
from mim_refiner.models.backbone import Backbone

BANK_LIMIT, TEST_LIMIT, KNN_K = 5000, 1000, 10
MIN_KNN_IMAGES = 5  # of which one is held out
TRAINED_ON = "Measured on images it trained on."


class OnlineKnn:
    """k-NN top-1 of the given blocks: a fifth of the images (1,000 at most) looked up among the others (5,000 at most).

    Always the same ones. Never the test images of the verdict: what is kept as best depends on it.
    """

    def __init__(self, backbone: Backbone, images: ImageSet, *, blocks: Sequence[int], pooling: str, run: Run) -> None:
        self.backbone, self.blocks, self.pooling, self.run = backbone, list(blocks), pooling, run
        self.images, order = images, np.random.default_rng(0).permutation(len(images))
        self.size = min(TEST_LIMIT, len(images) // 5)
        self.test, self.bank = order[: self.size], order[self.size :][:BANK_LIMIT]

    def __call__(self) -> dict[str, float]:
        """Metrics ``knn_top1`` (the last block) and ``knn_top1/<block>``."""
        bank, bank_labels = self._features(self.bank)
        test, truth = self._features(self.test)
        metrics = {}
        for block in self.blocks:
            predicted = knn_predict(bank[block], bank_labels, test[block], k=min(KNN_K, len(bank_labels)))
            metrics[f"knn_top1/{block}"] = predicted.eq(truth).float().mean().item()
        # all ranks must agree: what is kept as best, and when a run stops, depends on it
        return from_rank_0({"knn_top1": metrics[f"knn_top1/{self.blocks[-1]}"], **metrics})

    def _features(self, indices: NDArray[np.int64]) -> tuple[dict[int, Tensor], Tensor]:
        found = extract_features(
            self.backbone, self.images, blocks=self.blocks, poolings=(self.pooling,), run=self.run, indices=indices
        )
        assert found.labels is not None
        return {block: found[block, self.pooling] for block in self.blocks}, found.labels
