"""Images in NumPy files and Python objects: arrays, pictures, data sets of torch and Hugging Face."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mim_refiner.data.channels import first_array, is_pixels
from mim_refiner.data.image_files import pixels_of
from mim_refiner.data.labels import LabelProblem, Labels, candidates, printable
from mim_refiner.data.source_base import ImageSource, evenly, label_parts, short_hash
from mim_refiner.data.source_files import image_files
from mim_refiner.errors import DataError, reason_of
from mim_refiner.files import name_of, reading
from mim_refiner.reporting import number_of

ACCEPTED = (
    "a path, an array [N, H, W, C], a list of PIL images, arrays or paths, a torch Dataset or a datasets.Dataset; with "
    "labels: (images, labels)"
)
_LOCK = threading.RLock()  # one for all, as no lock can be pickled; items may come from another source
_SAMPLED = 16  # images that the fingerprint looks at
_IMAGE_KEYS = ("image", "img", "pixel_values", "jpg", "png")
_SAMPLED_ROWS = 64  # of a file
_CODEC = ("utf-8", "surrogateescape")
_LABEL_KEYS = ("label", "labels", "fine_label")


def object_source(given: Any) -> ImageSource:
    """The images of a Python object as a source; DataError in one line for what is none."""
    if isinstance(given, ImageSource):
        return given
    labels = None
    if isinstance(given, tuple) and len(given) == 2 and np.ndim(given[1]) == 1 and not isinstance(given[1], str):
        given, labels = given[0], list(given[1])
    if isinstance(given, list | tuple) and given and all(isinstance(each, str | os.PathLike) for each in given):
        source: ImageSource = image_files([Path(each) for each in given])
        if labels is not None:
            source.read_labels(lambda: _labels(labels, len(source)))
        return source
    if not hasattr(given, "__getitem__") or not hasattr(given, "__len__") or isinstance(given, dict):
        raise DataError(f"data of type {type(given).__name__} holds no images; give {ACCEPTED}")
    if not len(given):
        raise DataError(f"data of type {type(given).__name__} is empty; give at least one image")
    return ObjectSource(given, labels)


class ObjectSource(ImageSource):
    """Items of ``given`` by number: images, (image, label) or mappings with an image and perhaps a label.

    Labels come from ``labels``, the object's ``targets`` or label column, or else from its items.
    """

    def __init__(self, given: Any, labels: Sequence[Any] | None) -> None:
        self.given = given
        self.description = f"{name_of(given)} ({number_of(len(given), 'images')})"
        with reading(f"{self.description}, item 0", "mend the data set"):
            first = self._item(0)
        self._key = next((key for key in _IMAGE_KEYS if key in first), None) if isinstance(first, dict) else None
        if isinstance(first, dict) and self._key is None:
            raise DataError(f"{self.description}: no column image or img among {', '.join(first)}; rename one")
        with reading(f"{self.description}, item 0", "mend the data set"):
            self.read(0)  # a wrong type is told at once
        self.read_labels(lambda: _labels(self._raw_labels(first) if labels is None else labels, len(self)))

    def __len__(self) -> int:
        return len(self.given)

    def _item(self, index: int) -> Any:
        with _LOCK:  # few data sets are made for threads
            return self.given[index]

    def _label(self, index: int, place: int | str) -> Any:
        try:
            item = self._item(index)
        except Exception as error:
            raise LabelProblem(f"item {index} cannot be read ({reason_of(error)}), nor its label") from None
        held = range(len(item)) if isinstance(item, tuple | list) else item if isinstance(item, dict) else ()
        if place not in held:
            raise LabelProblem(f"item {index} has no label, as item 0 has; give all or none")
        return item[place]

    def read(self, index: int) -> NDArray[Any] | bytes:
        item = self._item(index)
        image = item[str(self._key)] if isinstance(item, dict) else item[0] if isinstance(item, tuple | list) else item
        if isinstance(image, Image.Image):
            return pixels_of(image)
        if isinstance(image, bytes):
            return image
        if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):  # an undecoded image of datasets
            return bytes(image["bytes"])
        pixels = np.asarray(image)
        if hasattr(image, "detach") and pixels.ndim == 3:  # torch puts channels first
            if pixels.shape[2] in (1, 3, 4) and min(pixels.shape[:2]) > 4:
                raise DataError(f"{self.description}: tensors are [C, H, W], not {pixels.shape}; permute them")
            pixels = pixels.transpose(1, 2, 0)
        if pixels.dtype == object or pixels.ndim not in (2, 3):
            raise DataError(f"{self.description}: an item of type {type(image).__name__} is no image; give {ACCEPTED}")
        if not is_pixels(pixels.dtype):
            raise DataError(f"{self.description}: images are {pixels.dtype}; give uint8 or uint16, before ToTensor")
        return pixels

    def name(self, index: int) -> str:
        return f"[{index}]"

    def fingerprint(self) -> str:
        images = (self._seen(row) for row in evenly(len(self), _SAMPLED).tolist())
        return short_hash(["objects", len(self), *label_parts(self.classes), *images])

    def _seen(self, index: int) -> NDArray[Any] | bytes:
        with contextlib.suppress(Exception):  # a data set may raise anything; such items are counted when read
            return self.read(index)
        return b""

    def _raw_labels(self, first: Any) -> Sequence[Any]:
        """From the object where it has them all, else item by item."""
        rows = range(len(self))
        if isinstance(first, dict):
            if (key := next((each for each in _LABEL_KEYS if each in first), None)) is None:
                raise LabelProblem(f"no column {' or '.join(_LABEL_KEYS[:2])}; give (images, labels)")
            table = hasattr(self.given, "column_names")  # of the datasets library
            column: Any = self.given[key] if table else [self._label(row, key) for row in rows]
            return _named(list(column), getattr(self.given.features.get(key), "names", None) if table else None)
        if not isinstance(first, tuple | list) or len(first) < 2:
            raise LabelProblem("the items hold an image and no label; give (images, labels)")
        targets: Any = getattr(self.given, "targets", None)
        whole = hasattr(targets, "__len__") and len(targets) == len(self)
        values = list(targets) if whole else [self._label(row, 1) for row in rows]
        return _named(values, getattr(self.given, "classes", None))


def _named(values: list[Any], names: Any) -> list[Any]:
    """The names of classes that are given by number, where there are names."""
    known = list(names) if hasattr(names, "__len__") and not isinstance(names, str) else [None]
    if not all(isinstance(name, str) for name in known) or any(isinstance(value, str) for value in values):
        return values
    found = []
    for row, value in enumerate(values):
        number = -1  # as of data sets without labels, where it is no last class
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number = int(value) if int(value) == value else -1
        if not 0 <= number < len(known):
            there = number_of(len(known), "class names")
            raise LabelProblem(f"item {row} has the label {value}, and the data set {there}; correct one of the two")
        found.append(known[number])
    return found


def _labels(given: Any, count: int) -> Labels:
    """Labels [N] or [N, 1] of whole numbers, booleans, floats or text."""
    if not isinstance(given, np.ndarray):
        single = [hasattr(value, "item") and np.shape(value) in ((), (1,)) for value in given]
        items = [value.item() if alone else value for value, alone in zip(given, single, strict=True)]
        plain = all(isinstance(item, bool | int | float) for item in items)
        given = np.asarray(items, dtype=None if plain else object)  # a long text would make all rows as long
    labels = given[:, 0] if given.ndim == 2 and given.shape[1] == 1 else given
    if labels.shape != (count,):
        what = number_of(len(labels), "labels") if labels.ndim == 1 else f"labels of shape {given.shape}"
        raise LabelProblem(f"{number_of(count, 'images')} but {what}; give one label an image")
    if labels.dtype.kind in "SU" or all(isinstance(label, str) for label in labels):
        return Labels.of_texts(text if isinstance(text, str) else text.decode(*_CODEC) for text in labels.tolist())
    if labels.dtype.kind not in "biuf":
        raise LabelProblem(f"the labels are {type(labels[0]).__name__}; give whole numbers or class names")
    return Labels.of_numbers(labels)


# --- NumPy files: .npz with ``images``/``x`` and optional ``labels``/``y``, or one .npy array


class ArraySource(ImageSource):
    """Pixels uint8 or uint16 [N, H, W, C] or [N, H, W] of a NumPy file; an .npy file is memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path, self.base = path, path.parent
        self._images: NDArray[Any] | None = None
        kind, self.shape = self._array().dtype, self._array().shape
        if not is_pixels(kind):
            raise DataError(f"{path}: images are {kind}; convert them to uint8 (0-255) or uint16 (0-65535)")
        if len(self.shape) not in (3, 4):
            raise DataError(f"{path}: images have shape {self.shape}; give [N, H, W] or [N, H, W, C]")
        if len(self.shape) == 4 and self.shape[1] in (1, 3, 4) and self.shape[1] < min(self.shape[2:]):
            raise DataError(f"{path}: images have shape {self.shape}, channels first it seems; give [N, H, W, C]")
        if 0 in self.shape:
            raise DataError(f"{path}: the array of shape {self.shape} holds no image; save at least one")
        self.read_labels(self._labels)
        self.description = f"array {path} ({number_of(len(self), 'images')} of {self.shape[1]}x{self.shape[2]} px)"

    def _array(self) -> NDArray[Any]:
        """The images (memory-mapped for .npy)."""
        if self._images is None:
            self._images, names = first_array(self.path, ("images", "x"))
            if self._images is None:
                found = ", ".join(sorted(names)) or "nothing"
                raise DataError(
                    f"{self.path}: no array 'images' or 'x' (found {found}); save it under one of these names"
                )
        return self._images

    def _labels(self) -> Labels:
        if isinstance(self._array(), np.memmap):
            raise LabelProblem("one array has no place for them; save images and labels with numpy.savez")
        labels, names = first_array(self.path, ("labels", "y"))
        if labels is None:
            hint = candidates(names, "save it as 'labels'") or "save them as 'labels'"
            raise LabelProblem(f"no array 'labels' or 'y' (found {', '.join(sorted(names))}); {hint}")
        return _labels(labels, len(self))

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
        images = (self._array()[row] for row in evenly(len(self), _SAMPLED_ROWS).tolist())
        return short_hash(["array", self.shape, *label_parts(self.classes), *images])

    def close(self) -> None:
        self._images = None
