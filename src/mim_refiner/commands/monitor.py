"""Online k-NN: how good the features are while a run goes on, on a fixed small bank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mim_refiner.core.collectives import from_ranks, rank, world_size
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
        bank, bank_labels = self._features(self.bank, self.bank_indices)
        test, truth = self._features(self.test, self.test_indices)
        number = class_numbers(self.bank, self.test)
        truth = truth if number is None else number[truth]
        metrics = {}
        for block in self.blocks:
            predicted = knn_predict(bank[block], bank_labels, test[block])
            metrics[f"knn_top1/{block}"] = predicted.eq(truth).float().mean().item()
        return {"knn_top1": metrics[f"knn_top1/{self.blocks[-1]}"], **metrics}

    def _features(self, images: ImageSet, indices: NDArray[np.int64]) -> tuple[dict[int, Tensor], Tensor]:
        """Features {block: [N, D]} and labels [N]; every rank computes a part, and all get the whole in order."""
        share = -(-len(indices) // world_size())
        padded = np.resize(indices, (world_size(), share))  # equal parts: ranks of a sharded encoder pass together
        found = extract_features(
            self.backbone,
            images,
            blocks=self.blocks,
            poolings=(self.pooling,),
            device=self.device,
            precision=self.precision,
            indices=padded[rank()],
        )
        assert found.labels is not None
        own = {block: found[block, self.pooling] for block in self.blocks}
        parts = from_ranks((own, found.labels, found.indices))
        rows = _first_rows(torch.cat([seen for _, _, seen in parts]))
        features = {block: torch.cat([values[block] for values, _, _ in parts])[rows] for block in self.blocks}
        return features, torch.cat([labels for _, labels, _ in parts])[rows]


def _first_rows(indices: Tensor) -> Tensor:
    """Rows where an image is named for the first time, in order."""
    return torch.from_numpy(np.sort(np.unique(indices.numpy(), return_index=True)[1]))
