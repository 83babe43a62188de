"""A pool of views whose frozen features are computed once, so that a step costs no more than the part that trains.

The views are those of the run's first ``view_pool`` epochs. Kept are their tokens after the frozen blocks, for both
phases; or, where no block is frozen, the pooled outputs of the heads' blocks, for the warm-up alone. Epochs that the
pool holds have the batches of a run without it. A later epoch shows the images in a new order, and every view of an
image is drawn from those that the pool has of it.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mim_refiner.core.collectives import is_distributed
from mim_refiner.core.device import free_memory
from mim_refiner.core.run import Run, send
from mim_refiner.data.loaders import TrainLoader, ViewBatch
from mim_refiner.data.photometric import seeded_generator
from mim_refiner.errors import InputError
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.refiner import Refiner
from mim_refiner.reporting import number_of
from mim_refiner.training.recipe import RefineRecipe
from mim_refiner.types import ImageSize, height_width

SHARE = 0.5  # of the free memory that a pool may take
_DRAWS = 1  # first number of the paths of this file's random draws


@dataclass
class ViewPool:
    """Frozen features of ``steps`` batches; read like a TrainLoader."""

    epochs: int
    steps_per_epoch: int
    batch_size: int
    seed: int
    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        self.steps = self.epochs * self.steps_per_epoch
        self.sample_ids = torch.empty(self.steps * self.batch_size, dtype=torch.int64)
        self._features: list[Tensor] = []  # of every view [steps * B, ...]
        self._stored = 0

    @property
    def full(self) -> bool:
        return self._stored == self.steps

    def add(self, features: Sequence[Tensor], sample_ids: Tensor) -> None:
        """Keep the next batch: features [B, ...] of each view, and sample numbers [B] on the host."""
        if not self._stored:
            count = len(self.sample_ids)
            self._features = [value.new_empty(count, *value.shape[1:], dtype=self.dtype) for value in features]
        limit = torch.finfo(self.dtype).max
        start = self._stored * self.batch_size
        rows = slice(start, start + self.batch_size)
        for kept, value in zip(self._features, features, strict=True):
            kept[rows] = value.clamp(-limit, limit)
        self.sample_ids[rows] = sample_ids
        self._stored += 1

    def end(self) -> None:
        """Take no more: what is here is the pool."""
        self.steps, self.epochs = self._stored, self._stored // self.steps_per_epoch
        self.sample_ids = self.sample_ids[: self.steps * self.batch_size]

    def release(self) -> None:
        """Give the memory back: the pool is empty, as before its first batch."""
        self._features, self._stored = [], 0

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[ViewBatch, None, None]:
        """Batches of features in place of images, from ``start_step`` on."""
        rows = self._rows(epoch)  # [V, images]
        for step in range(start_step, self.steps_per_epoch):
            part = rows[:, step * self.batch_size : (step + 1) * self.batch_size]
            there, sample_ids = send([part, self.sample_ids[part[0]]], self._features[0].device)
            features = [kept.index_select(0, own).float() for kept, own in zip(self._features, there, strict=True)]
            yield ViewBatch(features, sample_ids, None)

    def _rows(self, epoch: int) -> Tensor:
        """Where the features of every view of an epoch's images lie, [V, images]."""
        views, count = len(self._features), self.steps_per_epoch * self.batch_size
        if epoch < self.epochs:
            return torch.arange(epoch * count, (epoch + 1) * count).expand(views, -1)
        generator = seeded_generator(self.seed, _DRAWS, epoch)
        held = self.sample_ids.unique(return_counts=True)[1]  # rows of each image that occurs
        first, by_image = held.cumsum(0) - held, self.sample_ids.argsort(stable=True)
        order = torch.cat([torch.randperm(len(held), generator=generator) for _ in range(-(-count // len(held)))])
        chosen = order[:count]
        drawn = torch.rand(views, count, dtype=torch.float64, generator=generator)
        return by_image[first[chosen] + (drawn * held[chosen]).long()]


def make_pool(recipe: RefineRecipe, loader: TrainLoader, seed: int) -> ViewPool | None:
    """The pool that a resolved recipe asks for, still empty."""
    epochs = pooled_epochs(recipe)
    return ViewPool(epochs, loader.steps_per_epoch, recipe.batch_size, seed) if epochs else None


def pooled_epochs(recipe: RefineRecipe) -> int:
    """How many epochs of views the pool of a resolved recipe holds: those of the phases that can use it at most."""
    usable = recipe.warmup.epochs + (recipe.refinement.epochs if recipe.frozen_blocks else 0)
    return min(recipe.view_pool, usable)


def pool_bytes(recipe: RefineRecipe, refiner: Refiner, images: int) -> int:
    """Size of the pool over ``images`` images."""
    shapes = recipe.views.shapes
    tokens = view_tokens(refiner.backbone, shapes) * refiner.backbone.info.embed_dim
    pooled = sum(count for _, count in shapes) * sum(refiner.feature_widths)
    return 2 * (tokens if recipe.frozen_blocks else pooled) * images * pooled_epochs(recipe)


def view_tokens(backbone: Backbone, shapes: Sequence[tuple[ImageSize, int]]) -> int:
    """Tokens of all views of an image; ``shapes``: (pixels, how many such views)."""
    prefix = backbone.info.num_prefix_tokens
    return sum(count * (prefix + math.prod(backbone.grid_of(height_width(size)))) for size, count in shapes)


def refuse_pool(recipe: RefineRecipe, refiner: Refiner, images: int, run: Run) -> None:
    """InputError for a pool that this run cannot have; nothing without one."""
    if not recipe.view_pool:
        return
    if is_distributed():
        raise InputError("view_pool: works in one process only; leave it out, or start one process")
    if not pooled_epochs(recipe):
        raise InputError("view_pool: no phase has a frozen part; set frozen_blocks or warmup.epochs, or leave it out")
    needed, free = pool_bytes(recipe, refiner, images), free_memory(run.device)
    if needed > SHARE * free:
        raise InputError(
            f"view_pool: the views of {number_of(pooled_epochs(recipe), 'epochs')} take {needed / 1e9:.1f} GB, more "
            f"than half of the {free / 1e9:.1f} GB that are free; set a smaller view_pool or frozen_blocks=0, or leave "
            "it out"
        )
