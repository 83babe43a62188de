"""Linear probe: a grid of learning rates and feature sets on frozen features, trained in one pass (method section 6).

All probes of a grid see the same batches behind the same BatchNorm (it has no parameters of its own, so features that
several sets share are normalised once). The weights of all learning rates on one set lie side by side in one matrix
[D, R * C]: a step of the whole grid is two matrix products a set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mim_refiner.core.device import free_memory
from mim_refiner.core.run import Run
from mim_refiner.core.schedules import peak_learning_rate, warmup_cosine
from mim_refiner.evaluation.features import FeatureKey, Features
from mim_refiner.evaluation.knn import AccuracyScore, required_labels
from mim_refiner.evaluation.splits import stratified_folds, stratified_split
from mim_refiner.settings import (
    BatchSize,
    Decay,
    FrozenSettings,
    NonNegative,
    NonNegativeInt,
    PositiveInt,
    Rates,
    Share,
)

LEARNING_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.3, 0.5)

ENOUGH_HELD_OUT = 1000  # images; the accuracy of fewer is known to 1.6 points at best, rates differ by less
FOLDS = 3
_PREDICTED_ROWS = 8192  # put together at a time
FeatureSet = tuple[FeatureKey, ...]  # (block, pooling) whose features are concatenated
EpochFeatures = Callable[[int], Features]  # the train features of an epoch, in the row order of the train set
Take = Callable[[Tensor], Tensor]  # row numbers on the CPU -> features [rows, D] on the device


class ProbeSettings(FrozenSettings):
    """What the training of every probe has: a linear warm-up, then half a cosine, over all epochs."""

    epochs: PositiveInt = 50
    warmup: Share = 0.1  # share of all steps
    end_rate: NonNegative = 1e-6
    init_std: NonNegative = 0.01

    def rate(self, step: int, total: int, base: float, batch_size: int) -> float:
        """Learning rate of one of ``total`` steps; ``base`` is for 256 samples a step."""
        peak = peak_learning_rate(base, batch_size)
        warmup = round(self.warmup * total)
        return warmup_cosine(step, total_steps=total, warmup_steps=warmup, peak=peak, end=self.end_rate)


class SelectedSettings(ProbeSettings):
    """Of a probe whose learning rate is selected on ``held_out`` of the training images, a share; 0 trains on all.

    Fewer than ``ENOUGH_HELD_OUT`` images would select by luck: there each of ``FOLDS`` parts is held out once, and the
    probe that is scored trains on everything.
    """

    held_out: Decay = 0.1

    def cross_validates(self, images: int) -> bool:
        """Whether a held-out share of so many training images would be too few to select on."""
        return 0 < self.held_out * images < ENOUGH_HELD_OUT

    def selection(self, images: int, *, augmented: bool = False) -> str:
        """What rate (and feature set) are selected by on so many training images, for a record."""
        if not augmented and self.cross_validates(images):
            return f"best by {FOLDS}-fold cross-validation on train"
        return "best on a held-out part of train" if self.held_out else "best on train itself"

    def parts(
        self, labels: NDArray[np.int64], seed: int, *, augmented: bool = False
    ) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """[(rows to train on, rows to select on)] of a probe each; the last one is scored. DataError for too few."""
        if augmented or not self.cross_validates(len(labels)):
            return [stratified_split(labels, self.held_out, seed)]
        folds = stratified_folds(labels, FOLDS, seed)
        parts = [(np.concatenate([other for other in folds if other is not held]), held) for held in folds]
        return [*parts, (np.arange(len(labels)), np.arange(0))]


class LinearProbeSettings(SelectedSettings):
    """The paper's values, except that by default features are computed once, from centre crops.

    With ``augment`` every epoch sees new crops (of ``crop_scale`` of the image's area) and flips, as in the paper: one
    forward pass an epoch, and no cross-validation. ``learning_rates`` are for 256 images a step and scale with the
    batch. ``last`` > 1 adds the concatenation of that many last blocks, ``concatenate`` that of class token and mean
    patch.
    """

    learning_rates: Rates = LEARNING_RATES
    batch_size: BatchSize = 1024  # or the whole train set when that is smaller
    momentum: Decay = 0.9
    last: NonNegativeInt = 4
    concatenate: bool = True
    augment: bool = False
    crop_scale: tuple[Share, Share] = (0.08, 1.0)


@dataclass(frozen=True)
class LinearProbeScore:
    """Test accuracies of one grid. ``best`` is selected on the test set, as the paper does, and so is optimistic."""

    best: AccuracyScore
    best_rate: float
    selected: AccuracyScore | None  # rate selected on held-out images of train; None with held_out=0
    selected_rate: float | None
    by_rate: tuple[float, ...]  # test accuracy of every rate
    held_out_accuracy: float | None = None  # of the selected rate


def linear_probe(
    train: Features, test: Features, settings: LinearProbeSettings | None = None, run: Run | None = None
) -> dict[FeatureKey, LinearProbeScore]:
    """Train and score the learning rates for every (block, pooling); see :func:`probe_sets`."""
    scores = probe_sets(train, test, [(key,) for key in train.keys], settings, run)
    return {feature_set[0]: score for feature_set, score in scores.items()}


def probe_sets(
    train: Features,
    test: Features,
    sets: Sequence[FeatureSet],
    settings: LinearProbeSettings | None = None,
    run: Run | None = None,
    epoch_features: EpochFeatures | None = None,
) -> dict[FeatureSet, LinearProbeScore]:
    """Train every learning rate on every feature set, all at once, and score each set.

    ``epoch_features`` gives the training features of an epoch (augmented); by default they are ``train`` throughout.
    Raises DataError without labels.
    """
    settings, truth = settings or LinearProbeSettings(), required_labels(test, "test")
    classes = int(truth.max()) + 1
    grid, on_held = _fitted(train, sets, settings, run or Run(), classes, epoch_features)
    on_test = grid.correct(test, torch.arange(len(test)), truth)
    return {
        feature_set: score_rates(on_test[:, number], on_held[:, number], settings.learning_rates)
        for number, feature_set in enumerate(sets)
    }


def _fitted(
    train: Features,
    sets: Sequence[FeatureSet],
    settings: LinearProbeSettings,
    run: Run,
    classes: int = 0,
    epoch_features: EpochFeatures | None = None,
) -> tuple[ProbeGrid, Tensor]:
    """(the grid for ``classes`` or more, whether each probe is right about images that it is selected on [N, S, R])."""
    labels, right = required_labels(train, "train"), []

    def fitted(rows: Tensor) -> ProbeGrid:
        grid = ProbeGrid(sets, train, max(classes, int(labels.max()) + 1), settings, run)
        if epoch_features:
            grid.fit(lambda epoch: grid.rows(epoch_features(epoch), rows), labels[rows])
        else:
            take = grid.rows(train, rows)
            grid.fit(lambda _: take, labels[rows])
        return grid

    for kept, held in settings.parts(labels.numpy(), run.seed, augmented=epoch_features is not None):
        grid = fitted(torch.from_numpy(kept))
        right.append(grid.correct(train, torch.from_numpy(held), labels))
    return grid, torch.cat(right)


def fitted_probe(
    train: Features, key: FeatureKey, settings: LinearProbeSettings, run: Run
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Train one (block, pooling) and return (features [N, D], classes that may occur or None) -> classes [N].

    The rate is selected as for the probe, on train itself when nothing is held out.
    """
    grid, right = _fitted(train, [(key,)], settings, run)
    if not len(right):
        right = grid.correct(train, torch.arange(len(train)), required_labels(train, "train"))
    rate = int(right[:, 0].float().mean(0).argmax())
    return lambda x, present: grid.predict(x, present)[:, 0, rate]


class ProbeGrid:
    """S feature sets times R linear classifiers of C classes behind one BatchNorm without affine parameters.

    All features lie side by side in the order of ``keys``: mean of the last block, its class token, other class tokens,
    other means. The paper's four sets are runs of ``columns`` in it, which need no copy.
    """

    def __init__(
        self, sets: Sequence[FeatureSet], features: Features, num_classes: int, settings: LinearProbeSettings, run: Run
    ) -> None:
        self.settings, self.run, self.num_classes = settings, run, num_classes
        self.rates = len(settings.learning_rates)
        dims = {key: features[key].shape[1] for feature_set in sets for key in feature_set}
        deepest = max(block for block, _ in dims)
        self.keys = sorted(dims, key=lambda key: (key[0] != deepest, (key[1] == "cls") == (key[0] == deepest), key[0]))
        parts = torch.arange(sum(dims.values())).split([dims[key] for key in self.keys])
        self.norm = nn.BatchNorm1d(sum(dims.values()), affine=False, eps=1e-6).to(run.device)
        self.columns: list[slice | Tensor] = []  # of every set
        self.weights, self.biases = [], []  # per set [D, R * C], [R * C]
        for feature_set in sets:
            index = torch.cat([part for key, part in zip(self.keys, parts, strict=True) if key in feature_set])
            first, end = int(index[0]), int(index[-1]) + 1
            self.columns.append(slice(first, end) if end - first == len(index) else index.to(run.device))
            generator = torch.Generator().manual_seed(run.seed)
            start = torch.randn(len(index), num_classes, generator=generator) * settings.init_std
            # the same start for every rate: the grid then differs in nothing else
            self.weights.append(start.repeat(1, self.rates).to(run.device))
            self.biases.append(torch.zeros(self.rates * num_classes, device=run.device))

    def rows(self, features: Features, chosen: Tensor, room: float | None = None) -> Take:
        """All features side by side of any of the ``chosen`` rows: numbers from 0 -> [rows, sum of dims].

        They lie on the device where they need no more than ``room`` bytes (None: half of what is free on a GPU), else
        they are put together and sent batch by batch.
        """
        device = self.run.device
        size = sum(len(chosen) * features[key].shape[1] * features[key].element_size() for key in self.keys)
        if room is None:
            room = 0.5 * free_memory(device) if device.type == "cuda" else 0.0
        if size > room:
            return lambda rows: self._gathered(features, chosen[rows]).to(device)
        held = torch.cat([self._gathered(features, part).to(device) for part in chosen.split(_PREDICTED_ROWS)])
        return lambda rows: held[rows.to(device)]

    def _gathered(self, features: Features, rows: Tensor) -> Tensor:
        return torch.cat([features[key][rows] for key in self.keys], 1)

    @torch.no_grad()
    def fit(self, features: Callable[[int], Take], y: Tensor) -> None:
        """SGD on cross-entropy over the rows that ``features(epoch)`` gives; an incomplete last batch is dropped."""
        settings, device, y = self.settings, self.run.device, y.to(self.run.device)
        batch_size = min(settings.batch_size, len(y))
        steps = len(y) // batch_size
        pairs = zip(self.weights, self.biases, strict=True)
        velocities = [(torch.zeros_like(weight), torch.zeros_like(bias)) for weight, bias in pairs]
        self.norm.train()
        for step, rows in enumerate(shuffled(len(y), batch_size, settings.epochs, self.run.seed)):
            if step % steps == 0:
                take = features(step // steps)
            rates = [settings.rate(step, settings.epochs * steps, rate, batch_size) for rate in settings.learning_rates]
            columns = torch.tensor(rates, device=device).repeat_interleave(self.num_classes)  # [R * C]
            normed = self.norm(take(rows))
            targets = y[rows.to(device)]
            for number, velocity in enumerate(velocities):
                self._step(number, normed[:, self.columns[number]], targets, columns, velocity)

    def _step(self, number: int, normed: Tensor, y: Tensor, rates: Tensor, velocity: tuple[Tensor, Tensor]) -> None:
        weight, bias = self.weights[number], self.biases[number]
        error = torch.addmm(bias, normed, weight).view(-1, self.num_classes).softmax(1)
        # gradient of the mean cross-entropy: (softmax - one-hot) / B
        error = error.view(len(y), self.rates, self.num_classes)
        error[torch.arange(len(y), device=y.device), :, y] -= 1
        error = error.div_(len(y)).view(len(y), -1)
        for parameter, gradient, moving in zip((weight, bias), (normed.T @ error, error.sum(0)), velocity, strict=True):
            moving.mul_(self.settings.momentum).add_(gradient)
            parameter.addcmul_(moving, rates, value=-1)

    @torch.no_grad()
    def predict(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """Classes [N, S, R] of features [N, D], on the CPU; only among ``classes`` when given."""
        barred = torch.zeros(self.num_classes, device=self.run.device)
        if classes is not None:
            barred.fill_(-torch.inf)[classes.to(self.run.device)] = 0
        self.norm.eval()
        parts = []
        for chunk in x.split(_PREDICTED_ROWS):
            normed = self.norm(chunk.to(self.run.device))
            logits = [
                torch.addmm(bias, normed[:, columns], weight).view(len(chunk), self.rates, self.num_classes)
                for columns, weight, bias in zip(self.columns, self.weights, self.biases, strict=True)
            ]
            parts.append(torch.stack([(part + barred).argmax(2) for part in logits], dim=1).cpu())
        return torch.cat(parts)

    def correct(self, features: Features, rows: Tensor, labels: Tensor) -> Tensor:
        """Whether each probe is right about each of ``rows``, bool [rows, S, R]."""
        parts = rows.split(_PREDICTED_ROWS)
        found = [self.predict(self._gathered(features, part)) == labels[part][:, None, None] for part in parts]
        return torch.cat(found)


def paper_sets(blocks: Sequence[int], poolings: Sequence[str], settings: LinearProbeSettings) -> list[FeatureSet]:
    """{class, class + mean} x {deepest, last few of the available ``blocks``}, as far as the encoder has them."""
    firsts: list[tuple[str, ...]] = [("cls",) if "cls" in poolings else ("mean",)]
    if settings.concatenate and len(set(poolings)) > 1:
        firsts.append(("cls", "mean"))
    spans = dict.fromkeys((1, min(max(1, settings.last), len(blocks))))
    ordered = sorted(blocks)
    return [tuple((block, name) for block in ordered[-span:] for name in names) for span in spans for names in firsts]


def score_rates(on_test: Tensor, on_held_out: Tensor, rates: Sequence[float]) -> LinearProbeScore:
    """Pick columns of [N, R] booleans; among equals the smallest rate wins."""
    by_rate = on_test.double().mean(0).tolist()
    best = int(np.argmax(by_rate))
    score = LinearProbeScore(AccuracyScore.of(on_test[:, best]), rates[best], None, None, tuple(by_rate))
    if not len(on_held_out):
        return score
    held = on_held_out.double().mean(0).tolist()
    chosen = int(np.argmax(held))
    selected = AccuracyScore.of(on_test[:, chosen])
    return replace(score, selected=selected, selected_rate=rates[chosen], held_out_accuracy=held[chosen])


def shuffled(count: int, batch_size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Row numbers of every batch of every epoch; an incomplete last one is dropped."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        yield from order[: count // batch_size * batch_size].split(batch_size)
