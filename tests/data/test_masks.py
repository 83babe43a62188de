"""Masks belong to their image: same pixels, way up and size; what cannot be read is refused with file and reason."""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mim_refiner.data.image_files import decode_image
from mim_refiner.data.masks import MaskSet, has_masks
from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError

CLASSES = (np.arange(24)[:, None] // 6 + np.arange(36)[None] // 12).astype(np.uint8)  # [24, 36], 0-5
CLASSES[0, 0] = 255
PICTURE = np.stack([CLASSES * 40] * 3, axis=2)  # shows its own mask
WAYS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def encoded(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def palette(mask, colours=256):
    image = Image.fromarray(mask, "L")
    image.putpalette([each * 7 % 256 for each in range(3 * colours)])
    return image


@pytest.fixture
def masked(tmp_path):
    """Return a maker of a set of one image beside its mask, given as encoded bytes."""

    def make(mask, ending=".png", image=None, suffix="", folders=("images", "masks")):
        for folder, name, data in zip(
            folders, (f"0.{'png'}", f"0{suffix}{ending}"), (image or encoded(PICTURE), mask), strict=True
        ):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).write_bytes(data)
        return MaskSet(open_source(tmp_path / folders[0]))

    return make


@pytest.mark.parametrize(
    ("mask", "ending"),
    [
        (encoded(CLASSES), ".png"),
        (encoded(palette(CLASSES)), ".png"),
        (encoded(palette(CLASSES)), ".gif"),
        (encoded(palette(CLASSES), "BMP"), ".bmp"),
        (encoded(CLASSES, "TIFF"), ".tif"),
        (encoded(CLASSES.astype(np.uint16)), ".png"),
        (encoded(CLASSES.astype(np.uint16), "TIFF"), ".tiff"),
        (encoded(np.stack([CLASSES] * 3, axis=2)), ".png"),
        (encoded(np.dstack([CLASSES, CLASSES, CLASSES, CLASSES | 255])), ".png"),
        (encoded(Image.merge("LA", [Image.fromarray(CLASSES), Image.new("L", (36, 24), 255)])), ".png"),
    ],
)
def test_class_numbers_of_every_exact_kind(masked, mask, ending):
    np.testing.assert_array_equal(masked(mask, ending).load(0), CLASSES)


def test_one_bit_masks(masked):
    tifffile = pytest.importorskip("tifffile")
    np.testing.assert_array_equal(masked(encoded(Image.fromarray(CLASSES > 2))).load(0), CLASSES > 2)
    for photometric in ("minisblack", "miniswhite"):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, CLASSES > 2, photometric=photometric)
        found = masked(buffer.getvalue(), ".tif", folders=("images", "mask")).load(0)
        np.testing.assert_array_equal(found, CLASSES > 2)


@pytest.mark.parametrize(("bits", "colours"), [(1, 2), (2, 4), (4, 16)])
def test_palettes_of_few_bits(masked, bits, colours):
    mask = CLASSES % colours
    np.testing.assert_array_equal(masked(encoded(palette(mask, colours), bits=bits)).load(0), mask)


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_of_few_bits_is_not_spread(masked, bits):
    """As OpenCV and libpng write them; Pillow cannot write them itself."""
    import struct
    import zlib

    mask = CLASSES % 4
    per = 8 // bits
    rows = b"".join(
        b"\0" + bytes(sum(int(v) << (8 - bits * (i + 1)) for i, v in enumerate(row[at : at + per]))
                      for at in range(0, 36, per))
        for row in mask
    )  # fmt: skip

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 36, 24, bits, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(masked(data).load(0), mask)


@pytest.mark.parametrize(
    ("mask", "ending", "reason"),
    [
        (encoded(palette(CLASSES).convert("RGB")), ".png", "holds RGB colours"),
        (encoded(palette(CLASSES).convert("RGBA")), ".png", "holds RGBA colours"),
        (encoded(CLASSES, "JPEG"), ".jpg", "is JPEG, which changes class numbers"),
        (encoded(CLASSES, "JPEG"), ".png", "is JPEG, which changes class numbers"),
        (encoded(np.stack([CLASSES] * 3, axis=2), "WEBP"), ".webp", "is WEBP, which changes class numbers"),
        (encoded(CLASSES.astype(np.uint16) * 1000), ".png", "holds class number 58392"),
        (encoded(CLASSES.astype(np.float32), "TIFF"), ".tif", "32-bit float"),
        (encoded(CLASSES.astype(np.int32), "TIFF"), ".tif", "32-bit signed"),
        (b"no picture", ".png", "cannot identify"),
        (encoded(CLASSES)[:-40], ".png", "truncated|broken"),
        (encoded(np.rot90(CLASSES)), ".png", "is 24x36 px and the image 36x24"),
        (encoded(CLASSES[:20]), ".png", "is 36x20 px and the image 36x24"),
    ],
)
def test_others_are_refused_by_name_and_reason(masked, mask, ending, reason):
    with pytest.raises(DataError, match=f"mask of 0.png.*({reason}).*save masks as PNG"):
        masked(mask, ending)


