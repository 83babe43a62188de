"""The one place that opens image files: raster formats by list, pixels by what the file says of them.

Bit depth, sample format, photometric interpretation and EXIF orientation decide what a number means, never the largest
number in the image. What has no sure meaning as 8- or 16-bit brightness is refused with the reason.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from mim_refiner.core.pictures import on_white, upright
from mim_refiner.data.channels import (
    MAX_CHANNELS,
    MAX_PIXELS,
    Raw,
    Stored,
    TooLargeError,
    UnusableImageError,
    WrongChannelsError,
    array_in,
    as_channels_last,
    common_type,
    wrong_channels,
)
from mim_refiner.errors import install

# Formats with a signature of their own. Pillow knows more, among them EPS, for which it starts Ghostscript.
_KNOWN = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TIFF", "WEBP")
Image.init()
_FORMATS = tuple(name for name in _KNOWN if name in Image.OPEN)  # that can be read here
IMAGE_SUFFIXES = frozenset(ending for ending, name in Image.EXTENSION.items() if name in _FORMATS)  # ".jpg", ...
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_MAX_BYTES = 2**32
_BITS, _PHOTOMETRIC = TiffImagePlugin.BITSPERSAMPLE, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION
_SUBFILE, _SUBSAMPLING = 254, 530
_SAMPLE_KINDS = {2: "signed", 3: "float", 5: "complex", 6: "complex"}
_PIL_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
Reduction = Callable[[int, int], int]  # (height, width) of an upright image -> decode at 1/1, 1/2, 1/4 or 1/8

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # or its remarks on odd files reach the terminal


@contextlib.contextmanager
def open_image(data: bytes) -> Iterator[Image.Image]:
    """Open an encoded image without decoding it; a Pillow error or OSError for what is no whole image.

    Raises UnusableImageError for pixels that are no brightness, TooLargeError for more than any photograph has.
    """
    if _PIL_WARNINGS not in warnings.filters:  # catch_warnings is not for threads
        warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:
        raise TooLargeError(f"claims more than {MAX_PIXELS // 10**6} million pixels") from None
    except UnidentifiedImageError:
        if data[:4] in _TIFF_STARTS:
            _check_tiff(_tiff_tags(data))
        raise
    with image:
        if image.width * image.height > MAX_PIXELS:
            pixels = f"{image.width}x{image.height} pixels"
            raise TooLargeError(f"claims {pixels}, more than {MAX_PIXELS // 10**6} million")
        if image.format == "TIFF":
            _check_tiff(image)
        yield image


def decode_image(data: Stored, channels: int = 3, reduction: Reduction | None = None) -> tuple[Raw, tuple[int, int]]:
    """Decode to upright pixels [H, W, channels], and height and width at full scale (JPEGs: ``reduction`` smaller).

    ``data``: an encoded image, .npy bytes, or an array [H, W] or [H, W, C]. For 3 channels RGB uint8: grey, palette and
    CMYK are converted, transparency is shown on white, 16 bits keep their upper 8. For others the bands as stored,
    uint8 or uint16; a TIFF may have a band a page. Of an animation the first frame. Raises as :func:`open_image`.
    """
    if (array := array_in(data)) is not None:
        pixels = as_channels_last(array)
        return _fitting(pixels, channels), pixels.shape[:2]
    assert isinstance(data, bytes)
    try:
        with open_image(data) as image:
            pages = _pages(image)
            if len(pages) == 1 and not _beyond_pillow(image, channels):
                return _decode_one(image, channels, reduction)
            if len(pages) > 1 and channels == 3:
                raise WrongChannelsError(f"has {len(pages)} pages (channels?) and the encoder takes RGB; save one page")
            if image.width * image.height * len(pages) * 2 > _MAX_BYTES:
                raise TooLargeError("claims more than 4 GB of pixels")
            frames = [_frame(image, page) for page in pages] if len(pages) > 1 else []
    except UnidentifiedImageError:
        if data[:4] not in _TIFF_STARTS:
            raise
        frames = []
    if not frames:
        pixels = _with_tifffile(data, channels)
    elif len({frame.shape for frame in frames}) > 1 or frames[0].shape[2] > 1:
        raise UnusableImageError(f"has {len(frames)} pages that are no channels of one image; save one page")
    else:
        pixels = as_channels_last(np.concatenate(common_type(frames), axis=2))
    return _fitting(pixels, channels), pixels.shape[:2]


def _decode_one(image: Image.Image, channels: int, reduction: Reduction | None) -> tuple[Raw, tuple[int, int]]:
    full, sideways = None, False
    if reduction is not None and image.format in ("JPEG", "MPO"):  # MPO: a phone's JPEG with more pictures behind
        sideways = orientation(image) in SIDEWAYS
        full = image.size if sideways else image.size[::-1]
        factor = reduction(*full)
        if factor > 1:  # libjpeg leaves out the high frequencies: a half costs a third of the time
            image.draft(image.mode, (image.width // factor, image.height // factor))
    image.load()  # damaged pixels raise here, before the metadata is looked at
    turned = upright(image)
    if full is not None and sideways and turned is image:  # could not be turned
        full = full[::-1]
    pixels = _to_rgb(turned, image) if channels == 3 else _fitting(_bands(turned, image), channels)
    return pixels, full or pixels.shape[:2]


def pixels_of(image: Image.Image) -> NDArray[Any]:
    """Upright pixels [H, W, C] of a picture in memory: of one channel where it is grey, else RGB."""
    grey = image.mode in ("1", "L") or image.mode.startswith("I")
    return _decode_one(image, 1 if grey else 3, None)[0]


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (as stored) to 8; 1 where there is none or it cannot be read."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as in upright
        return 1
    return int(found) if isinstance(found, int) and 1 <= found <= 8 else 1


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Height and width as the file has them; Pillow turns those of a TIFF when it opens it."""
    if image.format == "TIFF":
        return _tag(image, TiffImagePlugin.IMAGELENGTH, 0)[0], _tag(image, TiffImagePlugin.IMAGEWIDTH, 0)[0]
    return image.height, image.width


