"""Segmentation masks that belong to the images of a source: a parquet column, or files in a folder beside images/."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mim_refiner.data.channels import array_in
from mim_refiner.data.image_files import SIDEWAYS, open_image, orientation, stored_bits, stored_size, turned
from mim_refiner.data.source_base import ConcatSource, ImageSource, Selection
from mim_refiner.data.source_files import FileSource
from mim_refiner.data.source_parquet import ParquetSource, holds_images
from mim_refiner.errors import DataError
from mim_refiner.files import read_regular, reading

Mask = NDArray[np.uint8]  # [H, W] class numbers
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "JPEGImages")
MASK_FOLDERS = ("masks", "mask", "annotations", "labels", "SegmentationClass")
MASK_COLUMNS = ("mask", "annotation", "segmentation", "label")
DEFAULT_IGNORE = 255
_EXACT = ("PNG", "TIFF", "BMP", "GIF")  # formats that keep every number as it is
_PICTURES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jpg", ".jpeg")
_FIX = "save masks as PNG with one class number (0-255) a pixel"


class NoMasksError(DataError):
    """A source of images alone."""


class MaskSet:
    """``load(i)`` gives the mask uint8 [H, W] of image i of a source; ``ignore_index`` marks pixels without a class.

    Parquet: column ``mask`` or ``annotation`` (PNG bytes or the Hugging Face struct), schema metadata ``ignore_index``
    and ``class_names``. Folder: every images/NAME has a masks/NAME.png, NAME_mask.png or .tif (or mask/,
    annotations/, labels/). Raises DataError when a source has no masks, or masks that cannot be used.
    """

    def __init__(self, source: ImageSource) -> None:
        self.source = source
        self._tables: dict[Path, tuple[ParquetSource, dict[bytes, bytes]]] = {}
        self._folders: dict[str, dict[str, str]] = {}
        self._dense: Mask | None = None
        leaf, _ = _leaf(source, 0)
        metadata = self._table(leaf.path)[1] if isinstance(leaf, ParquetSource) else {}
        with reading(leaf.description, "correct the notes ignore_index and class_names of the file"):
            self.ignore_index = int(metadata.get(b"ignore_index", b"%d" % DEFAULT_IGNORE))
            names = metadata.get(b"class_names")
            self.class_names: tuple[str, ...] | None = tuple(map(str, json.loads(names))) if names else None
        self.load(0)

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> Mask:
        """Mask of image ``index``, upright and of its size; DataError when it is missing or cannot be used.

        One of another size is resized (nearest) where the aspect agrees, one that fits only the stored pixels turned.
        """
        leaf, position = _leaf(self.source, index)
        name = f"mask of {leaf.name(position)}"
        with reading(name, _FIX):
            if isinstance(leaf, FileSource):
                data = read_regular(self._file(leaf, position))
            else:
                data = self._table(leaf.path)[0].read(position)
            mask = _fitted(*_class_numbers(data), leaf, position)
            return mask if self._dense is None else self._dense[mask]

    def renumber(self, numbers: NDArray[np.int64]) -> None:
        """From now on ``load`` gives 0, 1, ... for these class numbers, and 255 (ignore_index) for all others."""
        self._dense = np.full(256, DEFAULT_IGNORE, dtype=np.uint8)
        self._dense[numbers] = np.arange(len(numbers))
        self.ignore_index = DEFAULT_IGNORE

    def class_numbers(self) -> NDArray[np.int64]:
        """Class numbers that occur, ascending; reads all masks. DataError for fewer than two, or one without a name."""
        counts = sum((np.bincount(self.load(i).ravel(), minlength=256) for i in range(len(self))), np.zeros(256, int))
        held = np.flatnonzero(counts)
        classes = held[held != self.ignore_index]
        where = self.source.description
        if len(classes) < 2:
            numbers = " and ".join(map(str, held.tolist()))
            ignored = f"; {self.ignore_index} is ignored" if self.ignore_index in held else ""
            remedy = "write 1 for the object" if self.ignore_index in held else "give masks of at least two classes"
            raise DataError(f"{where}: its masks hold only {numbers}{ignored}: {remedy}")
        if self.class_names is not None and classes[-1] >= len(self.class_names):
            raise DataError(f"{where}: masks hold class {classes[-1]}, and class_names names {len(self.class_names)}; "
                            "name them all")  # fmt: skip
        return classes

    def _file(self, leaf: FileSource, position: int) -> Path:
        """In a folder beside the last one named images, below it the same."""
        *parts, name = (leaf.base / leaf.names[position]).parts
        stem = os.path.splitext(name)[0]
        place = max((at for at, part in enumerate(parts) if part in IMAGE_FOLDERS), default=-1)
        for kind in MASK_FOLDERS if place >= 0 else ():
            folder = os.path.join(*parts[:place], kind, *parts[place + 1 :])
            if folder not in self._folders:
                self._folders[folder] = _pictures(folder)
            pictures = self._folders[folder]
            found = next((pictures[each] for each in (stem, f"{stem}_mask", name) if each in pictures), None)
            if found is not None:
                return Path(folder, found)
        reason = f"no folder {', '.join(MASK_FOLDERS)} beside {' or '.join(IMAGE_FOLDERS[:2])} holds one"
        raise ValueError(reason) if any(self._folders.values()) else NoMasksError(f"{leaf.description}: {reason}")

    def _table(self, path: Path) -> tuple[ParquetSource, dict[bytes, bytes]]:
        """The masks of a parquet file, and its notes."""
        if path not in self._tables:
            with reading(path, "download or write it again"):
                schema = pq.read_schema(path)
                columns = (name for name in MASK_COLUMNS if name in schema.names)
                name = next((name for name in columns if holds_images(schema.field(name).type)), None)
                if name is None:
                    found = ", ".join(schema.names)
                    raise NoMasksError(f"{path}: no column 'mask' of images (found {found}); segmentation needs masks")
                self._tables[path] = ParquetSource(path, column=name), dict(schema.metadata or {})
        return self._tables[path]


def has_masks(source: ImageSource) -> bool:
    """Whether masks belong to the images of ``source``; DataError where they do and cannot be used."""
    with contextlib.suppress(NoMasksError):
        MaskSet(source)
        return True
    return False


def _leaf(source: ImageSource, index: int) -> tuple[ParquetSource | FileSource, int]:
    """The file-backed source that image ``index`` comes from, and its number there."""
    if isinstance(source, Selection):
        return _leaf(source.source, int(source.indices[index]))
    if isinstance(source, ConcatSource):
        part, position = source.locate(index)
        return _leaf(source.parts[part], position)
    if isinstance(source, ParquetSource | FileSource):
        return source, index
    raise NoMasksError(f"{source.description}: has no masks; give parquet, or folders images/ and masks/")


def _pictures(folder: str) -> dict[str, str]:
    """Names without ending -> names of the pictures in a folder; of two, the one that can be a mask."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return {}
    split = [(os.path.splitext(name), name) for name in names]
    found = [(_PICTURES.index(ending.lower()), stem, name) for (stem, ending), name in split
             if ending.lower() in _PICTURES]  # fmt: skip
    return {stem: name for _, stem, name in sorted(found, reverse=True)}


