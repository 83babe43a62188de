"""Linear probe: a grid of learning rates on frozen features, trained in one pass (method section 6).

All probes of a grid see the same batches, so their weights lie side by side in one matrix [D, R * C] and a step of the
whole grid is two matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from mim_refiner.core.schedules import peak_learning_rate, warmup_cosine
from mim_refiner.errors import InputError
from mim_refiner.evaluation.features import FeatureKey, Features
from mim_refiner.evaluation.knn import AccuracyScore, required_labels
from mim_refiner.evaluation.splits import stratified_split

LEARNING_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class LinearProbeSettings:
    """The paper's values, except that features are computed once: no augmentation (``augment`` is always False).

    ``learning_rates`` are for 256 images a step and scale with the batch. ``held_out`` is the share of train that the
    rate is selected on and no probe trains on; 0 trains on everything and only reports the best on test.
    """

    learning_rates: Sequence[float] = LEARNING_RATES
    epochs: int = 50
    batch_size: int = 1024  # or the whole train set when that is smaller
    momentum: float = 0.9
    warmup: float = 0.1  # share of all steps
    end_rate: float = 1e-6
    init_std: float = 0.01
    held_out: float = 0.1
    augment: bool = field(default=False, init=False)


@dataclass(frozen=True)
class LinearProbeScore:
    """Test accuracies of one grid. ``best`` is selected on the test set, as the paper does, and so is optimistic."""

    best: AccuracyScore
    best_rate: float
    selected: AccuracyScore | None  # rate selected on the held-out part of train; None with held_out=0
    selected_rate: float | None
    by_rate: tuple[float, ...]  # test accuracy of every rate


def linear_probe(
    train: Features,
    test: Features,
    settings: LinearProbeSettings | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[FeatureKey, LinearProbeScore]:
    """Train and score one grid for every (block, pooling).

    Raises DataError without labels, InputError for unusable settings.
    """
    settings = settings or LinearProbeSettings()
    _check(settings)
    labels, test_y = required_labels(train, "train"), required_labels(test, "test")
    kept, held = torch.arange(len(labels)), torch.arange(0)
    if settings.held_out > 0:
        kept, held = map(torch.from_numpy, stratified_split(labels.numpy(), settings.held_out, seed))
    num_classes = int(torch.cat([labels, test_y]).max()) + 1
    scores = {}
    for key in train.keys:
        x = train[key]
        grid = ProbeGrid(x.shape[1], num_classes, settings, seed=seed, device=device)
        grid.fit(x[kept], labels[kept])
        on_test = grid.predict(test[key]) == test_y[:, None]
        on_held_out = grid.predict(x[held]) == labels[held][:, None] if len(held) else None
        scores[key] = _score(on_test, on_held_out, settings.learning_rates)
    return scores


class ProbeGrid:
    """R linear classifiers of C classes behind one BatchNorm without affine parameters."""

    def __init__(
        self, dim: int, num_classes: int, settings: LinearProbeSettings, *, seed: int, device: torch.device | str
    ) -> None:
        self.settings, self.seed, self.device, self.num_classes = settings, seed, torch.device(device), num_classes
        self.num_probes = len(settings.learning_rates)
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6).to(device)
        start = torch.randn(dim, num_classes, generator=torch.Generator().manual_seed(seed)) * settings.init_std
        # the same start for every rate: the grid then differs in nothing else
        self.weight = start.repeat(1, self.num_probes).to(device)  # [D, R * C]
        self.bias = torch.zeros(self.num_probes * num_classes, device=device)

    @torch.no_grad()
    def fit(self, x: Tensor, y: Tensor) -> None:
        """SGD on cross-entropy over features [N, D], labels [N]; the incomplete last batch of an epoch is dropped."""
        settings = self.settings
        x, y = x.to(self.device), y.to(self.device)
        batch_size = min(settings.batch_size, len(x))
        steps = len(x) // batch_size
        total = settings.epochs * steps
        velocity = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        generator = torch.Generator().manual_seed(self.seed)
        self.norm.train()
        for step in range(total):
            if step % steps == 0:
                order = torch.randperm(len(x), generator=generator).to(self.device)
            rows = order[(step % steps) * batch_size : (step % steps + 1) * batch_size]
            self._step(x[rows], y[rows], self._rates(step, total, batch_size), velocity)

    def _step(self, x: Tensor, y: Tensor, rates: Tensor, velocity: tuple[Tensor, Tensor]) -> None:
        normed = self.norm(x)
        logits = torch.addmm(self.bias, normed, self.weight).view(len(x), self.num_probes, self.num_classes)
        # gradient of the mean cross-entropy: (softmax - one-hot) / B
        error = logits.softmax(2)
        error[torch.arange(len(x), device=x.device), :, y] -= 1
        error = error.div_(len(x)).view(len(x), -1)
        for parameter, gradient, moving in zip(
            (self.weight, self.bias), (normed.T @ error, error.sum(0)), velocity, strict=True
        ):
            moving.mul_(self.settings.momentum).add_(gradient)
            parameter.addcmul_(moving, rates, value=-1)

    def _rates(self, step: int, total: int, batch_size: int) -> Tensor:
        """Learning rate of every column of the weights, [R * C]."""
        settings = self.settings
        warmup = round(settings.warmup * total)
        rates = [
            warmup_cosine(
                step,
                total_steps=total,
                warmup_steps=warmup,
                peak=peak_learning_rate(rate, batch_size),
                end=settings.end_rate,
            )
            for rate in settings.learning_rates
        ]
        return torch.tensor(rates, device=self.device).repeat_interleave(self.num_classes)

    @torch.no_grad()
    def predict(self, x: Tensor, *, chunk_size: int = 8192) -> Tensor:
        """Classes [N, R] of features [N, D], on the CPU."""
        self.norm.eval()
        parts = []
        for chunk in x.split(chunk_size):
            logits = torch.addmm(self.bias, self.norm(chunk.to(self.device)), self.weight)
            parts.append(logits.view(len(chunk), self.num_probes, self.num_classes).argmax(2).cpu())
        return torch.cat(parts)


def _score(on_test: Tensor, on_held_out: Tensor | None, rates: Sequence[float]) -> LinearProbeScore:
    """Pick columns of [N, R] booleans; among equals the smallest rate wins."""
    accuracy = on_test.float().mean(0)
    best = int(np.argmax(accuracy.numpy()))
    selected = None if on_held_out is None else int(np.argmax(on_held_out.float().mean(0).numpy()))
    return LinearProbeScore(
        best=AccuracyScore.of(on_test[:, best]),
        best_rate=rates[best],
        selected=None if selected is None else AccuracyScore.of(on_test[:, selected]),
        selected_rate=None if selected is None else rates[selected],
        by_rate=tuple(on_test.double().mean(0).tolist()),
    )


def _check(settings: LinearProbeSettings) -> None:
    rates = list(settings.learning_rates)
    if not rates or sorted(rates) != rates or rates[0] <= 0:
        raise InputError(f"linear probe: learning_rates must be positive and ascending, got {rates}")
    if settings.epochs < 1 or settings.batch_size < 2:
        raise InputError(
            "linear probe: epochs must be at least 1 and batch_size at least 2, "
            f"got {settings.epochs} and {settings.batch_size}"
        )
    if not 0 <= settings.held_out < 1 or not 0 <= settings.warmup <= 1:
        raise InputError(
            f"linear probe: held_out {settings.held_out} and warmup {settings.warmup} must be shares below 1"
        )
