"""Segmentation masks that belong to the images of a source: a parquet column ``mask``, or files beside the images."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from mim_refiner.data.source_base import ConcatSource, ImageSource, SlicedSource
from mim_refiner.data.source_files import FileSource
from mim_refiner.data.source_parquet import ParquetSource
from mim_refiner.errors import DataError

Mask = NDArray[np.uint8]  # [H, W] class numbers
MASK_FOLDERS = ("masks", "annotations", "labels")
DEFAULT_IGNORE = 255


class MaskSet:
    """``load(i)`` gives the mask uint8 [H, W] of image i of a source; ``ignore_index`` marks pixels without a class.

    Parquet: column ``mask`` (PNG bytes), schema metadata ``ignore_index`` and ``class_names``. Folder: every
    images/NAME has a masks/NAME.png (or annotations/, labels/). Raises DataError when a source has no masks.
    """

    def __init__(self, source: ImageSource) -> None:
        self.source = source
        self._columns: dict[Path, tuple[Any, dict[bytes, bytes]]] = {}
        leaf, _ = _leaf(source, 0)
        metadata = self._column(leaf.path)[1] if isinstance(leaf, ParquetSource) else {}
        self.ignore_index = int(metadata.get(b"ignore_index", b"%d" % DEFAULT_IGNORE))
        names = metadata.get(b"class_names")
        self.class_names: tuple[str, ...] | None = tuple(json.loads(names)) if names else None
        self.load(0)

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> Mask:
        """Mask of image ``index``; DataError when it is missing or no image of class numbers."""
        leaf, position = _leaf(self.source, index)
        try:
            if isinstance(leaf, ParquetSource):
                data = self._column(leaf.path)[0][position].as_py()
            else:
                data = _mask_file(leaf, position).read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                mask = np.asarray(image)
        except (OSError, TypeError) as error:
            raise DataError(
                f"{leaf.name(position)}: no readable mask ({error}); give a parquet column 'mask' or a folder masks/"
            ) from None
        if mask.ndim != 2 or mask.dtype != np.uint8:
            raise DataError(f"{leaf.name(position)}: the mask must hold one class number (0-255) a pixel")
        return mask

    def num_classes(self) -> int:
        """Number of class names, else the largest class number in any mask + 1."""
        if self.class_names is not None:
            return len(self.class_names)
        largest = 0
        for index in range(len(self)):
            mask = self.load(index)
            largest = max(largest, int(mask[mask != self.ignore_index].max(initial=0)))
        return largest + 1

    def _column(self, path: Path) -> tuple[Any, dict[bytes, bytes]]:
        if path not in self._columns:
            schema = pq.read_schema(path)
            if "mask" not in schema.names:
                raise DataError(f"{path}: no column 'mask' (found {', '.join(schema.names)}); segmentation needs masks")
            column = pq.read_table(path, columns=["mask"], use_threads=False).column("mask")
            self._columns[path] = column, dict(schema.metadata or {})
        return self._columns[path]


def has_masks(source: ImageSource) -> bool:
    """Whether masks belong to the images of ``source``."""
    try:
        MaskSet(source)
    except DataError:
        return False
    return True


def _leaf(source: ImageSource, index: int) -> tuple[ParquetSource | FileSource, int]:
    """The file-backed source that image ``index`` comes from, and its number there."""
    if isinstance(source, SlicedSource):
        return _leaf(source.source, source.indices[index])
    if isinstance(source, ConcatSource):
        part, position = source.locate(index)
        return _leaf(part, position)
    if isinstance(source, ParquetSource | FileSource):
        return source, index
    raise DataError(
        f"{source.description}: this kind of source has no masks; give parquet or folders images/ and masks/"
    )


def _mask_file(source: FileSource, index: int) -> Path:
    path = Path(source.root) / source.names[index]
    parts = list(path.parts)
    if "images" in parts:
        place = len(parts) - 1 - parts[::-1].index("images")
        for folder in MASK_FOLDERS:
            found = Path(*parts[:place], folder, *parts[place + 1 :]).with_suffix(".png")
            if found.exists():
                return found
    raise FileNotFoundError(f"no {' or '.join(MASK_FOLDERS)} folder beside images/ holds it")