def stored_bits(image: Image.Image, data: bytes) -> int:
    """Bits a channel as the file stores them: Pillow opens 16-bit colour as 8-bit RGB without a word."""
    if image.format == "PNG" and len(data) > 24:
        return data[24]  # bit depth in the IHDR chunk
    return max(_tag(image, _BITS, 1)) if image.format == "TIFF" else 8


def _wide(turned: Image.Image, image: Image.Image) -> NDArray[Any]:
    """A grey image of more than 8 bits, spread over 16; ``image``: as it was opened, with what the file says."""
    bits, inverted = 16, False  # PNG, PPM and JPEG 2000 are scaled to 16 bits by their decoders
    if image.format == "TIFF":
        bits, inverted = max(_tag(image, _BITS, 1)), _tag(image, _PHOTOMETRIC, 1) == (0,)
    pixels = _spread(np.asarray(turned).astype(np.uint16), bits)
    return ~pixels if inverted else pixels


def _spread(pixels: NDArray[Any], bits: int) -> NDArray[Any]:
    """Values of 9 to 15 bits over the whole range of 16."""
    return (pixels << (16 - bits)) | (pixels >> (2 * bits - 16)) if 8 < bits < 16 else pixels


def _to_rgb(turned: Image.Image, image: Image.Image) -> NDArray[np.uint8]:
    if turned.mode == "F":
        raise UnusableImageError("holds float values; save it as uint8 or uint16")
    if turned.mode.startswith("I"):
        wide = _wide(turned, image)
        narrow = (wide >> 8).astype(np.uint8)
        if isinstance(hidden := turned.info.get("transparency"), int):
            narrow[wide == hidden] = 255
        return np.repeat(narrow[:, :, None], 3, axis=2)
    if turned.mode == "LAB":
        raise UnusableImageError("is stored in CIELAB colours; save it as RGB")
    return np.array(on_white(turned))


def _bands(turned: Image.Image, image: Image.Image) -> Raw:
    if turned.mode.startswith("I"):
        return _wide(turned, image)[:, :, None]
    if turned.mode in ("1", "P"):
        turned = turned.convert("L" if turned.mode == "1" else "RGB")
    pixels = np.asarray(turned)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _fitting(pixels: NDArray[Any], channels: int) -> NDArray[Any]:
    """The pixels for an encoder of so many channels: an RGB one takes grey too, and 8 bits."""
    if channels == 3 and pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if channels == 3 and pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] != channels:
        raise wrong_channels(pixels.shape[2], channels)
    return pixels


