"""What image files say of their pixels decides how they are read; what has no sure meaning is refused by name."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from mim_refiner.data.channels import TooLargeError, UnusableImageError, WrongChannelsError
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.image_files import decode_image
from mim_refiner.data.sources import open_source

GENERATOR = np.random.default_rng(0)
GRAY = GENERATOR.integers(0, 256, (20, 24), dtype=np.uint8)
RGB = GENERATOR.integers(0, 256, (20, 24, 3), dtype=np.uint8)
DEEP, DEEP_RGB = GRAY.astype(np.uint16) * 256 + 7, RGB.astype(np.uint16) * 256 + 7


def thrice(gray):
    return np.repeat(gray[:, :, None], 3, axis=2)


def tiff(array, **options) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def encoded(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def planes(array):
    return np.moveaxis(array, -1, 0)


@pytest.mark.parametrize("packed", [{}, {"compression": "zlib"}, {"compression": "zlib", "tile": (16, 16)}])
@pytest.mark.parametrize(
    ("array", "options", "expected"),
    [
        (GRAY, {}, thrice(GRAY)),
        (GRAY, {"photometric": "miniswhite"}, thrice(255 - GRAY)),
        (DEEP, {}, thrice(GRAY)),
        (DEEP // 300, {}, thrice((DEEP // 300 >> 8).astype(np.uint8))),  # dark, and not taken for 8 bits
        (DEEP.astype(">u2"), {"byteorder": ">"}, thrice(GRAY)),
        (DEEP, {"photometric": "miniswhite"}, thrice(255 - GRAY)),
        (RGB, {"photometric": "rgb"}, RGB),
        (planes(RGB), {"photometric": "rgb", "planarconfig": "separate"}, RGB),
        (DEEP_RGB, {"photometric": "rgb"}, RGB),
        (planes(DEEP_RGB), {"photometric": "rgb", "planarconfig": "separate"}, RGB),
        (np.dstack([RGB, GRAY | 255]), {"photometric": "rgb", "extrasamples": ["unassalpha"]}, RGB),
        (GRAY > 99, {"photometric": "minisblack"}, thrice((GRAY > 99).astype(np.uint8) * 255)),
    ],
)
def test_tiff_that_is_read(array, options, packed, expected):
    np.testing.assert_array_equal(decode_image(tiff(array, **options, **packed))[0], expected)


@pytest.mark.parametrize(
    ("array", "options", "reason"),
    [
        (GRAY.astype(np.float32) / 255, {}, "32-bit float"),
        (GRAY.astype(np.float32), {}, "32-bit float"),
        (GRAY.astype(np.float16), {}, "16-bit float"),
        (GRAY.astype(np.float64), {}, "64-bit float"),
        (GRAY.astype(np.int32) * 65536, {}, "32-bit signed"),
        (GRAY.astype(np.uint32), {}, "32-bit integer"),
        (DEEP.view(np.int16), {}, "16-bit signed"),
        (GRAY.view(np.int8), {}, "8-bit signed"),
        (RGB.astype(np.float32), {"photometric": "rgb"}, "32-bit float"),
        (RGB.astype(np.int16), {"photometric": "rgb"}, "16-bit signed"),
        (RGB, {"photometric": "cielab"}, "CIELAB"),
        (DEEP_RGB, {"photometric": "cielab"}, "CIELAB"),
        (np.dstack([RGB, GRAY]), {"photometric": "rgb", "extrasamples": [0]}, "has 4 channels"),
        (np.dstack([GRAY] * 2), {"photometric": "minisblack", "planarconfig": "contig"}, "has 2 channels"),
        (np.dstack([DEEP] * 5), {"photometric": "minisblack", "planarconfig": "contig"}, "has 5 channels"),
        (np.stack([DEEP] * 5), {"photometric": "minisblack"}, "has 5 pages"),
    ],
)
def test_tiff_that_is_refused_with_its_reason(array, options, reason):
    with pytest.raises(UnusableImageError, match=reason):
        decode_image(tiff(array, **options))[0]


def test_tiff_of_twelve_bits():
    values = [0, 1, 2048, 4095]
    packed = int("".join(f"{value:012b}" for value in values), 2).to_bytes(6, "big")
    entries = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 110), (277, 1), (279, 6)]
    listed = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    data = b"II*\0" + struct.pack("<IH", 8, len(entries)) + listed + struct.pack("<I", 0) + packed
    assert decode_image(data)[0][0, :, 0].tolist() == [0, 0, 128, 255]
    assert decode_image(data, 1)[0].ravel().tolist() == [0, 16, 2048 << 4 | 8, 65535]


def test_thumbnails_in_a_tiff_are_no_pages():
    tifffile = pytest.importorskip("tifffile")
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        file.write(RGB, photometric="rgb")
        file.write(RGB[::2, ::2], photometric="rgb", subfiletype=1)
    np.testing.assert_array_equal(decode_image(buffer.getvalue())[0], RGB)


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [2, 4])
def test_bands_are_kept_at_full_depth(channels, depth):
    bands = np.random.default_rng(1).integers(0, 2 ** (8 * np.dtype(depth).itemsize), (20, 24, channels)).astype(depth)
    options = {"photometric": "rgb", "extrasamples": [0]} if channels == 4 else {"photometric": "minisblack"}
    np.testing.assert_array_equal(decode_image(tiff(bands, planarconfig="contig", **options), channels)[0], bands)


def png16(color: int, values: list[int], bands: int) -> bytes:
    """A 16-bit PNG of one row; Pillow writes them in grey only."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = zlib.compress(b"\0" + np.array(values, ">u2").tobytes())
    header = struct.pack(">IIBBBBB", len(values) // bands, 1, 16, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png16(0, [0, 200, 256, 65535], 1), [[0] * 3, [0] * 3, [1] * 3, [255] * 3]),
        (png16(2, [256, 512, 65535], 3), [[1, 2, 255]]),
        (png16(4, [25600, 65535, 25600, 0], 2), [[100] * 3, [255] * 3]),
        (png16(6, [256, 512, 768, 65535], 4), [[1, 2, 3]]),
        (b"P5 4 1 4095\n" + np.array([0, 200, 2048, 4095], ">u2").tobytes(), [[0] * 3, [12] * 3, [128] * 3, [255] * 3]),
        (b"P5 2 1 65535\n" + np.array([200, 65535], ">u2").tobytes(), [[0] * 3, [255] * 3]),
        (b"P6 1 1 65535\n" + np.array([256, 2048, 65535], ">u2").tobytes(), [[1, 8, 255]]),
        (b"P1 2 1\n0 1\n", [[255] * 3, [0] * 3]),
    ],
)
def test_sixteen_bits_by_the_header_and_not_by_the_largest_value(data, expected):
    assert decode_image(data)[0][0].tolist() == expected


