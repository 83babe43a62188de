"""Pixel arrays of any number of channels, of 8 or 16 bits: NumPy files, what counts as pixels, how they are resized."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from mim_refiner.errors import DataError
from mim_refiner.files import reading
from mim_refiner.reporting import number_of

NPY, _ZIP = b"\x93NUMPY", b"PK"
_FIX = "save it again with numpy.save or numpy.savez"
_MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**63  # bytes
_DEFLATE_LIMIT = 1100  # times smaller than its content is no deflated file
Stored = bytes | NDArray[Any]  # what a source gives: an encoded image, or pixels
Raw = NDArray[np.uint8] | NDArray[np.uint16]  # [H, W, C]
MAX_CHANNELS = 4096
_TORCH_SIDE = 64
MAX_PIXELS = 89_478_485  # Pillow's own bound for a warning; a small file can claim any size


class UnusableImageError(ValueError):
    """A whole image whose pixels cannot be used as they are; ``kind``: what doctor calls it."""

    kind = "unusable"


class TooLargeError(UnusableImageError):
    """More pixels than any photograph has."""

    kind = "huge"


class WrongChannelsError(UnusableImageError):
    """Another number of channels than the encoder takes."""

    kind = "channels"


def wrong_channels(found: int, wanted: int) -> WrongChannelsError:
    """The error that names both numbers."""
    remedy = f"save {'RGB' if wanted == 3 else 'such'} images or take an encoder of {number_of(found, 'channels')}"
    takes = f"{wanted} (RGB)" if wanted == 3 else wanted
    return WrongChannelsError(f"has {number_of(found, 'channels')} and the encoder takes {takes}; {remedy}")


def as_channels_last(array: NDArray[Any]) -> Raw:
    """Check an array [H, W] or [H, W, C] of uint8 or uint16 and give it its channel axis; ValueError otherwise."""
    if not is_pixels(array.dtype):
        raise UnusableImageError(f"holds {array.dtype} values; save images as uint8 or uint16")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] > MAX_CHANNELS or 0 in array.shape:
        raise ValueError(f"has shape {array.shape}; an image is [height, width] or [height, width, channels]")
    if array.shape[0] < array.shape[2] and array.shape[0] <= 16 < array.shape[1]:
        raise ValueError(f"has shape {array.shape}, channels first it seems; save it as [height, width, channels]")
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def is_pixels(dtype: np.dtype[Any]) -> bool:
    """Whether an array holds 8 or 16 unsigned bits, whatever the byte order."""
    return dtype.kind == "u" and dtype.itemsize <= 2


def for_display(pixels: Raw) -> NDArray[np.uint8]:
    """Any image as uint8 [H, W, 3] to look at: its upper 8 bits; of N channels the first, middle and last."""
    narrow = (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels.astype(np.uint8, copy=False)
    count = narrow.shape[2]
    return narrow if count == 3 else narrow[:, :, [0, count // 2, count - 1]]


def resize(pixels: Raw, width: int, height: int, box: tuple[float, float, float, float] | None = None) -> Raw:
    """Bicubic with antialiasing (Pillow), each channel for itself; the type stays. ``box``: left, top, right, low."""
    size, method = (width, height), Image.Resampling.BICUBIC
    if pixels.shape[2] == 3 and pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(pixels).resize(size, method, box))
    output = np.empty((height, width, pixels.shape[2]), dtype=pixels.dtype)
    for channel in range(pixels.shape[2]):
        plane = np.ascontiguousarray(pixels[:, :, channel])
        if plane.dtype == np.uint16:  # which Pillow resamples only as floats
            plane = plane.astype(np.float32)
        resized = np.asarray(Image.fromarray(plane).resize(size, method, box))
        output[:, :, channel] = np.rint(resized).clip(0, 65535) if plane.dtype == np.float32 else resized
    return output


def resize_view(pixels: Raw, height: int, width: int) -> Raw:
    """:func:`resize` to a training view; for RGB of 64 px and more by torch's 8-bit kernel.

    That gives Pillow's values to one level of 255 in a third of the time. Small views are the same on every processor.
    """
    if pixels.shape[2] != 3 or pixels.dtype != np.uint8 or min(height, width) < _TORCH_SIDE:
        return resize(pixels, width, height)
    if not pixels.flags.writeable:  # torch warns of such arrays
        pixels = pixels.copy()
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # channels last in memory, which the kernel likes
    resized = functional.interpolate(planes, size=(height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def common_type(images: list[Raw]) -> list[Raw]:
    """All uint8, or all uint16: beside 16-bit images those of 8 bits are spread over the whole range."""
    if len({image.dtype for image in images}) == 1:
        return images
    return [image if image.dtype == np.uint16 else image.astype(np.uint16) * np.uint16(257) for image in images]


# --- NumPy files of others, read without trust: no objects, no size that the file does not hold, no more than memory


def first_array(path: Path, names: Sequence[str]) -> tuple[NDArray[Any] | None, list[str]]:
    """The first of ``names`` in a .npz, or the memory-mapped .npy ("images"); and all names. DataError if unsound."""
    with reading(path, _FIX), path.open("rb") as file:
        start = file.read(6)
        if start == NPY:
            return np.load(path, mmap_mode="r", allow_pickle=False), ["images"]
        if start[:2] != _ZIP:
            raise ValueError("neither an .npz nor an .npy file")
        with zipfile.ZipFile(file) as archive:
            held = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            name = next((name for name in names if name in held), None)
            return None if name is None else _unpacked(path, archive, name, held[name]), list(held)


def _unpacked(path: Path, archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(info) as file:
        if info.file_size > _DEFLATE_LIMIT * info.compress_size + 2**20 or info.compress_type not in (0, 8):
            raise ValueError(f"array '{name}' claims {info.file_size} bytes")
        shape = _checked_shape(file, info.file_size)
        if info.file_size > _MEMORY:
            raise DataError(f"{path}: array '{name}' of shape {shape} needs {info.file_size / 1e9:.0f} GB of memory; "
                            "save the images as .npy, which is read piece by piece")  # fmt: skip
        return _read(file)


def array_in(data: Stored) -> NDArray[Any] | None:
    """``data`` where it is an array or a (sound, else ValueError) .npy file; None for an encoded picture."""
    if isinstance(data, np.ndarray) or data[:6] != NPY:
        return data if isinstance(data, np.ndarray) else None
    file = io.BytesIO(data)
    _checked_shape(file, len(data))
    return _read(file)


def _checked_shape(file: IO[bytes], size: int) -> tuple[int, ...]:
    """What the header of a .npy file of ``size`` bytes says, where it fits."""
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(file)
    if dtype.hasobject:
        raise ValueError("holds Python objects, not numbers")
    count = int(np.prod([int(side) for side in shape], dtype=object))
    if count * dtype.itemsize != size - file.tell():
        raise ValueError(f"an array of shape {shape} does not fit its file")
    return shape


def _read(file: IO[bytes]) -> NDArray[Any]:
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)
