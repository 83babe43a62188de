"""What one evaluation hands to every protocol: the encoder, the images, their features, and how to report a number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import default_crop_ratio
from mim_refiner.data.name_lists import NameList
from mim_refiner.evaluation.cache import FeatureCache
from mim_refiner.evaluation.features import FeatureKey, Features, extract_features
from mim_refiner.evaluation.finetune import LabelledRows
from mim_refiner.evaluation.knn import AccuracyScore
from mim_refiner.evaluation.results import Result
from mim_refiner.evaluation.settings import EvaluationSettings
from mim_refiner.models.backbone import Backbone


@dataclass(frozen=True)
class Job:
    """One encoder on one pair of image sets.

    ``train`` and ``test`` hold the features of all blocks that any protocol of this run needs, ``blocks`` the ones to
    report; ``test_images`` is the train set itself when a part of it is held out. ``shifted``: further labelled test
    sets by name, for robustness. ``lists``: published splits of the train images by their files.
    """

    backbone: Backbone
    train_images: ImageSet
    test_images: ImageSet
    train: Features
    test: Features
    blocks: tuple[int, ...]
    poolings: tuple[str, ...]
    norm: bool
    settings: EvaluationSettings
    run: Run
    data: Mapping[str, Any]
    model_sha256: str | None
    cache: FeatureCache | None = None
    shifted: Mapping[str, tuple[ImageSet, torch.Tensor | None]] | None = None
    lists: Mapping[str, NameList] = field(default_factory=dict)

    def of_blocks(self, features: Features) -> Features:
        """Only the blocks to report."""
        return replace(features, values={key: value for key, value in features.values.items() if key[0] in self.blocks})

    def last_blocks(self, count: int) -> tuple[int, ...]:
        """The deepest ``count`` blocks that there are features of."""
        return tuple(sorted({key[0] for key in self.train.keys})[-count:])

    @property
    def main_key(self) -> FeatureKey:
        """The deepest block to report and the first pooling: where a protocol that measures one thing looks."""
        return max(self.blocks), self.poolings[0]

    def features_of(self, images: ImageSet, rows: NDArray[np.int64] | torch.Tensor | None, **options: Any) -> Features:
        """Extract (or find) features with this job's settings; ``options`` as of ``extract_features``."""
        return extract_features(
            self.backbone,
            images,
            norm=self.norm,
            image_size=self.settings.image_size,
            batch_size=self.settings.batch_size,
            run=self.run,
            indices=rows,
            **{"poolings": self.poolings, "cache": self.cache, **options},
        )

    def listed(self, path: str) -> NDArray[np.int64]:
        """Rows of the train features that a published split names."""
        return np.flatnonzero(np.isin(self.train.indices.numpy(), self.lists[path].rows))

    def labelled(self) -> tuple[LabelledRows, LabelledRows]:
        """The images of train and test with their class numbers."""
        return LabelledRows.of(self.train_images, self.train), LabelledRows.of(self.test_images, self.test)

    def _data(self) -> dict[str, Any]:
        """The data of a result, with the images that turned out to be unreadable by now."""
        sets = {"train": self.train_images, "test": self.test_images}
        return {part: {**facts, **sets[part].unreadable_facts()} if "images" in facts else facts
                for part, facts in self.data.items()}  # fmt: skip

    def result(self, protocol: str, metric: str, key: FeatureKey, value: float, **rest: Any) -> Result:
        """A result with all that this job repeats; ``rest``: settings, and ci95, correct, confusions where known."""
        size = self.settings.image_size
        transform = {"image_size": size, "crop_ratio": None if size is None else default_crop_ratio(size)}
        rest["settings"] = {**transform, "precision": self.settings.precision, **rest["settings"]}
        known = {"ci95": None, "norm": self.norm, "data": self._data(), "model_sha256": self.model_sha256}
        return Result(protocol, metric, float(value), block=key[0], pooling=key[1], seed=self.run.seed, **known | rest)

    def accuracy(
        self, protocol: str, metric: str, score: AccuracyScore, shown: Mapping[str, Any], key: FeatureKey | None = None
    ) -> Result:
        """The result of an accuracy with its interval, hits and settings; ``key`` None: ``main_key``."""
        known = {"ci95": score.ci95, "correct": score.correct, "settings": shown}
        return self.result(protocol, metric, key or self.main_key, score.accuracy, **known)