def test_portable_float_maps_are_refused():
    with pytest.raises(UnusableImageError, match="float values"):
        decode_image(b"Pf\n2 1\n-1.0\n" + np.zeros(2, "<f4").tobytes())[0]


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_every_exif_orientation(kind, number):
    ways = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }  # fmt: skip
    image = Image.fromarray(RGB).resize((24, 20)).reduce(4).resize((48, 40))
    exif = Image.Exif()
    exif[0x0112] = number
    shown = image.transpose(ways[number]) if number > 1 else image
    found = decode_image(encoded(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})))[0]
    assert found.shape[:2] == (shown.height, shown.width)
    assert np.abs(found.astype(int) - np.asarray(shown)).mean() < (9 if kind == "JPEG" else 0.01)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    assert np.abs(decode_image(data)[0][4, 4].astype(int) - [255, 0, 0]).max() < 5


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_inks(kind):
    pixels, _ = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind))
    assert np.abs(pixels[4, 4] - [255.0, 0, 0]).max() < 9


SCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(/tmp/owned) (w) file closefile showpage\n"


@pytest.mark.parametrize(
    "data", [SCRIPT, b"\xc5\xd0\xd3\xc6" + b"\0" * 28 + SCRIPT, b"%PDF-1.4\n", b"\xd7\xcd\xc6\x9a" * 20]
)
@pytest.mark.parametrize("name", ["a.eps", "a.png", "a.jpg"])
def test_no_interpreter_is_started(tmp_path, monkeypatch, data, name):
    def refuse(*arguments, **options):
        raise AssertionError(f"a process was started: {arguments}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(subprocess, "check_call", refuse)
    Image.new("RGB", (8, 8)).save(tmp_path / "ok.png")
    for i in range(12):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"ok{i}.png")
    (tmp_path / name).write_bytes(data)
    images = ImageSet(open_source(tmp_path), cache=True)
    assert {reason for *_, reason in images.unreadable} <= {"not an image file of a known kind, or a damaged one"}
    assert sum(images.try_load(i) is not None for i in range(len(images))) == 13


def test_sizes_beyond_any_photograph_are_refused_before_decoding():
    for width, height in ((13_000, 7_000), (60_000, 60_000)):
        data = bytearray(encoded(np.zeros((4, 4, 3), np.uint8), "BMP"))
        data[18:26] = struct.pack("<ii", width, height)
        with pytest.raises(TooLargeError, match="89 million"):
            decode_image(bytes(data))[0]


def test_wrong_channels_name_the_way_out():
    with pytest.raises(WrongChannelsError, match=r"has 4 channels and the encoder takes 3 \(RGB\); save RGB images"):
        decode_image(np.zeros((8, 8, 4), np.uint8))[0]


def test_no_library_warning_reaches_the_terminal(tmp_path):
    """Pillow warns of images near its bound, of broken EXIF, and of palettes with transparency."""
    broken = encoded(RGB, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0garbage")
    palette = Image.fromarray(RGB).quantize(16)
    huge = bytearray(encoded(np.zeros((4, 4, 3), np.uint8), "BMP"))
    huge[18:26] = struct.pack("<ii", 13_000, 7_000)
    for name, data in (("a.jpg", broken), ("b.png", encoded(palette, transparency=bytes(16))), ("c.bmp", bytes(huge))):
        (tmp_path / name).write_bytes(data)
    code = (
        "import sys; from mim_refiner.data.decode import ImageSet; from mim_refiner.data.sources import open_source;"
        "print(len(ImageSet(open_source(sys.argv[1]), cache=True).unreadable))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("1", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(broken)[0].shape == RGB.shape
