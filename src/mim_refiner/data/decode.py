"""From encoded images to RGB arrays: decoding, the cache in memory, and what happens with unreadable images."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mim_refiner.data.channels import NPY, WrongChannelsError, as_channels_last, check_size, decode_channels, read_npy
from mim_refiner.data.source_base import ImageSource, Labels
from mim_refiner.errors import DataError

Pixels = NDArray[Any]  # [H, W, 3] uint8; for encoders of other channels [H, W, C] uint8 or uint16
CACHE_LIMIT_BYTES = 2 * 10**9
MAX_UNREADABLE_SHARE = 0.1
Reduction = Callable[[int, int], int]  # (height, width) of an upright image -> decode at 1/1, 1/2, 1/4 or 1/8
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_PROBES = 32  # images decoded to estimate the size of the whole set
_CHUNK = 1024


def decode_rgb(data: bytes | NDArray[Any]) -> Pixels:
    """Decode an encoded image, .npy bytes, or an array [H, W] or [H, W, C], to RGB uint8 [H, W, 3].

    EXIF rotation is applied; grayscale, palette and CMYK are converted; transparency is shown on white; 16-bit
    images keep their upper 8 bits. Arrays of other than 1 or 3 channels and TIFF files of several pages are refused,
    as nobody knows which channels to leave out. Raises OSError, ValueError or a Pillow error when the data is not a
    whole image.
    """
    return _decode_shape(data, None)[0]


def _decode_shape(data: bytes | NDArray[Any], reduction: Reduction | None) -> tuple[Pixels, tuple[int, int]]:
    """:func:`decode_rgb`, for JPEGs at the scale that ``reduction`` allows, and height and width at full scale."""
    if isinstance(data, np.ndarray) or data[:6] == NPY:
        pixels = _array_to_rgb(as_channels_last(data if isinstance(data, np.ndarray) else read_npy(data)))
        return pixels, pixels.shape[:2]
    with Image.open(io.BytesIO(data)) as image:
        check_size(image)
        if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
            raise WrongChannelsError(f"has {image.n_frames} pages (channels?) and the encoder takes RGB")  # type: ignore[attr-defined]
        full, sideways = None, False
        if reduction is not None and image.format in ("JPEG", "MPO"):  # MPO: a phone's JPEG with more pictures behind
            sideways = _sideways(image)
            full = image.size if sideways else image.size[::-1]
            factor = reduction(*full)
            if factor > 1:  # libjpeg leaves out the high frequencies: a half costs a third of the time
                image.draft(image.mode, (image.width // factor, image.height // factor))
        image.load()  # damaged pixels raise here, before the metadata is looked at
        upright = _upright(image)
        if full is not None and sideways and upright is image:  # could not be turned
            full = full[::-1]
        pixels = _to_rgb(upright)
        return pixels, full or pixels.shape[:2]


def _array_to_rgb(pixels: Pixels) -> Pixels:
    if pixels.shape[2] not in (1, 3):
        raise WrongChannelsError(f"has {pixels.shape[2]} channels and the encoder takes 3 (RGB)")
    narrow = pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)
    return narrow if narrow.shape[2] == 3 else np.repeat(narrow, 3, axis=2)


def _sideways(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
    except Exception:  # as in _upright
        return False


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken metadata around whole pixels: show them as they are
        return image  # the same object, which tells the caller


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        narrow = (wide >> 8 if wide.max(initial=0) > 255 else wide).clip(0, 255).astype(np.uint8)
        return np.repeat(narrow[:, :, None], 3, axis=2)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


@dataclass(frozen=True, slots=True)
class Loaded:
    """An image of a set as it was decoded."""

    index: int
    pixels: Pixels  # [h, w, C]
    shape: tuple[int, int]  # (height, width) at full scale


class ImageSet:
    """Decoded images of a source: ``load(i)`` gives RGB uint8 [H, W, 3].

    ``channels`` other than 3: the pixels as stored, [H, W, channels] uint8 or uint16; images of another number of
    channels count as unreadable.
    ``cache``: "auto" keeps all decoded images in memory when they need less than 2 GB; True and False force it.
    An unreadable image never raises: ``load`` gives the next readable one instead and the failure is listed in
    ``unreadable`` as (name, reason). Raises DataError when no image can be read.
    """

    def __init__(self, source: ImageSource, cache: Literal["auto"] | bool = "auto", *, channels: int = 3) -> None:
        self.source = source
        self.channels = channels
        self.labels: Labels | None = source.labels
        self.class_names = source.class_names
        self.description = source.description
        self._length = len(source)
        self._bad: dict[int, tuple[str, str]] = {}
        self._array: Pixels | None = None  # [N, H, W, 3], all images of one size
        self._list: list[Pixels | None] | None = None
        estimate = self._estimate_bytes()
        if cache is True or (cache == "auto" and estimate < CACHE_LIMIT_BYTES):
            self.scan()

    def __len__(self) -> int:
        return self._length

    @property
    def cached(self) -> bool:
        """True when every image is decoded in memory."""
        return self._array is not None or self._list is not None

    @property
    def array(self) -> Pixels | None:
        """All images uint8 [N, H, W, 3] when cached and of one size (unreadable ones are zero), else None."""
        return self._array

    @property
    def unreadable(self) -> list[tuple[str, str]]:
        """(name, reason) of every image found unreadable so far, in index order."""
        return [self._bad[index] for index in sorted(self._bad)]

    @property
    def unreadable_indices(self) -> list[int]:
        """Indices of the images found unreadable so far."""
        return sorted(self._bad)

    def add_unreadable(self, items: Iterable[tuple[int, str, str]]) -> None:
        """Take over (index, name, reason) found by a copy of this set in a worker process."""
        for index, name, reason in items:
            self._bad.setdefault(index, (name, reason))

    def unreadable_items(self) -> list[tuple[int, str, str]]:
        """(index, name, reason) of every image found unreadable so far."""
        return [(index, *self._bad[index]) for index in sorted(self._bad)]

    def try_load(self, index: int) -> Pixels | None:
        """Return image ``index`` or None when it cannot be read (the failure is recorded)."""
        loaded = self._try_load(index)
        return None if loaded is None else loaded.pixels

    def _try_load(self, index: int, reduction: Reduction | None = None) -> Loaded | None:
        if index in self._bad:
            return None
        if not self.cached:
            return self._decode(index, reduction)
        pixels = self._array[index] if self._array is not None else self._list[index]  # type: ignore[index]
        return None if pixels is None else Loaded(index, pixels, pixels.shape[:2])

    def load_resolved(self, index: int, reduction: Reduction | None = None) -> Loaded:
        """Return the first readable image at or after ``index`` (cyclic) with its own index.

        ``reduction``: how much smaller a JPEG that is not in memory may be decoded. Raises DataError when more than a
        tenth of the set is unreadable.
        """
        for offset in range(self._length):
            candidate = (index + offset) % self._length
            loaded = self._try_load(candidate, reduction)
            if loaded is not None:
                return loaded
            self.raise_if_too_many_unreadable()
        raise self._nothing_readable()

    def load(self, index: int) -> Pixels:
        """Return image ``index``, or the next readable one when it is damaged."""
        return self.load_resolved(index).pixels

    def raise_if_too_many_unreadable(self) -> None:
        """Raise DataError when more than 10 % of the images are known to be unreadable."""
        count = len(self._bad)
        if count > MAX_UNREADABLE_SHARE * self._length:
            name, reason = self.unreadable[0]
            raise DataError(
                f"{self.description}: {count} of {self._length} images cannot be read, more than 10 % "
                f"(first: {name}: {reason}); repair or remove them"
            )

    def _decode(self, index: int, reduction: Reduction | None = None) -> Loaded | None:
        try:
            data = self.source.read(index)
            if self.channels == 3:
                pixels, shape = _decode_shape(data, reduction)
            else:
                pixels = decode_channels(data, self.channels)
                shape = pixels.shape[:2]
            if pixels.size == 0:
                raise ValueError("the image has no pixels")
            return Loaded(index, pixels, shape)
        except Exception as error:  # decoders raise almost anything on damaged input
            self._bad[index] = (self.source.name(index), _reason(error))
            return None

    def _estimate_bytes(self) -> int:
        """Estimate the decoded size of the set from a few images spread over it."""
        indices = sorted({int(i) for i in np.linspace(0, self._length - 1, min(_PROBES, self._length))})
        sizes = [loaded.pixels.nbytes for loaded in map(self._decode, indices) if loaded is not None]
        if not sizes and all(self._decode(index) is None for index in range(self._length)):
            raise self._nothing_readable()
        return int(np.mean(sizes) * self._length) if sizes else 0

    def _nothing_readable(self) -> DataError:
        name, reason = self.unreadable[0]
        return DataError(
            f"{self.description}: no image can be read (first: {name}: {reason}); give a source with whole images"
        )

    def scan(self) -> None:
        """Decode every image into memory, with threads, and so find all unreadable ones. Does nothing when cached."""
        if self.cached:
            return
        array: Pixels | None = None
        images: list[Pixels | None] = []
        uniform = True
        for index, pixels in enumerate(self._decode_all()):
            if uniform and pixels is not None:
                array = np.zeros((self._length, *pixels.shape), dtype=pixels.dtype) if array is None else array
                uniform = pixels.shape == array.shape[1:] and pixels.dtype == array.dtype
                if uniform:
                    array[index] = pixels
                    pixels = array[index]
            images.append(pixels)
        self._array, self._list = (array, None) if uniform else (None, images)
        self.source.close()

    def _decode_all(self) -> Iterator[Pixels | None]:
        threads = min(8, os.cpu_count() or 1)
        if self._length:
            self._decode(0)  # opens the source once, before the threads share it
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, self._length, _CHUNK):
                chunk = pool.map(self._decode, range(start, min(start + _CHUNK, self._length)))
                yield from (None if loaded is None else loaded.pixels for loaded in chunk)

    def __getstate__(self) -> dict[str, Any]:
        # A worker with the decoded images has no use for the encoded ones.
        return {**self.__dict__, "source": None} if self.cached else dict(self.__dict__)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image file, or a damaged one"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return (str(error).splitlines() or [""])[0] or type(error).__name__
