"""Fine-tuning protocol: the whole encoder and a new classifier, on all or a share of the labels (method section 6)."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import AfterValidator, BeforeValidator, Field
from timm.data import Mixup, create_transform, rand_augment_transform
from timm.layers import DropPath
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose

from mim_refiner.core.layer_decay import layer_decay_scales
from mim_refiner.core.modules import evaluation_mode
from mim_refiner.core.optim import parameter_groups, set_learning_rate
from mim_refiner.core.run import Run
from mim_refiner.core.schedules import peak_learning_rate, warmup_cosine
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import eval_batches
from mim_refiner.data.workers import watched, worker_count
from mim_refiner.errors import InputError
from mim_refiner.evaluation.features import Features, inputs_of, resolve_poolings
from mim_refiner.evaluation.knn import AccuracyScore, required_labels
from mim_refiner.evaluation.splits import first_of_classes
from mim_refiner.models.backbone import Backbone
from mim_refiner.settings import (
    BatchSize,
    Decay,
    Files,
    FrozenSettings,
    Listed,
    NonNegative,
    Positive,
    PositiveInt,
    Share,
    one_of,
)
from mim_refiner.types import BackboneInfo, ImageSize, height_width

# Fine-tuning on 1 % and 10 % of the labels as published, by the size of the encoder. ViT-L, H and 2B: the
# configurations of github.com/ml-jku/MIM-Refiner (finetune_1p, finetune_10p) for refined encoders; ViT-B, which they
# lack: Semi-ViT's supervised stage (arXiv 2208.05688, github.com/amazon-science/semi-vit). Rates are for 256 images a
# step. What "minimal augmentation" holds there is not in the repository: taken as crop and flip.
_PLAIN = {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "drop_path": 0.0}
_MINIMAL = {**_PLAIN, "randaugment": ""}
_MIXED = {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.25}
_B = {"epochs": 100, "batch_size": 512, "layer_decay": 0.65, "weight_decay": 0.05}
_IJEPA = {"epochs": 50, "batch_size": 512, "layer_decay": 0.75, "lr": 3e-5}
_SEMIVIT = {"epochs": 50, "batch_size": 256, "layer_decay": 0.75, "lr": 1e-3, "weight_decay": 0.05, "drop_path": 0.2}

# (1 %, 10 %); the rest as in FinetuneSettings: warm-up of 5 epochs, label smoothing 0.1
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vit_b": ({**_B, "lr": 5e-5, **_PLAIN}, {**_B, "lr": 2.5e-4, **_MIXED, "drop_path": 0.1}),
    "vit_l": ({**_IJEPA, "weight_decay": 0.05, **_MINIMAL}, {**_IJEPA, "weight_decay": 0.05, **_PLAIN}),
    "vit_h": ({**_IJEPA, "weight_decay": 0.4, **_MINIMAL}, {**_SEMIVIT, **_MIXED}),
    "vit_2b": ({**_IJEPA, "weight_decay": 0.4, **_MINIMAL}, {**_SEMIVIT, **_MIXED, "frozen_share": 0.25}),
}
WIDTHS = {"vit_b": 768, "vit_l": 1024, "vit_h": 1280, "vit_2b": 2560}  # from which on a row is meant
MOST = (0.02, 0.2)  # share of the labels that the row of 1 %, of 10 % is used for
RECIPES = ("mae", "published", *ROWS)


class FinetuneSettings(FrozenSettings):
    """The MAE recipe with the paper's values. ``lr`` is for 256 images a step and scales with the batch.

    ``shares`` of the labels to train on (stratified, at least one image a class), or ``split_files`` instead: published
    lists of file names. ``recipe``: "published" takes the values of the encoder's size for few labels (ROWS),
    "vit_b" ... those of one size. Mixup, cutmix, random erasing and RandAugment are timm's; 0 or "" switches one off.
    ``pooling``: "auto" is the class token where there is one. ``frozen_share``: of the blocks that, with the stem and
    the positions, stay as they are.
    """

    shares: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1), Listed] = (0.01, 0.1, 1.0)
    split_files: Files = ()
    recipe: Annotated[str, AfterValidator(one_of(RECIPES))] = "mae"
    epochs: PositiveInt = 50
    batch_size: BatchSize = 1024  # or the whole train set when that is smaller
    lr: Positive = 1e-3
    end_lr: NonNegative = 1e-6
    warmup_epochs: NonNegative = 5.0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    drop_path: Decay = 0.2
    weight_decay: NonNegative = 0.05
    mixup: NonNegative = 0.8
    cutmix: NonNegative = 1.0
    label_smoothing: Share = 0.1
    randaugment: Annotated[str, BeforeValidator(lambda value: value or "")] = "rand-m9-mstd0.5-inc1"
    erasing: Share = 0.25
    crop_scale: tuple[Share, Share] = (0.08, 1.0)
    pooling: Literal["auto", "cls", "mean"] = "auto"
    frozen_share: Share = 0.0
    workers: Annotated[int, Field(ge=-1, le=4096)] = -1  # loader processes; -1: decided from data and cores

    def pooling_of(self, info: BackboneInfo) -> str:
        """What the classifier reads. InputError for a class token that the encoder lacks."""
        return resolve_poolings(None if self.pooling == "auto" else [self.pooling], info)[0]


@dataclass(frozen=True)
class LabelledRows:
    """Some images of a set with their class numbers (which need not be those of the set)."""

    images: ImageSet
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, images: ImageSet, features: Features) -> LabelledRows:
        """The images behind features, which have labels."""
        return cls(images, features.indices.numpy(), required_labels(features, "chosen").numpy())

    def select(self, chosen: NDArray[np.int64]) -> LabelledRows:
        """Return the images at positions ``chosen``."""
        return LabelledRows(self.images, self.rows[chosen], self.labels[chosen])


class Classifier(nn.Module):
    """A copy of an encoder with the final norm, and a linear layer on its pooled last block."""

    def __init__(
        self, backbone: Backbone, num_classes: int, pooling: str, drop_path: float, frozen_share: float = 0.0
    ) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone)
        self.backbone.requires_grad_(True)
        self.frozen_blocks = int(frozen_share * backbone.info.depth)
        for parameter in self.backbone.fixed_parameters(self.frozen_blocks) if self.frozen_blocks else ():
            parameter.requires_grad_(False)
        self.pooling = pooling
        self.head = nn.Linear(backbone.info.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)
        # stochastic depth that grows linearly from 0 at the first block to ``drop_path`` at the last
        blocks = getattr(self.backbone.model, "blocks", ())
        for (number, block), name in product(enumerate(blocks), ("drop_path", "drop_path1", "drop_path2")):
            share = drop_path * number / max(1, len(blocks) - 1)
            if share and hasattr(block, name):
                setattr(block, name, DropPath(share))

    def train(self, mode: bool = True) -> Classifier:
        """Random layers of frozen blocks rest."""
        super().train(mode)
        for number in range(self.frozen_blocks):
            self.backbone.model.blocks[number].eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C] of normalised images [B, 3, H, W]."""
        output = self.backbone.forward_blocks(images, (-1,), norm=True)[0]
        return self.head(output.pooled(self.pooling))


