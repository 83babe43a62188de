"""Images in NumPy files: .npz with ``images``/``x`` and optional ``labels``/``y``, or one .npy array."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mim_refiner.data.arrays import Arrays
from mim_refiner.data.channels import is_pixels
from mim_refiner.data.source_base import ImageSource, checked_labels, short_hash
from mim_refiner.errors import DataError


class ArraySource(ImageSource):
    """Pixels uint8 or uint16 [N, H, W, C] or [N, H, W] of a NumPy file; an .npy file is memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._images: NDArray[Any] | None = None
        labels = self._open()
        shape = self._array().shape
        if labels is not None and labels.shape != (shape[0],):
            raise DataError(f"{path}: {shape[0]} images but labels of shape {labels.shape}; give one label an image")
        if labels is not None:
            self.labels = checked_labels(labels.astype(np.int64), None, path)
        self.shape: tuple[int, ...] = shape
        self.description = f"array {path} ({shape[0]} images of {shape[1]}x{shape[2]} px)"

    def _open(self) -> NDArray[Any] | None:
        """Load the images (memory-mapped for .npy) and return the raw labels."""
        arrays = Arrays(self.path)
        images = arrays.get("images", arrays.get("x"))
        if images is None:
            found = ", ".join(sorted(arrays)) or "nothing"
            raise DataError(f"{self.path}: no array 'images' or 'x' (found {found}); save it under one of these names")
        self._images = _checked_images(images, self.path)
        return arrays.get("labels", arrays.get("y"))

    def _array(self) -> NDArray[Any]:
        if self._images is None:
            self._open()
        assert self._images is not None
        return self._images

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would travel to a worker as a full copy; it is opened again there.
        return {**self.__dict__, "_images": None}

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, index: int) -> NDArray[Any]:
        return np.asarray(self._array()[index])

    def name(self, index: int) -> str:
        return f"{self.path.name}[{index}]"

    def fingerprint(self) -> str:
        return short_hash(["array", self.shape, "" if self.labels is None else self.labels, self._array()[:1]])

    def close(self) -> None:
        self._images = None


def _checked_images(images: NDArray[Any], path: Path) -> NDArray[Any]:
    if not is_pixels(images.dtype):
        raise DataError(f"{path}: images are {images.dtype}; convert them to uint8 (0-255) or uint16 (0-65535)")
    if images.ndim not in (3, 4):
        raise DataError(f"{path}: images have shape {images.shape}; give [N, H, W] or [N, H, W, C]")
    if images.ndim == 4 and images.shape[1] in (1, 3, 4) and images.shape[1] < min(images.shape[2:]):
        raise DataError(f"{path}: images have shape {images.shape}, channels first it seems; give [N, H, W, C]")
    if 0 in images.shape:
        raise DataError(f"{path}: the array of shape {images.shape} holds no image; save at least one")
    return images
