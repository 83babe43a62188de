"""Online k-NN: how good the features are while a run goes on, on a fixed small bank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mim_refiner.core.knn import knn_predict
from mim_refiner.data.decode import ImageSet
from mim_refiner.evaluation.features import extract_features
from mim_refiner.evaluation.suite import class_numbers
from mim_refiner.models.backbone import Backbone

BANK_LIMIT, TEST_LIMIT = 5000, 1000


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
        device: torch.device,
        precision: str = "fp32",
    ) -> None:
        self.backbone, self.blocks, self.pooling = backbone, list(blocks), pooling
        self.device, self.precision = device, precision
        order = np.random.default_rng(0).permutation(len(bank))
        if test is None:
            held_out = min(TEST_LIMIT, len(bank) // 5)
            self.test, self.test_indices, order = bank, order[:held_out], order[held_out:]
        else:
            self.test, self.test_indices = test, np.random.default_rng(0).permutation(len(test))[:TEST_LIMIT]
        self.bank, self.bank_indices = bank, order[:BANK_LIMIT]

    def __call__(self) -> dict[str, float]:
        """Metrics ``knn_top1`` (the last block) and ``knn_top1/<block>``."""
        bank, test = (
            extract_features(
                self.backbone,
                images,
                blocks=self.blocks,
                poolings=(self.pooling,),
                device=self.device,
                precision=self.precision,
                indices=indices,
            )
            for images, indices in ((self.bank, self.bank_indices), (self.test, self.test_indices))
        )
        assert bank.labels is not None
        assert test.labels is not None
        number = class_numbers(self.bank, self.test)
        truth = test.labels if number is None else number[test.labels]
        metrics = {}
        for block in self.blocks:
            key = (block, self.pooling)
            predicted = knn_predict(bank[key], bank.labels, test[key])
            metrics[f"knn_top1/{block}"] = predicted.eq(truth).float().mean().item()
        return {"knn_top1": metrics[f"knn_top1/{self.blocks[-1]}"], **metrics}
