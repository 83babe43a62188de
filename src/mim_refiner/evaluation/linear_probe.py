"""Linear probe: a grid of learning rates and feature sets on frozen features, trained in one pass (method section 6).

All probes of a grid see the same batches behind the same BatchNorm (it has no parameters of its own, so features that
several sets share are normalised once). The weights of all learning rates on one set lie side by side in one matrix
[D, R * C]: a step of the whole grid is two matrix products a set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mim_refiner.core.device import free_memory
from mim_refiner.core.schedules import peak_learning_rate, warmup_cosine
from mim_refiner.evaluation.features import FeatureKey, Features
from mim_refiner.evaluation.knn import AccuracyScore, required_labels
from mim_refiner.evaluation.splits import stratified_split
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

_PREDICTED_ROWS = 8192  # at a time
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


class LinearProbeSettings(ProbeSettings):
    """The paper's values, except that by default features are computed once, from centre crops.

    With ``augment`` every epoch sees new crops (of ``crop_scale`` of the image's area) and flips, as in the paper: one
    forward pass an epoch. ``learning_rates`` are for 256 images a step and scale with the batch. ``held_out`` is the
    share of train that rate and feature set are selected on and no probe trains on; 0 trains on everything and only
    reports the best on test. ``last`` > 1 adds the concatenation of that many last blocks, ``concatenate`` that of
    class token and mean patch.
    """

    learning_rates: Rates = LEARNING_RATES
    batch_size: BatchSize = 1024  # or the whole train set when that is smaller
    momentum: Decay = 0.9
    held_out: Decay = 0.1
    last: NonNegativeInt = 4
    concatenate: bool = True
    augment: bool = False
    crop_scale: tuple[Share, Share] = (0.08, 1.0)


@dataclass(frozen=True)
class LinearProbeScore:
    """Test accuracies of one grid. ``best`` is selected on the test set, as the paper does, and so is optimistic."""

    best: AccuracyScore
    best_rate: float
    selected: AccuracyScore | None  # rate selected on the held-out part of train; None with held_out=0
    selected_rate: float | None
    by_rate: tuple[float, ...]  # test accuracy of every rate
    held_out_accuracy: float | None = None  # of the selected rate


def linear_probe(
    train: Features,
    test: Features,
    settings: LinearProbeSettings | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[FeatureKey, LinearProbeScore]:
    """Train and score the learning rates for every (block, pooling); see :func:`probe_sets`."""
    scores = probe_sets(train, test, [(key,) for key in train.keys], settings, seed=seed, device=device)
    return {feature_set[0]: score for feature_set, score in scores.items()}


def probe_sets(
    train: Features,
    test: Features,
    sets: Sequence[FeatureSet],
    settings: LinearProbeSettings | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    epoch_features: EpochFeatures | None = None,
) -> dict[FeatureSet, LinearProbeScore]:
    """Train every learning rate on every feature set, all at once, and score each set.

    ``epoch_features`` gives the training features of an epoch (augmented); by default they are ``train`` throughout.
    Raises DataError without labels.
    """
    settings, test_y = settings or LinearProbeSettings(), required_labels(test, "test")
    grid, labels, _, held = _fitted(train, sets, settings, int(test_y.max()) + 1, seed, device, epoch_features)
    on_test = _correct(grid, test, torch.arange(len(test)), test_y)
    on_held = _correct(grid, train, held, labels)
    return {
        feature_set: score_rates(on_test[:, number], on_held[:, number], settings.learning_rates)
        for number, feature_set in enumerate(sets)
    }


def _fitted(
    train: Features,
    sets: Sequence[FeatureSet],
    settings: LinearProbeSettings,
    classes: int,
    seed: int,
    device: torch.device | str,
    epoch_features: EpochFeatures | None = None,
) -> tuple[ProbeGrid, Tensor, Tensor, Tensor]:
    """(the grid for ``classes`` or more, labels of train, rows that it trained on, rows held out)."""
    labels = required_labels(train, "train")
    kept, held = map(torch.from_numpy, stratified_split(labels.numpy(), settings.held_out, seed))
    layout = Layout.of(sets, {key: train[key].shape[1] for feature_set in sets for key in feature_set})
    grid = ProbeGrid(layout, max(classes, int(labels.max()) + 1), settings, seed=seed, device=device)
    if epoch_features:
        grid.fit(lambda epoch: layout.rows(epoch_features(epoch), kept, grid.device), labels[kept])
    else:
        take = layout.rows(train, kept, grid.device)
        grid.fit(lambda _: take, labels[kept])
    return grid, labels, kept, held


def fitted_probe(
    train: Features, key: FeatureKey, settings: LinearProbeSettings, *, seed: int = 0, device: Any = "cpu"
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Train one (block, pooling) and return (features [N, D], classes that may occur or None) -> classes [N].

    The rate is the one that is best on the held-out part of train, on train itself when nothing is held out.
    """
    grid, labels, kept, held = _fitted(train, [(key,)], settings, 0, seed, device)
    rate = int(_correct(grid, train, held if len(held) else kept, labels)[:, 0].float().mean(0).argmax())
    return lambda x, present: grid.predict(x, classes=present)[:, 0, rate]


@dataclass(frozen=True)
class Layout:
    """The order of (block, pooling) in one matrix, such that most sets are a run of columns and need no copy."""

    keys: FeatureSet
    columns: tuple[slice | Tensor, ...]  # of every set
    widths: tuple[int, ...]

    @classmethod
    def of(cls, sets: Sequence[FeatureSet], dims: Mapping[FeatureKey, int]) -> Layout:
        """The paper's four sets are runs of [mean of last, class of last, other class tokens, other means]."""
        last = max(key[0] for feature_set in sets for key in feature_set)
        every = dict.fromkeys(key for feature_set in sets for key in feature_set)

        def place(key: FeatureKey) -> tuple[bool, bool, int]:
            return key[0] != last, (key[1] == "cls") == (key[0] == last), key[0]

        keys = tuple(sorted(every, key=place))
        start, starts = 0, {}
        for key in keys:
            starts[key], start = start, start + dims[key]
        columns: list[slice | Tensor] = []
        for feature_set in sets:
            chosen = sorted(feature_set, key=keys.index)
            index = torch.cat([torch.arange(starts[key], starts[key] + dims[key]) for key in chosen])
            run = int(index[-1]) - int(index[0]) + 1 == len(index)
            columns.append(slice(int(index[0]), int(index[-1]) + 1) if run else index)
        widths = tuple(sum(dims[key] for key in feature_set) for feature_set in sets)
        return cls(keys, tuple(columns), widths)

    def rows(self, features: Features, chosen: Tensor, device: torch.device, room: float | None = None) -> Take:
        """All features side by side of any of the ``chosen`` rows: numbers from 0 -> [rows, sum of dims].

        They lie on the device where they need no more than ``room`` bytes (None: half of what is free on a GPU), else
        they are put together and sent batch by batch.
        """

        def gather(rows: Tensor) -> Tensor:
            return torch.cat([features[key][chosen[rows]] for key in self.keys], 1)

        size = sum(len(chosen) * features[key].shape[1] * features[key].element_size() for key in self.keys)
        if room is None:
            room = 0.5 * free_memory(device) if device.type == "cuda" else 0.0
        if size > room:
            return lambda rows: gather(rows).to(device)
        held = torch.cat([gather(rows).to(device) for rows in torch.arange(len(chosen)).split(8192)])
        return lambda rows: held[rows.to(device)]


class ProbeGrid:
    """S feature sets times R linear classifiers of C classes behind one BatchNorm without affine parameters."""

    def __init__(
        self, layout: Layout, num_classes: int, settings: LinearProbeSettings, *, seed: int, device: torch.device | str
    ) -> None:
        self.layout, self.settings, self.seed, self.num_classes = layout, settings, seed, num_classes
        self.device = torch.device(device)
        self.rates = len(settings.learning_rates)
        self.columns = [part if isinstance(part, slice) else part.to(device) for part in layout.columns]
        dim = max(part.stop if isinstance(part, slice) else int(part.max()) + 1 for part in layout.columns)
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6).to(device)
        self.weights = []  # per set [D, R * C]
        for width in layout.widths:
            start = torch.randn(width, num_classes, generator=torch.Generator().manual_seed(seed)) * settings.init_std
            # the same start for every rate: the grid then differs in nothing else
            self.weights.append(start.repeat(1, self.rates).to(device))
        self.biases = [torch.zeros(self.rates * num_classes, device=device) for _ in layout.widths]

    @torch.no_grad()
    def fit(self, features: Callable[[int], Take], y: Tensor) -> None:
        """SGD on cross-entropy over the rows that ``features(epoch)`` gives; an incomplete last batch is dropped."""
        settings, y = self.settings, y.to(self.device)
        batch_size = min(settings.batch_size, len(y))
        steps = len(y) // batch_size
        pairs = zip(self.weights, self.biases, strict=True)
        velocities = [(torch.zeros_like(weight), torch.zeros_like(bias)) for weight, bias in pairs]
        self.norm.train()
        for step, rows in enumerate(shuffled(len(y), batch_size, settings.epochs, self.seed)):
            if step % steps == 0:
                take = features(step // steps)
            rates = [settings.rate(step, settings.epochs * steps, rate, batch_size) for rate in settings.learning_rates]
            columns = torch.tensor(rates, device=self.device).repeat_interleave(self.num_classes)  # [R * C]
            normed = self.norm(take(rows))
            targets = y[rows.to(self.device)]
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
    def predict(self, x: Tensor, *, classes: Tensor | None = None, chunk_size: int = _PREDICTED_ROWS) -> Tensor:
        """Classes [N, S, R] of features [N, D], on the CPU; only among ``classes`` when given."""
        barred = torch.zeros(self.num_classes, device=self.device)
        if classes is not None:
            barred.fill_(-torch.inf)[classes.to(self.device)] = 0
        self.norm.eval()
        parts = []
        for chunk in x.split(chunk_size):
            normed = self.norm(chunk.to(self.device))
            logits = [
                torch.addmm(bias, normed[:, columns], weight).view(len(chunk), self.rates, self.num_classes)
                for columns, weight, bias in zip(self.columns, self.weights, self.biases, strict=True)
            ]
            parts.append(torch.stack([(part + barred).argmax(2) for part in logits], dim=1).cpu())
        return torch.cat(parts)


def paper_sets(blocks: Sequence[int], poolings: Sequence[str], settings: LinearProbeSettings) -> list[FeatureSet]:
    """{class, class + mean} x {last block, last few}; what the encoder and ``poolings`` do not have is left out.

    ``blocks`` are the available ones; the grid uses the deepest.
    """
    firsts: list[tuple[str, ...]] = [("cls",) if "cls" in poolings else ("mean",)]
    if settings.concatenate and len(set(poolings)) > 1:
        firsts.append(("cls", "mean"))
    spans = dict.fromkeys((1, min(max(1, settings.last), len(blocks))))
    ordered = sorted(blocks)
    return [tuple((block, name) for block in ordered[-span:] for name in names) for span in spans for names in firsts]


def _correct(grid: ProbeGrid, features: Features, rows: Tensor, labels: Tensor) -> Tensor:
    """Whether each probe is right about each row, bool [rows, S, R]."""
    take = grid.layout.rows(features, rows, torch.device("cpu"))
    parts = torch.arange(len(rows)).split(_PREDICTED_ROWS)
    return torch.cat([grid.predict(take(part)) == labels[rows[part]][:, None, None] for part in parts])


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
