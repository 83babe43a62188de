"""What one evaluation hands to every protocol: the encoder, the images, their features, and how to report a number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mim_refiner.core.identity import weights_sha256
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.name_lists import NameList
from mim_refiner.evaluation.cache import FeatureCache
from mim_refiner.evaluation.features import FeatureKey, Features, extract_features
from mim_refiner.evaluation.finetune import LabelledRows
from mim_refiner.evaluation.knn import AccuracyScore
from mim_refiner.evaluation.results import Result
from mim_refiner.evaluation.settings import EvaluationSettings
from mim_refiner.models.backbone import Backbone
from mim_refiner.types import ImageSize, default_crop_ratio

_NOTHING = Features({}, None, torch.arange(0), 0)


@dataclass(frozen=True)
class Job:
    """One encoder on one pair of image sets.

    ``train`` and ``test`` hold the features of all blocks that any protocol of this run needs; ``blocks`` are the ones
    to report, ``knn_blocks`` those of k-NN; ``test_images`` is the train set itself when a part of it is held out.
    ``shifted``: further labelled test sets by name, for robustness. ``lists``: published splits of the train images by
    their files.
    """

    backbone: Backbone
    train_images: ImageSet
    test_images: ImageSet
    blocks: tuple[int, ...]
    knn_blocks: tuple[int, ...]
    poolings: tuple[str, ...]
    norm: bool
    image_size: ImageSize
    settings: EvaluationSettings
    run: Run
    cache: FeatureCache | None
    shifted: Mapping[str, tuple[ImageSet, torch.Tensor | None]]
    lists: Mapping[str, NameList]
    train: Features = _NOTHING
    test: Features = _NOTHING

    @property
    def pair(self) -> tuple[Features, Features]:
        """Train and test features of the blocks to report."""
        return self.train.of_blocks(self.blocks), self.test.of_blocks(self.blocks)

    def last_blocks(self, count: int) -> tuple[int, ...]:
        """The deepest ``count`` blocks that there are features of."""
        return tuple(sorted({key[0] for key in self.train.keys})[-count:])

    @property
    def main_key(self) -> FeatureKey:
        """The deepest block to report and the first pooling: where a protocol that measures one thing looks."""
        return max(self.blocks), self.poolings[0]

    def features_of(self, images: ImageSet, rows: NDArray[np.int64] | torch.Tensor | None, **options: Any) -> Features:
        """Extract (or find) features with this job's settings; ``options`` as of ``extract_features``."""
        how = {"norm": self.norm, "image_size": self.image_size, "batch_size": self.settings.batch_size}
        options = {**how, "poolings": self.poolings, "run": self.run, "cache": self.cache, **options}
        return extract_features(self.backbone, images, indices=rows, **options)

    def listed(self, path: str) -> NDArray[np.int64]:
        """Rows of the train features that a published split names."""
        return np.flatnonzero(np.isin(self.train.indices.numpy(), self.lists[path].rows))

    def labelled(self) -> tuple[LabelledRows, LabelledRows]:
        """The images of train and test with their class numbers."""
        return LabelledRows.of(self.train_images, self.train), LabelledRows.of(self.test_images, self.test)

    @cached_property
    def data(self) -> dict[str, Any]:
        """Facts of both sets; asked for with the first result, when all images that cannot be read are known."""
        train, test = self.train_images, self.test_images
        held_out = {"share_of_train": self.settings.test_share, "split_seed": self.run.seed}
        held_out["stratified"] = train.labels is not None
        return {"train": train.facts(), "test": held_out if test is train else test.facts()}

    @cached_property
    def model_sha256(self) -> str:
        return weights_sha256(self.backbone.model)

    def result(self, protocol: str, metric: str, key: FeatureKey, value: float, **rest: Any) -> Result:
        """A result with all that this job repeats; ``rest``: settings, and ci95, correct, confusions where known."""
        transform = {"image_size": self.image_size, "crop_ratio": default_crop_ratio(self.image_size)}
        rest["settings"] = {**transform, "precision": self.settings.precision, **rest["settings"]}
        known = {"ci95": None, "norm": self.norm, "data": self.data, "model_sha256": self.model_sha256}
        return Result(protocol, metric, float(value), block=key[0], pooling=key[1], seed=self.run.seed, **known | rest)

    def accuracy(
        self, protocol: str, name: str, score: AccuracyScore, shown: Any, key: FeatureKey | None = None, **rest: Any
    ) -> Result:
        """The result of an accuracy with its interval, hits and settings; ``key`` None: ``main_key``."""
        known = {"ci95": score.ci95, "correct": score.correct, "settings": shown, **rest}
        return self.result(protocol, name, key or self.main_key, score.accuracy, **known)