def _class_numbers(data: bytes) -> tuple[Mask, bool]:
    """The numbers of an encoded mask as they were stored, upright; and whether it has an orientation of its own."""
    with open_image(data) as image:
        if image.format not in _EXACT:
            raise ValueError(f"is {image.format}, which changes class numbers")
        bits, inverted = stored_bits(image, data), False
        if image.format == "TIFF" and image.mode in ("1", "L"):  # Pillow shows them inverted
            inverted = image.tag_v2.get(262) == 0  # type: ignore[attr-defined]
        own = orientation(image)
        image.load()
        shown = np.asarray(ImageOps.exif_transpose(image))
    if shown.ndim == 3:
        colours = shown[:, :, :1] if image.mode in ("LA", "PA") else shown[:, :, :3]
        opaque = image.mode == "RGB" or bool((shown[:, :, -1] == 255).all())
        if image.mode not in ("RGB", "RGBA", "LA") or not opaque or (colours != colours[:, :, :1]).any():
            raise ValueError(f"holds {image.mode} colours, not class numbers")
        shown = colours[:, :, 0]
    if image.mode == "F":
        raise ValueError("holds float values, not class numbers")
    if image.mode == "L" and bits in (2, 4):  # Pillow spreads grey over 0-255
        shown = shown // (255 // (2**bits - 1))
    if inverted:
        shown = ~shown
    largest = int(shown.max(initial=0))
    if largest > 255 or int(shown.min(initial=0)) < 0:
        raise ValueError(f"holds class number {largest}")
    return np.ascontiguousarray(shown, dtype=np.uint8), own > 1


def _fitted(mask: Mask, marked: bool, leaf: ImageSource, position: int) -> Mask:
    try:
        data = leaf.read(position)
        if (array := array_in(data)) is not None:
            stored, way = array.shape[:2], 1
        else:
            with open_image(bytes(data)) as image:
                stored, way = stored_size(image), orientation(image)
    except Exception:  # an unreadable image is left out with its mask
        return mask
    upright = stored[::-1] if way in SIDEWAYS else stored
    as_stored = way > 1 and not marked and _same_shape(mask.shape, stored)
    as_shown = _same_shape(mask.shape, upright)
    if as_stored and as_shown:
        raise ValueError(f"nothing tells whether it goes with the stored or the shown pixels (EXIF orientation {way})")
    if not as_stored and not as_shown:
        sizes = [f"{width}x{height}" for height, width in (mask.shape, upright)]
        raise ValueError(f"is {sizes[0]} px and the image {sizes[1]}")
    picture = Image.fromarray(turned(mask, way) if as_stored else mask)
    if picture.size != upright[::-1]:
        picture = picture.resize(upright[::-1], Image.Resampling.NEAREST)
    return np.asarray(picture)


def _same_shape(one: tuple[int, ...], other: tuple[int, int]) -> bool:
    """Whether two sizes have one aspect, but for a pixel of rounding in the smaller."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= max(*one, *other)
