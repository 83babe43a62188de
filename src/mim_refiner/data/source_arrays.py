"""Images in NumPy files: .npz with ``images``/``x`` and optional ``labels``/``y``, or one .npy array."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mim_refiner.data.arrays import Arrays
from mim_refiner.data.channels import is_pixels
from mim_refiner.data.labels import LabelProblem, Labels, candidates, printable
from mim_refiner.data.source_base import ImageSource, label_parts, short_hash
from mim_refiner.errors import DataError

_SAMPLED = 64  # images that the fingerprint looks at
_CODEC = ("utf-8", "surrogateescape")


class ArraySource(ImageSource):
    """Pixels uint8 or uint16 [N, H, W, C] or [N, H, W] of a NumPy file; an .npy file is memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._images: NDArray[Any] | None = None
        self.base = path.parent
        labels = self._open()
        shape = self._array().shape
        self.read_labels(lambda: _labels(labels, shape[0]))
        self.shape: tuple[int, ...] = shape
        self.description = f"array {path} ({shape[0]} images of {shape[1]}x{shape[2]} px)"

    def _open(self) -> NDArray[Any] | str:
        """Load the images (memory-mapped for .npy) and return the raw labels, or why there are none."""
        arrays = Arrays(self.path)
        images = arrays.get("images", arrays.get("x"))
        if images is None:
            found = ", ".join(sorted(arrays)) or "nothing"
            raise DataError(f"{self.path}: no array 'images' or 'x' (found {found}); save it under one of these names")
        self._images = _checked_images(images, self.path)
        if arrays.single:
            return "one array has no place for them; save images and labels with numpy.savez"
        hint = candidates(arrays, "save it as 'labels'") or "save them as 'labels'"
        return arrays.get(
            "labels", arrays.get("y", f"no array 'labels' or 'y' (found {', '.join(sorted(arrays))}); {hint}")
        )

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
        return f"{printable(self.path.name)}[{index}]"

    def fingerprint(self) -> str:
        rows = np.unique(np.linspace(0, len(self) - 1, min(_SAMPLED, len(self))).astype(int))
        return short_hash(["array", self.shape, *label_parts(self.classes), *(self._array()[row] for row in rows)])

    def close(self) -> None:
        self._images = None


def _labels(given: NDArray[Any] | str, count: int) -> Labels:
    """Labels [N] or [N, 1] of whole numbers, booleans, floats or text."""
    if isinstance(given, str):
        raise LabelProblem(given)
    labels = given[:, 0] if given.ndim == 2 and given.shape[1] == 1 else given
    if labels.shape != (count,):
        raise LabelProblem(f"{count} images but labels of shape {given.shape}; give one label an image")
    if labels.dtype.kind in "SU":
        texts = labels.tolist()
        return Labels.of_texts(text if isinstance(text, str) else text.decode(*_CODEC) for text in texts)
    if labels.dtype.kind not in "biuf":
        raise LabelProblem(f"the labels are {labels.dtype}; save whole numbers or class names")
    return Labels.of_numbers(labels)


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
