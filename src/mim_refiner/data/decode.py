"""The decoded images of a source: the cache in memory, and what happens with unreadable images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import UnidentifiedImageError

from mim_refiner.data.image_files import Reduction, decode_image
from mim_refiner.data.source_base import ImageSource, evenly
from mim_refiner.data.workers import in_threads
from mim_refiner.errors import DataError, reason_of
from mim_refiner.reporting import number_of

Pixels = NDArray[Any]  # [H, W, 3] uint8; for encoders of other channels [H, W, C] uint8 or uint16
CACHE_LIMIT_BYTES = 2 * 10**9
MAX_UNREADABLE_SHARE = 0.1
_WEB = re.compile(r"\b(https?|s3|gs|ftp):/")
_PROBES = 32


@dataclass(frozen=True, slots=True)
class Loaded:
    """An image of a set as it was decoded."""

    index: int
    pixels: Pixels  # [h, w, C]
    shape: tuple[int, int]  # (height, width) at full scale


class ImageSet:
    """Decoded images of a source: ``load(i)`` gives RGB uint8 [H, W, 3].

    ``channels`` other than 3: the pixels as stored, [H, W, channels] uint8 or uint16; others count as unreadable.
    ``cache``: "auto" keeps all in memory when they need less than 2 GB; True and False force it. For an unreadable
    image ``load`` gives the next readable one; ``unreadable`` lists it. Raises DataError when none can be read.
    """

    def __init__(self, source: ImageSource, cache: Literal["auto"] | bool = "auto", *, channels: int = 3) -> None:
        self.source = source
        self.channels = channels
        self.classes, self.labels, self.class_names = source.classes, source.labels, source.class_names
        self.description = source.description
        self._length = len(source)
        self._bad: dict[int, tuple[str, str]] = {}
        self._held: Pixels | list[Pixels | None] | None = None  # [N, H, W, 3] where all images are of one size
        probes = map(self._decode, evenly(self._length, _PROBES).tolist())  # that tell the size of the set, decoded
        sizes = [loaded.pixels.nbytes for loaded in probes if loaded is not None]
        if not sizes and all(self._decode(index) is None for index in range(self._length)):
            _, name, reason = self.unreadable[0]
            raise DataError(f"{self.description}: no image can be read (first: {name}: {reason}); give a source with "
                            "images that can")  # fmt: skip
        estimate = np.mean(sizes) * self._length if sizes else 0
        if cache is True or (cache == "auto" and estimate < CACHE_LIMIT_BYTES):
            self.scan()

    def __len__(self) -> int:
        return self._length

    @property
    def telling_labels(self) -> NDArray[np.int64] | None:
        """The labels, unless all are of one class."""
        return None if self.class_names is None or len(self.class_names) < 2 else self.labels

    @property
    def cached(self) -> bool:
        """True when every image is decoded in memory."""
        return self._held is not None

    @property
    def nbytes(self) -> int:
        """Of the decoded images in memory."""
        if isinstance(self._held, np.ndarray):
            return self._held.nbytes
        return sum(pixels.nbytes for pixels in self._held or () if pixels is not None)

    @property
    def array(self) -> Pixels | None:
        """All images uint8 [N, H, W, 3] when cached and of one size (unreadable ones are zero), else None."""
        return self._held if isinstance(self._held, np.ndarray) else None

    @property
    def unreadable(self) -> list[tuple[int, str, str]]:
        """(index, name, reason) of every image found unreadable so far."""
        return [(index, *self._bad[index]) for index in sorted(self._bad)]

    def add_unreadable(self, items: Iterable[tuple[int, str, str]]) -> None:
        """Take over (index, name, reason) found by a copy of this set in a worker process."""
        for index, name, reason in items:
            self._bad.setdefault(index, (name, reason))

    def facts(self) -> dict[str, Any]:
        """What results and reports record of the data, with the images found unreadable so far."""
        first = [(name, reason) for _, name, reason in self.unreadable[:5]]
        return self.source.facts() | {"unreadable": {"count": len(self._bad), "first": first}}

    def try_load(self, index: int) -> Pixels | None:
        """Return image ``index`` or None when it cannot be read (the failure is recorded)."""
        loaded = self._try_load(index)
        return None if loaded is None else loaded.pixels

    def _try_load(self, index: int, reduction: Reduction | None = None) -> Loaded | None:
        if index in self._bad:
            return None
        if self._held is None:
            return self._decode(index, reduction)
        pixels = self._held[index]
        return None if pixels is None else Loaded(index, pixels, pixels.shape[:2])

    def load_resolved(self, index: int, reduction: Reduction | None = None) -> Loaded:
        """The first readable image at or after ``index`` (cyclic); DataError when more than a tenth are unreadable.

        ``reduction``: how much smaller a JPEG that is not in memory may be decoded.
        """
        while (loaded := self._try_load(index, reduction)) is None:
            self.raise_if_too_many_unreadable()
            index = (index + 1) % self._length
        return loaded

    def load(self, index: int) -> Pixels:
        """Return image ``index``, or the next readable one when it is damaged."""
        return self.load_resolved(index).pixels

    def raise_if_too_many_unreadable(self) -> None:
        """Raise DataError when more than 10 % of the images are known to be unreadable."""
        count = len(self._bad)
        if count > MAX_UNREADABLE_SHARE * self._length:
            _, name, reason = self.unreadable[0]
            raise DataError(
                f"{self.description}: {count} of {number_of(self._length, 'images')} cannot be read, more than 10 % "
                f"(first: {name}: {reason}); repair or remove them"
            )

    def _decode(self, index: int, reduction: Reduction | None = None) -> Loaded | None:
        try:
            pixels, shape = decode_image(self.source.read(index), self.channels, reduction)
            if pixels.size == 0:
                raise ValueError("the image has no pixels")
            return Loaded(index, pixels, shape)
        except Exception as error:  # decoders raise almost anything on damaged input
            self._bad[index] = (self.source.name(index), why_unreadable(error))
            return None

    def scan(self) -> None:
        """Decode every image into memory, with threads, and so find all unreadable ones."""
        array, images, uniform = None, list[Pixels | None](), True
        decoded = in_threads(self._decode, self._length, min(8, os.cpu_count() or 1))
        for index, pixels in enumerate(None if loaded is None else loaded.pixels for loaded in decoded):
            if uniform and pixels is not None:
                array = np.zeros((self._length, *pixels.shape), dtype=pixels.dtype) if array is None else array
                uniform = pixels.shape == array.shape[1:] and pixels.dtype == array.dtype
                if uniform:
                    array[index] = pixels
                    pixels = array[index]
            images.append(pixels)
        self._held = array if uniform else images
        self.source.close()

    def __getstate__(self) -> dict[str, Any]:
        # A worker with the decoded images has no use for the encoded ones.
        return {**self.__dict__, "source": None} if self.cached else dict(self.__dict__)


def why_unreadable(error: Exception) -> str:
    """In a few words of one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image file of a known kind, or a damaged one"
    if isinstance(error, FileNotFoundError):
        web = _WEB.search(os.fsdecode(error.filename or ""))
        return "is a web address; download the images first" if web else "no such file"
    return reason_of(error)
