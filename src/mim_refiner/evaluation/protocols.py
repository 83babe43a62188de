"""The protocols behind one interface: features in, results out. A new protocol is one function and one table row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mim_refiner.core.metrics import effective_rank
from mim_refiner.data.loaders import default_crop_ratio
from mim_refiner.evaluation.clustering import clustering_protocol
from mim_refiner.evaluation.features import Features
from mim_refiner.evaluation.knn import knn_protocol
from mim_refiner.evaluation.linear_probe import linear_probe
from mim_refiner.evaluation.results import Result
from mim_refiner.evaluation.settings import EvaluationSettings

NEEDS_LABELS = ("knn", "linear", "clustering")
PROTOCOLS = (*NEEDS_LABELS, "rank")
RANK_ROWS = 10_000  # rows that the effective rank looks at


@dataclass(frozen=True)
class Context:
    """What the protocols share and every result repeats."""

    settings: EvaluationSettings
    seed: int
    device: torch.device
    data: Mapping[str, Any]
    model_sha256: str | None

    def result(
        self, protocol: str, metric: str, features: Features, key: tuple[int, str], value: float, **rest: Any
    ) -> Result:
        size = self.settings.image_size
        transform = {"image_size": size, "crop_ratio": None if size is None else default_crop_ratio(size)}
        settings = {**transform, "precision": self.settings.precision, **rest.pop("settings")}
        return Result(
            protocol=protocol,
            metric=metric,
            value=value,
            block=key[0],
            pooling=key[1],
            norm=features.norm,
            settings=settings,
            data=self.data,
            model_sha256=self.model_sha256,
            seed=self.seed,
            **{"ci95": None, **rest},
        )


def _knn(train: Features, test: Features, context: Context) -> list[Result]:
    options = {"k": context.settings.knn_k, "temperature": context.settings.knn_temperature, "standardize": True}
    scores = knn_protocol(train, test, device=context.device, **options)  # type: ignore[arg-type]
    return [
        context.result(
            "knn", "knn_top1", test, key, score.accuracy, ci95=score.ci95, correct=score.correct, settings=options
        )
        for key, score in scores.items()
    ]


def _linear(train: Features, test: Features, context: Context) -> list[Result]:
    options = dataclasses.asdict(context.settings.linear)
    results = []
    for key, score in linear_probe(
        train, test, context.settings.linear, seed=context.seed, device=context.device
    ).items():
        grid = {**options, "accuracy_by_rate": score.by_rate}
        chosen = [("linear_top1_best", score.best, score.best_rate, "best on test")]
        if score.selected is not None:
            chosen.append(
                ("linear_top1", score.selected, score.selected_rate or 0.0, "best on a held-out part of train")
            )
        for metric, accuracy, rate, selection in chosen:
            shown = {**grid, "selection": selection, "selected_rate": rate}
            results.append(
                context.result(
                    "linear",
                    metric,
                    test,
                    key,
                    accuracy.accuracy,
                    ci95=accuracy.ci95,
                    correct=accuracy.correct,
                    settings=shown,
                )
            )
    return results


def _clustering(_: Features, test: Features, context: Context) -> list[Result]:
    results = []
    for key, score in clustering_protocol(test, num_seeds=context.settings.cluster_seeds, seed=context.seed).items():
        options = {
            "algorithm": "mini-batch k-means",
            "clusters": len(np.unique(test.labels)) if test.labels is not None else 0,
            "seeds": context.settings.cluster_seeds,
            "features": "standardised, L2-normalised",
            "inertia": score.inertia,
        }
        results += [
            context.result(
                "clustering",
                "cluster_accuracy",
                test,
                key,
                score.accuracy,
                ci95=score.ci95,
                correct=score.correct,
                settings=options,
            ),
            context.result("clustering", "nmi", test, key, score.nmi, settings=options),
            context.result("clustering", "ari", test, key, score.ari, settings=options),
        ]
    return results


def _rank(train: Features, _: Features, context: Context) -> list[Result]:
    rows = np.sort(np.random.default_rng(context.seed).permutation(len(train))[:RANK_ROWS])
    options = {"rows": len(rows), "features": "raw, of train"}
    return [
        context.result("rank", "rank", train, key, effective_rank(train[key][rows]), settings=options)
        for key in train.keys
    ]


RUNNERS: dict[str, Callable[[Features, Features, Context], list[Result]]] = {
    "knn": _knn,
    "linear": _linear,
    "clustering": _clustering,
    "rank": _rank,
}
