"""A tiny random encoder and a small image set whose classes differ in colour."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source
from mim_refiner.evaluation.features import Features
from mim_refiner.models.backbone import Backbone


@pytest.fixture
def make_backbone() -> Callable[..., Backbone]:
    """Return a maker of random 3-block ViTs of width 32 for 32 px images."""

    def make(seed: int = 0, **options: object) -> Backbone:
        torch.manual_seed(seed)
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}
        return Backbone.wrap(VisionTransformer(**{**shape, **options}))

    return make


@pytest.fixture
def make_images(tmp_path: Path) -> Callable[..., ImageSet]:
    """Return a maker of labelled 32 px images: one colour a class, plus noise."""

    def make(count: int = 60, *, classes: int = 3, seed: int = 0, labelled: bool = True, noise: int = 60) -> ImageSet:
        rng = np.random.default_rng(seed)
        labels = np.arange(count) % classes
        colours = np.random.default_rng(99).integers(40, 215, (classes, 1, 1, 3))
        images = (colours[labels] + rng.integers(-noise, noise, (count, 32, 32, 3))).clip(0, 255).astype(np.uint8)
        path = tmp_path / f"images-{seed}-{count}-{labelled}.npz"
        np.savez(path, images=images, **({"labels": labels} if labelled else {}))
        return ImageSet(open_source(path))

    return make


@pytest.fixture
def make_features() -> Callable[..., Features]:
    """Return a maker of random class-shifted features for two (block, pooling) pairs of a 3-block encoder."""

    def make(count: int = 120, *, classes: int = 4, dim: int = 8, shift: float = 1.0, seed: int = 0) -> Features:
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(1234)) * shift
        labels = torch.arange(count) % classes
        values = {
            key: centres[labels] + torch.randn(count, dim, generator=generator) for key in ((1, "cls"), (2, "mean"))
        }
        return Features(values, labels, torch.arange(count), depth=3)

    return make
