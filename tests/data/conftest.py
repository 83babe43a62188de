"""Small image sources made on the fly."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source

Pixels = NDArray[np.uint8]


@pytest.fixture
def pixels() -> Callable[..., Pixels]:
    """Return a maker of smooth random images uint8 [height, width, 3]."""

    def make(seed: int, height: int = 12, width: int = 16) -> Pixels:
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))

    return make


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """Return an encoder of a Pillow image or an array to bytes (PNG by default)."""

    def make(image: Pixels | Image.Image, kind: str = "PNG", **options: object) -> bytes:
        buffer = io.BytesIO()
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
        return buffer.getvalue()

    return make


@pytest.fixture
def image_folder(tmp_path: Path, pixels: Callable[..., Pixels]) -> Callable[[Sequence[str]], Path]:
    """Return a maker of a folder with one PNG for each relative name; image number i has seed i."""

    def make(names: Sequence[str]) -> Path:
        root = tmp_path / "images"
        for seed, name in enumerate(names):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels(seed)).save(path)
        return root

    return make


@pytest.fixture
def array_set(tmp_path: Path) -> Callable[..., ImageSet]:
    """Return a maker of an ImageSet of random pixels with labels 0, 1, 2, 0, ..."""

    def make(count: int = 20, height: int = 16, width: int = 20, cache: bool = True) -> ImageSet:
        images = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
        path = tmp_path / f"set-{count}-{height}-{width}.npz"
        np.savez(path, images=images, labels=np.arange(count) % 3)
        return ImageSet(open_source(path), cache=cache)

    return make