def finetune(
    backbone: Backbone,
    train: LabelledRows,
    test: LabelledRows,
    settings: FinetuneSettings | None = None,
    *,
    image_size: ImageSize,
    run: Run | None = None,
) -> AccuracyScore:
    """Train a copy of ``backbone`` and score it after the last epoch; on a CPU one seed gives the same bits always."""
    settings, run = settings or FinetuneSettings(), run or Run()
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    pooling = settings.pooling_of(backbone.info)
    with _seeded(run.seed, range(torch.cuda.device_count())):
        model = Classifier(backbone, num_classes, pooling, settings.drop_path, settings.frozen_share).to(run.device)
        _train(model, train, settings, image_size, run)
    predicted = _predict(model, test, image_size, settings.batch_size, run)
    return AccuracyScore.of(predicted == torch.from_numpy(test.labels))


def row_of(recipe: str, width: int) -> str | None:
    """Name of the row for an encoder of ``width``; None for MAE's recipe. InputError where nothing is published."""
    if recipe == "mae":
        return None
    if recipe != "published":
        return recipe
    if width < WIDTHS["vit_b"]:
        raise InputError(
            f"finetune.recipe=published: nothing is published for an encoder of width {width} (ViT-B has "
            f"{WIDTHS['vit_b']}); choose {RECIPES[2]}, another row, or mae, whose values --set changes"
        )
    return max((name for name in WIDTHS if WIDTHS[name] <= width), key=WIDTHS.__getitem__)


def published(
    settings: FinetuneSettings, share: float, width: int, given: Collection[str]
) -> tuple[FinetuneSettings, str]:
    """``settings`` with the published values for a ``share`` of the labels, and what they are called.

    ``given``: names of settings that the user has set, which stay. More labels than published: as they are.
    """
    row = row_of(settings.recipe, width)
    number = next((place for place, most in enumerate(MOST) if share <= most), None)
    if row is None or number is None:
        return settings, "mae"
    changes = {key: value for key, value in ROWS[row][number].items() if key not in given}
    return settings.model_copy(update=changes), f"{row} {('1', '10')[number]} %"


def share_of(rows: LabelledRows, share: float, seed: int) -> LabelledRows:
    """A stratified ``share`` of the images, at least one a class; nested: a smaller share is part of a larger one."""
    if share >= 1:
        return rows
    order = np.random.default_rng([seed, 1]).permutation(len(rows.labels))
    sizes = {name: max(1, round(share * count)) for name, count in enumerate(np.bincount(rows.labels)) if count}
    return rows.select(first_of_classes(rows.labels, order, sizes))


