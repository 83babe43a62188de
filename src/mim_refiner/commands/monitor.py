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
from mim_refiner.evaluation.suite import class_numbers
from mim_refiner.models.backbone import Backbone

BANK_LIMIT, TEST_LIMIT, KNN_K = 5000, 1000, 10
MIN_KNN_IMAGES = 5  # of which one is held out


class OnlineKnn:
    """k-NN top-1 of the given blocks on at most 5,000 bank and 1,000 test images, always the same ones.

    Without test images a fifth of the bank's images is held out.
    """

    def __init__(
        self,
        backbone: Backbone,
        bank: ImageSet,
        test: ImageSet | None,
        *,
        blocks: Sequence[int],
        pooling: str,
        run: Run,
    ) -> None:
        self.backbone, self.blocks, self.pooling, self.run = backbone, list(blocks), pooling, run
        order = np.random.default_rng(0).permutation(len(bank))
        if test is None:
            held_out = min(TEST_LIMIT, len(bank) // 5)
            self.test, self.test_indices, order = bank, order[:held_out], order[held_out:]
        else:
            self.test, self.test_indices = test, np.random.default_rng(0).permutation(len(test))[:TEST_LIMIT]
        self.bank, self.bank_indices = bank, order[:BANK_LIMIT]
        self.size = len(self.test_indices)

    def __call__(self) -> dict[str, float]:
        """Metrics ``knn_top1`` (the last block) and ``knn_top1/<block>``."""
        bank, bank_labels = self._features(self.bank, self.bank_indices)
        test, truth = self._features(self.test, self.test_indices)
        number = class_numbers(self.bank, self.test)
        truth = truth if number is None else number[truth]
        metrics = {}
        for block in self.blocks:
            predicted = knn_predict(bank[block], bank_labels, test[block], k=min(KNN_K, len(bank_labels)))
            metrics[f"knn_top1/{block}"] = predicted.eq(truth).float().mean().item()
        # what is kept as best, and when a run stops, depends on it
        return from_rank_0({"knn_top1": metrics[f"knn_top1/{self.blocks[-1]}"], **metrics})

    def _features(self, images: ImageSet, indices: NDArray[np.int64]) -> tuple[dict[int, Tensor], Tensor]:
        """Features {block: [N, D]} and labels [N]."""
        found = extract_features(
            self.backbone,
            images,
            blocks=self.blocks,
            poolings=(self.pooling,),
            run=self.run,
            indices=indices,
        )
        assert found.labels is not None
        return {block: found[block, self.pooling] for block in self.blocks}, found.labels