@pytest.mark.parametrize("factor", [0.5, 2, 3])
def test_a_mask_of_another_size_is_brought_to_its_image(masked, factor):
    size = (int(36 * factor), int(24 * factor))
    mask = Image.fromarray(CLASSES).resize(size, Image.Resampling.NEAREST)
    found = masked(encoded(mask)).load(0)
    np.testing.assert_array_equal(found, mask.resize((36, 24), Image.Resampling.NEAREST))
    if factor > 1:
        assert (found == CLASSES).mean() > 0.99


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG"])
@pytest.mark.parametrize("way", [1, 5, 6, 7, 8])
@pytest.mark.parametrize("mask_is", ["stored", "shown", "marked"])
def test_a_mask_goes_the_way_of_its_image(masked, kind, way, mask_is):
    exif = Image.Exif()
    exif[0x0112] = way
    shown = Image.fromarray(CLASSES).transpose(WAYS[way]) if way > 1 else Image.fromarray(CLASSES)
    options = {"exif": exif} if mask_is == "marked" else {}
    mask = encoded(shown if mask_is == "shown" else CLASSES, **options)
    masks = masked(mask, image=encoded(PICTURE, kind, exif=exif))
    np.testing.assert_array_equal(masks.load(0), np.asarray(shown))
    picture = decode_image(masks.source.read(0))[0][..., 0].astype(int)
    assert np.abs(picture - np.asarray(shown).astype(int) * 40 % 256)[2:-2, 2:-2].mean() < 12


@pytest.mark.parametrize("way", [2, 3, 4])
def test_what_nothing_tells_apart_is_refused(masked, way):
    exif = Image.Exif()
    exif[0x0112] = way
    with pytest.raises(DataError, match=f"EXIF orientation {way}"):
        masked(encoded(CLASSES), image=encoded(PICTURE, "PNG", exif=exif))
    found = masked(encoded(CLASSES, exif=exif), image=encoded(PICTURE, "PNG", exif=exif)).load(0)
    np.testing.assert_array_equal(found, Image.fromarray(CLASSES).transpose(WAYS[way]))


@pytest.mark.parametrize(
    ("folders", "suffix"),
    [(("images", "masks"), ""), (("images", "masks"), "_mask"), (("image", "mask"), ""), (("images", "labels"), "")],
)
def test_where_masks_lie(masked, folders, suffix):
    assert (masked(encoded(CLASSES), suffix=suffix, folders=folders).load(0) == CLASSES).all()


def test_no_masks_at_all(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    (tmp_path / "images/0.png").write_bytes(encoded(PICTURE))
    (tmp_path / "labels/0.txt").write_text("0 0.5 0.5 1 1")  # boxes, as YOLO writes them
    assert not has_masks(open_source(tmp_path / "images"))
    (tmp_path / "labels/1.png").write_bytes(encoded(CLASSES))
    with pytest.raises(DataError, match=r"mask of 0.png: .*beside images"):
        has_masks(open_source(tmp_path / "images"))


@pytest.mark.parametrize(
    ("values", "name", "kind"),
    [
        ([encoded(CLASSES)] * 2, "mask", pa.binary()),
        ([encoded(CLASSES)] * 2, "mask", pa.large_binary()),
        (
            [{"bytes": encoded(CLASSES), "path": None}] * 2,
            "annotation",
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        ),
        (
            [{"bytes": None, "path": "m.png"}] * 2,
            "mask",
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        ),
    ],
)
def test_masks_in_parquet(tmp_path, values, name, kind):
    (tmp_path / "m.png").write_bytes(encoded(CLASSES))
    table = pa.table({"image": [encoded(PICTURE)] * 2, name: pa.array(values, kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert has_masks(source)
    np.testing.assert_array_equal(MaskSet(source).load(1), CLASSES)
    assert MaskSet(source).class_numbers().tolist() == np.unique(CLASSES[CLASSES < 255]).tolist()


@pytest.mark.parametrize("place", ["{outside}/m.png", "../outside/m.png", "pipe"])
def test_a_mask_outside_of_the_tables_folder_or_of_no_regular_file_is_not_read(tmp_path, place):
    """Nobody knows who wrote the table."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "table").mkdir()
    (tmp_path / "outside/m.png").write_bytes(encoded(CLASSES))
    os.mkfifo(tmp_path / "table/pipe")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    masks = pa.array([{"bytes": None, "path": place.format(outside=tmp_path / "outside")}], kind)
    pq.write_table(pa.table({"image": [encoded(PICTURE)], "mask": masks}), tmp_path / "table/a.parquet")
    with pytest.raises(DataError, match=r"mask of a.parquet\[0\]: .*(outside the table's folder|no regular file)"):
        MaskSet(open_source(tmp_path / "table/a.parquet"))


def test_rows_without_a_mask_and_odd_notes(tmp_path):
    for notes, values, reason in (
        ({}, [None, None], "the row holds no image"),
        ({"ignore_index": "9" * 5000}, [encoded(CLASSES)] * 2, "correct the notes"),
        ({"class_names": "7"}, [encoded(CLASSES)] * 2, "correct the notes"),
    ):
        table = pa.table({"image": [encoded(PICTURE)] * 2, "mask": pa.array(values, pa.binary())})
        pq.write_table(table.replace_schema_metadata(notes), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=reason):
            MaskSet(open_source(tmp_path / "a.parquet"))
    table = pa.table({"image": [encoded(PICTURE)], "mask": pa.array([True])})
    pq.write_table(table, tmp_path / "b.parquet")
    assert not has_masks(open_source(tmp_path / "b.parquet"))


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ((CLASSES > 2) * np.uint8(255), "hold only 0 and 255; 255 is ignored: write 1 for the object"),
        (CLASSES | 255, "hold only 255; 255 is ignored"),
        (CLASSES * 0, "hold only 0: give masks of at least two classes"),
    ],
)
def test_fewer_than_two_classes_are_an_error(masked, mask, reason):
    with pytest.raises(DataError, match=reason):
        masked(encoded(mask)).class_numbers()


def test_a_class_without_a_name_is_an_error(tmp_path):
    table = pa.table({"image": [encoded(PICTURE)], "mask": [encoded(CLASSES)]})
    pq.write_table(table.replace_schema_metadata({"class_names": json.dumps(["a", "b"])}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="hold class 5, and class_names names 2"):
        MaskSet(open_source(tmp_path / "a.parquet")).class_numbers()
