"""Robustness protocol: classifiers made from clean training features, tested on corrupted or shifted images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, Field
from torch import Tensor

from mim_refiner.core.knn import knn_predict
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import eval_batches
from mim_refiner.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from mim_refiner.evaluation.features import FeatureKey, Features, ImageTransform
from mim_refiner.evaluation.knn import required_labels
from mim_refiner.evaluation.linear_probe import LinearProbeSettings, fitted_probe
from mim_refiner.settings import FrozenSettings, Listed, PositiveInt, one_of

_Kind = Annotated[str, AfterValidator(one_of(CORRUPTIONS))]
_Severity = Annotated[int, Field(ge=min(SEVERITIES), le=max(SEVERITIES))]
Predict = Callable[[Tensor, Tensor | None], Tensor]  # (features [N, D], classes that may occur or None) -> classes [N]


class RobustnessSettings(FrozenSettings):
    """``images``: at most so many test images, evenly spaced (None: all). ``classifiers``: knn, linear or both."""

    kinds: Annotated[tuple[_Kind, ...], Field(min_length=1), Listed] = tuple(CORRUPTIONS)
    severities: Annotated[tuple[_Severity, ...], Field(min_length=1), Listed] = SEVERITIES
    classifiers: Annotated[tuple[Literal["knn", "linear"], ...], Field(min_length=1), Listed] = ("knn", "linear")
    images: PositiveInt | None = None


def corrupted(kind: str, severity: int, seed: int) -> ImageTransform:
    """Centre crops with one corruption."""

    def batches(
        images: ImageSet, size: int, batch_size: int, indices: NDArray[np.int64] | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for batch, positions in eval_batches(images, size, batch_size, indices=indices):
            yield corrupt(batch, positions, kind, severity, seed), positions

    return ImageTransform(f"corruption {kind} {severity} seed {seed}", batches)


def classifiers(
    train: Features,
    key: FeatureKey,
    names: Sequence[str],
    *,
    k: int,
    temperature: float,
    linear: LinearProbeSettings,
    seed: int,
    device: torch.device | str,
) -> dict[str, Predict]:
    """Fit the named classifiers on the clean train features of one (block, pooling).

    A predictor that is told which classes occur (ImageNet-A and -R hold 200 of 1000) chooses among those.
    """
    labels = required_labels(train, "train")
    made: dict[str, Predict] = {}
    if "knn" in names:
        made["knn"] = partial(_knn, train[key].to(device), labels.to(device), k, temperature)
    if "linear" in names:
        made["linear"] = fitted_probe(train, key, linear, seed=seed, device=device)
    return made


def score_sets(
    predictors: dict[str, Predict], key: FeatureKey, sets: Iterable[tuple[str, Features]], device: torch.device | str
) -> dict[str, dict[str, NDArray[np.bool_]]]:
    """{classifier: {set name: correct [N]}} for named labelled feature sets."""
    found: dict[str, dict[str, NDArray[np.bool_]]] = {name: {} for name in predictors}
    for set_name, features in sets:
        truth = required_labels(features, set_name)
        present = truth.unique()
        for name, predict in predictors.items():
            found[name][set_name] = (predict(features[key].to(device), present).cpu() == truth).numpy()
    return found


def _knn(bank: Tensor, labels: Tensor, k: int, temperature: float, x: Tensor, present: Tensor | None) -> Tensor:
    if present is not None and len(present) < len(labels.unique()):
        chosen = torch.isin(labels, present.to(labels.device))
        bank, labels = bank[chosen], labels[chosen]
    return knn_predict(bank, labels, x, k=min(k, len(labels)), temperature=temperature)
