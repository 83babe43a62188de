"""Look at every image of a source, once, before a run: what cannot be read, what a training would stumble over."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mim_refiner.data.channels import Raw, UnusableImageError, array_in, as_channels_last, for_display
from mim_refiner.data.decode import why_unreadable
from mim_refiner.data.image_files import decode_image, open_image, stored_bits
from mim_refiner.data.source_base import ImageSource
from mim_refiner.data.workers import in_threads

HUGE_PIXELS = 50_000_000  # judged from the header, never decoded
TINY_SIDE = 16  # pixels; in a set of large images an eighth of the median side
CONSTANT_STD = 2.0  # of 255, in every channel
LONG_ASPECT = 8.0
DRAFT_SIDE = 256  # large JPEGs are decoded at reduced size
THUMB = 16  # side of the thumbnails that duplicates are compared by
STATISTICS_SIDE = 64  # pixels a side that enter mean and std

# kind: (left out of training by the written list, what it means and what to do)
KINDS: dict[str, tuple[bool, str]] = {
    "unreadable": (True, "not an image; training would skip it"),
    "empty": (True, "no bytes; copy the file again"),
    "truncated": (True, "begins like an image and breaks off or is damaged; copy or download it again"),
    "unusable": (True, "whole, but its pixels have no sure meaning; training would skip it; convert it"),
    "channels": (True, "another number of channels than the encoder takes; training would skip it (--model tells it)"),
    "tiny": (True, "far smaller than the others; crops of it are blurs"),
    "huge": (True, f"more than {HUGE_PIXELS // 10**6} million pixels; shrink it, it slows every epoch"),
    "constant": (True, "one colour throughout; it teaches nothing"),
    "exact duplicate": (True, "the same pixels as an earlier image"),
    "near duplicate": (True, "an earlier image re-encoded, brightened or slightly cropped"),
    "leak from test": (True, "this image, or nearly this image, is in the test set"),
    "animated": (False, "only its first frame is used"),
    "CMYK": (False, "converted to RGB without a colour profile; colours may shift"),
    "16-bit": (False, "only the upper 8 bits are used"),
    "transparent": (False, "transparency is shown on white"),
    "elongated": (False, "the longer side is more than 8 times the shorter; crops see a small part"),
}


@dataclass(frozen=True)
class Finding:
    """One thing found; ``index`` counts in the source."""

    kind: str
    index: int
    name: str
    detail: str = ""

    @property
    def exclude(self) -> bool:
        """Whether the written list leaves the image out."""
        return KINDS[self.kind][0]


class Seen(NamedTuple):
    """What the pixels of one image showed."""

    size: tuple[int, int]  # width, height
    digest: bytes
    thumb: NDArray[np.uint8]  # [THUMB, THUMB, 3]
    mean: NDArray[np.float64]  # [C], 0-255
    square: NDArray[np.float64]  # [C], mean of squares
    gray: bool


Probe = tuple[list[tuple[str, str]], Seen | None]  # (kind, detail) of what was found; None: not decoded


@dataclass
class Scan:
    """Findings in index order, and what duplicates and statistics need of the images decoded (index: ``rows``)."""

    findings: list[Finding] = field(default_factory=list)
    rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # index of every decoded image
    digests: list[bytes] = field(default_factory=list)
    thumbs: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, THUMB, THUMB, 3), np.uint8))
    sizes: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))
    mean: tuple[float, ...] = ()  # per channel, 0-1, every image with equal weight
    std: tuple[float, ...] = ()
    gray: int = 0


def scan(source: ImageSource, progress: Callable[[int], None] | None = None, *, channels: int = 3) -> Scan:
    """Probe every image with one thread a core, for an encoder of ``channels``; ``progress`` gets the number done."""
    probes: list[Probe] = []
    probed = in_threads(lambda index: _probe(source, index, channels), len(source), os.cpu_count() or 1)
    for done, probe in enumerate(probed, 1):
        probes.append(probe)
        if progress and (done % 256 == 0 or done == len(source)):
            progress(done)
    source.close()
    seen = {index: each for index, (_, each) in enumerate(probes) if each is not None}
    tiny = 0.0
    if seen:
        median = float(np.median([min(each.size) for each in seen.values()]))
        tiny = max(min(TINY_SIDE, median / 2), median / 8)
    findings = []
    for index, (kinds, each) in enumerate(probes):
        if each is not None and min(each.size) < tiny:
            kinds.append(("tiny", f"{each.size[0]}x{each.size[1]} px"))
        findings += [Finding(kind, index, source.name(index), detail) for kind, detail in kinds]
    if not seen:
        return Scan(findings)
    sizes, digests, thumbs, means, squares, gray = zip(*seen.values(), strict=True)
    mean, square = np.mean(means, axis=0), np.mean(squares, axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    shares = tuple((mean / 255).tolist()), tuple((std / 255).tolist())
    return Scan(findings, np.array(list(seen)), list(digests), np.stack(thumbs), np.array(sizes), *shares, sum(gray))


def _probe(source: ImageSource, index: int, channels: int) -> Probe:
    try:
        raw = source.read(index)
    except Exception as error:  # a missing file, or a row without an image
        return [("unreadable", why_unreadable(error))], None
    if not len(raw):
        return [("empty", "")], None
    try:
        if channels != 3:
            return _measured(decode_image(raw, channels)[0], [])
        if (array := array_in(raw)) is None:
            return _probe_encoded(bytes(raw))
        pixels = as_channels_last(array)
        kinds = [("16-bit", "numbers")] if pixels.dtype == np.uint16 else []
        return _measured(decode_image(pixels)[0], kinds, gray=pixels.shape[2] == 1)
    except Exception as error:  # decoders raise almost anything on damaged input
        broken = "truncated" if isinstance(raw, bytes) and known_signature(raw) else "unreadable"
        return [(error.kind if isinstance(error, UnusableImageError) else broken, why_unreadable(error))], None


def _probe_encoded(raw: bytes) -> Probe:
    with open_image(raw) as image:
        width, height = image.size
        kinds = _kinds_of_header(image, raw)
        if width * height > HUGE_PIXELS:
            return [*kinds, ("huge", f"{width}x{height} px")], None
        if max(width, height) > 2 * DRAFT_SIDE:
            image.draft("RGB", (DRAFT_SIDE, DRAFT_SIDE))  # a JPEG of this size is decoded at a fraction of the cost
        image.load()
        plain = image.mode == "RGB" and image.format != "TIFF"
        pixels = np.asarray(image) if plain else decode_image(raw)[0]
        gray = image.mode in ("L", "LA", "1", "I", "I;16")
    return _measured(pixels, kinds, (width, height), gray)


def _kinds_of_header(image: Image.Image, raw: bytes) -> list[tuple[str, str]]:
    kinds = []
    if image.format != "TIFF" and getattr(image, "is_animated", False):
        kinds.append(("animated", f"{getattr(image, 'n_frames', 2)} frames"))
    if image.mode == "CMYK":
        kinds.append(("CMYK", ""))
    if image.mode.startswith(("I", "F")) or stored_bits(image, raw) > 8:
        kinds.append(("16-bit", f"mode {image.mode}"))
    bands = image.getbands()
    if image.mode != "CMYK" and (len(bands) not in (1, 3) or "transparency" in image.info):
        kinds.append(("transparent", f"mode {image.mode}"))
    return kinds


def _measured(
    pixels: Raw, kinds: Sequence[tuple[str, str]], size: tuple[int, int] | None = None, gray: bool = False
) -> Probe:
    height, width = pixels.shape[:2]
    size = size or (width, height)
    found = list(kinds)
    step = max(1, min(height, width) // STATISTICS_SIDE)
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    sample = pixels[::step, ::step].reshape(-1, pixels.shape[2]).astype(np.float32)
    mean, square = sample.mean(0, dtype=np.float64), (sample * sample).mean(0, dtype=np.float64)
    if float(np.sqrt(np.maximum(square - mean**2, 0)).max()) < CONSTANT_STD:
        found.append(("constant", "colour " + " ".join(f"{value:.0f}" for value in mean)))
    if max(size) > LONG_ASPECT * min(size):
        found.append(("elongated", f"{size[0]}x{size[1]} px"))
    thumb = np.asarray(Image.fromarray(for_display(pixels)).resize((THUMB, THUMB), Image.Resampling.BOX))
    return found, Seen(size, digest.digest(), thumb, mean, square, gray)


def known_signature(raw: bytes) -> bool:
    """Whether the bytes begin as a JPEG, PNG, GIF, WebP, TIFF, BMP or JPEG 2000 file does."""
    starts = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\x00", b"MM\x00*", b"BM", b"\x00\x00\x00\x0cjP")
    return raw.startswith(starts) or (raw[:4] == b"RIFF" and raw[8:12] == b"WEBP")
