from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image

from mim_refiner.data.decode import ImageSet
from mim_refiner.data.image_files import decode_image
from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError


def test_rgb_is_lossless(pixels, encode):
    np.testing.assert_array_equal(decode_image(encode(pixels(0)))[0], pixels(0))
    assert decode_image(encode(pixels(0), "JPEG"))[0].shape == (12, 16, 3)


def test_grayscale_and_bilevel(pixels, encode):
    gray = Image.fromarray(pixels(0)).convert("L")
    expected = np.repeat(np.asarray(gray)[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(decode_image(encode(gray))[0], expected)
    np.testing.assert_array_equal(decode_image(np.asarray(gray))[0], expected)
    np.testing.assert_array_equal(decode_image(np.asarray(gray)[:, :, None])[0], expected)
    assert set(np.unique(decode_image(encode(gray.convert("1")))[0])) <= {0, 255}


def test_sixteen_bit_keeps_the_upper_byte(encode):
    wide = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(wide)))[0][:, :, 0].ravel(), np.arange(256))


def test_transparency_lies_on_white(encode):
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (200, 0, 0, 0))
    expected = [[[200, 0, 0], [255, 255, 255]]]
    assert decode_image(encode(image))[0].tolist() == expected
    with pytest.raises(ValueError, match="has 4 channels and the encoder takes 3"):
        decode_image(np.asarray(image))[0]  # a fourth channel of an array need not be transparency


def test_palette_with_transparent_entry(encode):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert decode_image(encode(image))[0].tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert decode_image(encode(image, transparency=b"\x00\xff"))[0].tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.fixture
def damaged_folder(image_folder):
    """Twenty class-labelled images, of which number 3 is truncated and number 19 is empty."""
    root = image_folder([f"{'ab'[i // 10]}/{i:02d}.png" for i in range(20)])
    path = root / "a/03.png"
    path.write_bytes(path.read_bytes()[:-60])
    (root / "b/19.png").write_bytes(b"")
    return root


@pytest.mark.parametrize("cache", [True, False])
def test_damaged_images_are_replaced_and_listed(damaged_folder, pixels, cache):
    images = ImageSet(open_source(damaged_folder), cache=cache)
    assert images.cached is cache
    np.testing.assert_array_equal(images.load(3), pixels(4))
    np.testing.assert_array_equal(images.load(19), pixels(0))
    assert images.load_resolved(3).index == 4
    assert images.load_resolved(19).index == 0
    assert [name for _, name, _ in images.unreadable] == ["a/03.png", "b/19.png"]
    assert all(reason and "\n" not in reason for *_, reason in images.unreadable)
    assert images.try_load(3) is None
    images.raise_if_too_many_unreadable()  # two of twenty is just within a tenth


def test_scan_finds_every_damaged_image(damaged_folder):
    images = ImageSet(open_source(damaged_folder))
    assert images.cached
    assert [index for index, *_ in images.unreadable] == [3, 19]
    assert images.array.shape == (20, 12, 16, 3)


def test_more_than_a_tenth_damaged_is_refused(damaged_folder):
    (damaged_folder / "b/11.png").write_bytes(b"no image")
    images = ImageSet(open_source(damaged_folder))
    with pytest.raises(DataError, match=r"3 of 20 images cannot be read, more than 10 %.*a/03.png.*repair or remove"):
        images.raise_if_too_many_unreadable()
    lazy = ImageSet(open_source(damaged_folder), cache=False)
    with pytest.raises(DataError, match="more than 10 %"):
        [lazy.load(i) for i in range(20)]


@pytest.mark.parametrize("cache", ["auto", True, False])
def test_no_readable_image_at_all(tmp_path, cache):
    for i in range(40):
        (tmp_path / f"{i}.jpg").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"no image can be read \(first: 0.jpg: not an image file") as caught:
        ImageSet(open_source(tmp_path), cache=cache)
    assert "\n" not in str(caught.value)


def test_missing_listed_file_is_named(image_folder):
    root = image_folder(["a.png"])
    (root / "list.txt").write_text("gone.png\na.png\n")
    assert ImageSet(open_source(root / "list.txt")).unreadable == [(0, "gone.png", "no such file")]


def test_images_of_different_sizes(image_folder, pixels):
    root = image_folder(["a.png", "c.png"])
    Image.fromarray(pixels(7, 9, 9)).save(root / "b.png")
    images = ImageSet(open_source(root))
    assert images.cached
    assert images.array is None
    assert [images.load(i).shape for i in range(3)] == [(12, 16, 3), (9, 9, 3), (12, 16, 3)]
    np.testing.assert_array_equal(images.load(1), pixels(7, 9, 9))
    np.testing.assert_array_equal(images.load(0), pixels(0))


@pytest.mark.parametrize("cache", [True, False])
def test_copies_for_workers(damaged_folder, pixels, cache):
    images = pickle.loads(pickle.dumps(ImageSet(open_source(damaged_folder), cache=cache)))
    np.testing.assert_array_equal(images.load(5), pixels(5))
    np.testing.assert_array_equal(images.load(3), pixels(4))
    assert images.labels.tolist() == [0] * 10 + [1] * 10
