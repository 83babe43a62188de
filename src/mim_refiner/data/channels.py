"""Images of any number of channels and of 16 bits: decoded as they are, never converted in silence."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageSequence
from torch.nn import functional

Raw = NDArray[np.uint8] | NDArray[np.uint16]  # [H, W, C]
NPY = b"\x93NUMPY"
_MAX_CHANNELS = 4096
_TORCH_SIDE = 64
MAX_PIXELS = 89_478_485  # Pillow's own bound for a warning; a small file can claim any size


class WrongChannelsError(ValueError):
    """A whole image with another number of channels than the encoder takes."""


def read_npy(data: bytes) -> NDArray[Any]:
    """The array in the bytes of a .npy file, without copying; ValueError for objects and for a size that lies."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(file)
    if dtype.hasobject:
        raise ValueError("holds Python objects, not numbers")
    count = int(np.prod([int(side) for side in shape], dtype=object))
    if count * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"an array of shape {shape} does not fit its file")
    flat = np.frombuffer(data, dtype, offset=file.tell())
    return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)


def as_channels_last(array: NDArray[Any]) -> Raw:
    """Check an array [H, W] or [H, W, C] of uint8 or uint16 and give it its channel axis; ValueError otherwise."""
    if array.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"holds {array.dtype} values; save images as uint8 or uint16")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] > _MAX_CHANNELS or 0 in array.shape:
        raise ValueError(f"has shape {array.shape}; an image is [height, width] or [height, width, channels]")
    if array.shape[0] < array.shape[2] and array.shape[0] <= 16 < array.shape[1]:
        raise ValueError(f"has shape {array.shape}, channels first it seems; save it as [height, width, channels]")
    return np.ascontiguousarray(array)


def decode_channels(data: bytes | NDArray[Any], channels: int) -> Raw:
    """Decode to [H, W, channels] uint8 or uint16 as stored; for encoders that do not take RGB.

    Pixels come from .npy bytes, arrays, images of that many bands (grey, grey 16 bit, RGBA, CMYK), multi-page TIFF with
    a band a page, and N-band TIFF where tifffile is installed. Raises ValueError for another number of channels.
    """
    if isinstance(data, np.ndarray):
        pixels = as_channels_last(data)
    elif data[:6] == NPY:
        pixels = as_channels_last(read_npy(data))
    else:
        pixels = _decode_image(data)
    if pixels.shape[2] != channels:
        raise WrongChannelsError(f"has {pixels.shape[2]} channels and the encoder takes {channels}")
    return pixels


def _decode_image(data: bytes) -> Raw:
    try:
        with Image.open(io.BytesIO(data)) as image:
            check_size(image)
            pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
            frames = [_bands(frame) for frame in (ImageSequence.Iterator(image) if pages > 1 else [image])]
    except Exception:
        if data[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            raise
        return _with_tifffile(data)
    if len({frame.shape for frame in frames}) > 1 or (len(frames) > 1 and frames[0].shape[2] > 1):
        raise ValueError(f"has {len(frames)} pages that are no channels of one image")
    return as_channels_last(np.concatenate(frames, axis=2))


def check_size(image: Image.Image) -> None:
    """ValueError for an image, not yet decoded, that claims more pixels than any photograph has."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"claims {image.width}x{image.height} pixels, more than {MAX_PIXELS // 10**6} million")


def _bands(image: Image.Image) -> NDArray[Any]:
    image.load()
    if image.mode in ("1", "P"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    pixels = np.asarray(image)
    if image.mode == "I":  # 32 bits in memory for what a 16-bit file holds
        if pixels.min(initial=0) < 0 or pixels.max(initial=0) > 65535:
            raise ValueError("holds 32-bit values; save images as uint8 or uint16")
        pixels = pixels.astype(np.uint16)
    elif image.mode.startswith("I;16"):
        pixels = pixels.astype(np.uint16)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _with_tifffile(data: bytes) -> Raw:
    try:
        import tifffile
    except ImportError:
        raise ValueError("a TIFF of many bands needs the package tifffile (or save the image as .npy)") from None
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page: Any = file.pages[0]
        held = int(np.prod([int(side) for side in page.shape], dtype=object)) * page.dtype.itemsize
        if len(file.pages) > 1 or held > 2**32:
            raise ValueError("has several pages or more than 4 GB of pixels")
        pixels = page.asarray()
        if page.axes.startswith("S"):  # bands in separate planes
            pixels = np.moveaxis(pixels, 0, -1)
    return as_channels_last(pixels)


def for_display(pixels: Raw) -> NDArray[np.uint8]:
    """Any image as uint8 [H, W, 3] to look at: its upper 8 bits; of N channels the first, middle and last."""
    narrow = (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels.astype(np.uint8, copy=False)
    count = narrow.shape[2]
    return narrow if count == 3 else narrow[:, :, [0, count // 2, count - 1]]


def resize(pixels: Raw, width: int, height: int) -> Raw:
    """Bicubic with antialiasing (Pillow), each channel for itself; the type stays."""
    size, method = (width, height), Image.Resampling.BICUBIC
    if pixels.shape[2] == 3 and pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(pixels).resize(size, method))
    output = np.empty((height, width, pixels.shape[2]), dtype=pixels.dtype)
    for channel in range(pixels.shape[2]):
        plane = np.ascontiguousarray(pixels[:, :, channel])
        if plane.dtype == np.uint8:
            output[:, :, channel] = np.asarray(Image.fromarray(plane).resize(size, method))
        else:  # Pillow resamples 16 bits only as floats
            wide = np.asarray(Image.fromarray(plane.astype(np.float32)).resize(size, method))
            output[:, :, channel] = np.rint(wide).clip(0, 65535)
    return output


def resize_view(pixels: Raw, side: int) -> Raw:
    """:func:`resize` to a square training view; for RGB of 64 px and more by torch's 8-bit kernel.

    That kernel gives Pillow's values to one level of 255 (two in one pixel of ten thousand) in a third of the time.
    Small views stay with Pillow, so that their values are the same on every processor.
    """
    if pixels.shape[2] != 3 or pixels.dtype != np.uint8 or side < _TORCH_SIDE:
        return resize(pixels, side, side)
    if not pixels.flags.writeable:  # torch warns of such arrays
        pixels = pixels.copy()
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # channels last in memory, which the kernel likes
    resized = functional.interpolate(planes, size=(side, side), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def common_type(images: list[Raw]) -> list[Raw]:
    """All uint8, or all uint16: beside 16-bit images those of 8 bits are spread over the whole range."""
    if len({image.dtype for image in images}) == 1:
        return images
    return [image if image.dtype == np.uint16 else image.astype(np.uint16) * np.uint16(257) for image in images]