def _tag(tiff: Image.Image | Mapping[int, Any], number: int, default: int) -> tuple[int, ...]:
    tags: Any = getattr(tiff, "tag_v2", tiff)
    found = tags.get(number, default)
    return tuple(int(each) for each in (found if isinstance(found, tuple) else (found,))) or (default,)


def _tiff_tags(data: bytes) -> dict[int, Any]:
    """The tags of a TIFF that Pillow does not take, as far as they can be read."""
    with contextlib.suppress(Exception):
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if data[2] == 43 else 8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        return dict(tags)
    return {}


def _check_tiff(tiff: Image.Image | Mapping[int, Any]) -> None:
    bits = max(_tag(tiff, _BITS, 1))
    kinds = set(_tag(tiff, TiffImagePlugin.SAMPLEFORMAT, 1))
    if bits > 16 or kinds & _SAMPLE_KINDS.keys():
        kind = next((_SAMPLE_KINDS[kind] for kind in kinds if kind in _SAMPLE_KINDS), "integer")
        raise UnusableImageError(f"holds {bits}-bit {kind} values; save it as uint8 or uint16")
    uncompressed = _tag(tiff, TiffImagePlugin.COMPRESSION, 1) == (1,)
    if _tag(tiff, _PHOTOMETRIC, 1) == (6,) and uncompressed and _tag(tiff, _SUBSAMPLING, 2) != (1, 1):
        raise UnusableImageError("is stored in subsampled YCbCr colours; save it as RGB")


def _pages(image: Image.Image) -> list[int]:
    """The pages of a TIFF but for thumbnails and masks, the first one sought; [0] for all else."""
    if image.format != "TIFF":
        return [0]
    pages = []
    for page in range(MAX_CHANNELS + 1):
        try:
            image.seek(page)
        except EOFError:
            break
        if not _tag(image, _SUBFILE, 0)[0] & 5:
            pages.append(page)
    pages = pages or [0]
    image.seek(pages[0])
    _check_tiff(image)
    return pages


def _beyond_pillow(image: Image.Image, channels: int) -> bool:
    """Whether Pillow would read this TIFF in part or wrongly; raises where no other reader would help."""
    if image.format != "TIFF":
        return False
    samples, deep = _tag(image, TiffImagePlugin.SAMPLESPERPIXEL, 1)[0], max(_tag(image, _BITS, 1)) > 8
    if samples > len(image.getbands()) and channels == 3:
        raise wrong_channels(samples, channels)
    planar = _tag(image, TiffImagePlugin.PLANAR_CONFIGURATION, 1) == (2,)
    return samples > len(image.getbands()) or (samples > 1 and deep and (channels != 3 or planar))


def _frame(image: Image.Image, page: int) -> Raw:
    image.seek(page)
    _check_tiff(image)
    image.load()
    return _bands(upright(image), image)


def _with_tifffile(data: bytes, channels: int) -> NDArray[Any]:
    try:
        import tifffile
    except ImportError:
        raise UnusableImageError(f"such a TIFF needs tifffile; save as .npy, or: {install('tiff')}") from None
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page: Any = file.pages[0]
        held = int(np.prod([int(side) for side in page.shape], dtype=object)) * page.dtype.itemsize
        if len(file.pages) > 1 or held > _MAX_BYTES:
            raise UnusableImageError("has several pages or more than 4 GB of pixels; save one page")
        if channels == 3 and page.photometric not in (0, 1, 2):
            raise UnusableImageError(f"is stored in {page.photometric.name} colours; save it as RGB")
        pixels = page.asarray(maxworkers=1)
        if page.axes.startswith("S"):  # bands in separate planes
            pixels = np.moveaxis(pixels, 0, -1)
        pixels = _spread(as_channels_last(pixels), page.bitspersample)
        turn = page.tags.get(274)
        pixels = turned(pixels, turn.value if turn else 1)
        return ~pixels if page.photometric == 0 else pixels


def turned(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """As EXIF orientation 1 to 8 says that stored pixels are shown."""
    if orientation in SIDEWAYS:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