def _train(model: Classifier, train: LabelledRows, settings: FinetuneSettings, image_size: ImageSize, run: Run) -> None:
    count, num_classes = len(train.rows), model.head.out_features
    size = min(settings.batch_size, count) // 2 * 2 or 1  # mixup pairs the images of a batch
    steps, peak = count // size, peak_learning_rate(settings.lr, size)
    kinds, smoothing = (settings.mixup, settings.cutmix), settings.label_smoothing
    mixup = Mixup(*kinds, label_smoothing=smoothing, num_classes=num_classes) if size > 1 and any(kinds) else None
    loss_of = SoftTargetCrossEntropy() if mixup else nn.CrossEntropyLoss(label_smoothing=smoothing)
    info, workers = model.backbone.info, worker_count(settings.workers, cached=train.images.cached)
    batches: list[list[tuple[int, int]]] = []  # (epoch, image) of those still to come
    loader: DataLoader[Any] = DataLoader(
        _Augmented(train, training_transform(settings, image_size, info.mean, info.std), run.seed),
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or the loader would consume the global generator's numbers
    )
    optimizer = torch.optim.AdamW(_groups(model, settings), lr=0.0, betas=(0.9, 0.999))
    step, total = 0, settings.epochs * steps
    warmup = min(round(settings.warmup_epochs * steps), total)
    model.train()
    for epoch in range(settings.epochs):
        order = np.random.default_rng([run.seed, epoch]).permutation(count)[: steps * size].reshape(steps, size)
        batches[:] = [[(epoch, index) for index in chosen] for chosen in order.tolist()]
        for batch in watched(loader):
            rate = warmup_cosine(step, total_steps=total, warmup_steps=warmup, peak=peak, end=settings.end_lr)
            set_learning_rate(optimizer, rate)
            images, targets = (each.to(run.device, non_blocking=True) for each in batch)
            if mixup:
                images, targets = mixup(images, targets)
            with run.autocast():
                loss = loss_of(model(images), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            run.reporter.progress(step, {})


def _groups(model: Classifier, settings: FinetuneSettings) -> list[dict[str, Any]]:
    """The position table moves, unlike in refinement."""
    encoder, decay = model.backbone.model, settings.weight_decay
    scales = layer_decay_scales(encoder, settings.layer_decay) if settings.layer_decay < 1 else None
    groups = parameter_groups(encoder.named_parameters(), weight_decay=decay, scales=scales)
    return groups + parameter_groups(model.head.named_parameters(), weight_decay=decay)


class _Augmented(Dataset[tuple[Tensor, int]]):
    """Augmented images; every draw is a function of (seed, epoch, image): any number of workers gives the same."""

    def __init__(self, train: LabelledRows, transform: Callable[[Image.Image], Tensor], seed: int) -> None:
        self.train, self.transform, self.seed = train, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        pixels = self.train.images.load(int(self.train.rows[index]))
        with _seeded(int(np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)[0]), devices=()):
            return self.transform(Image.fromarray(pixels)), int(self.train.labels[index])


def training_transform(
    settings: FinetuneSettings, image_size: ImageSize, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Image.Image], Tensor]:
    """timm's training transform: random resized crop, flip, RandAugment, normalisation, random erasing."""
    how: dict[str, Any] = {"scale": tuple(settings.crop_scale), "interpolation": "bicubic", "color_jitter": None}
    how |= {"mean": tuple(mean), "std": tuple(std), "re_prob": settings.erasing, "re_mode": "pixel"}
    crop, _, final = create_transform(image_size, is_training=True, separate=True, **how)
    if not settings.randaugment:
        return Compose([crop, final])
    options = {
        "translate_const": int(max(height_width(image_size)) * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in mean),
        "interpolation": Image.Resampling.BICUBIC,
        # at the full magnitude timm posterises to 0 bits, which newer Pillow refuses
        "magnitude_max": 9.99,
    }
    return Compose([crop, rand_augment_transform(settings.randaugment, options), final])


@torch.inference_mode()
def _predict(model: Classifier, test: LabelledRows, image_size: ImageSize, batch_size: int, run: Run) -> Tensor:
    """Classes [N] in the order of ``test``; an image that cannot be read counts as wrong (-1)."""
    classes = torch.full((len(test.images),), -1)
    with evaluation_mode(model):
        for batch, rows in eval_batches(test.images, image_size, min(256, batch_size), indices=test.rows):
            with run.autocast():
                logits = model(inputs_of(model.backbone, batch, run))
            classes[rows] = logits.argmax(1).cpu()
    return classes[torch.from_numpy(test.rows)].clone()


@contextmanager
def _seeded(seed: int, devices: Sequence[int]) -> Iterator[None]:
    """Seed the global generators that timm's augmentations use, and give them back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
