"""Images of 1, 2, 4 and 13 channels and of 16 bits: through to the views as they are, or refused; never cut down."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mim_refiner.data.channels import array_in, as_channels_last, resize
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.image_files import decode_image
from mim_refiner.data.loaders import TrainLoader, eval_batches
from mim_refiner.data.photometric import BatchPhotometric, normalize, seeded_generator
from mim_refiner.data.sources import open_source
from mim_refiner.data.views import ViewSpec, crop_boxes, multi_crop_views
from mim_refiner.errors import DataError


def random(shape, dtype=np.uint8, seed=0):
    high = 256 if dtype == np.uint8 else 65536
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.fixture
def array_folder(tmp_path):
    def make(channels, dtype=np.uint8, count=6):
        for i in range(count):
            np.save(tmp_path / f"{i}.npy", random((20, 24, channels) if channels else (20, 24), dtype, i))
        return tmp_path

    return make


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_arrays_reach_the_views(array_folder, channels, dtype):
    images = ImageSet(open_source(array_folder(channels, dtype)), channels=channels)
    np.testing.assert_array_equal(images.load(2), random((20, 24, channels), dtype, 2))
    loader = TrainLoader(images, multi_crop_views(16, 8, 2), 3, seed=0)
    batch = next(loader.epoch(0))
    assert [tuple(view.shape) for view in batch.views] == [(3, channels, 16, 16)] * 2 + [(3, channels, 8, 8)] * 2
    expected = torch.uint8 if dtype == np.uint8 else torch.uint16
    assert {view.dtype for view in batch.views} == {expected}
    view = multi_crop_views(16, 8, 2)[1]
    output = BatchPhotometric(view, [0.5] * channels, [0.2] * channels)(batch.views[1], seeded_generator(0))
    assert output.shape == (3, channels, 16, 16)
    assert -2.5 <= output.min() < output.max() <= 2.5
    (evaluated, _), *_rest = list(eval_batches(images, 16, 4))
    assert normalize(evaluated, [0.0] * channels, [1.0] * channels).max() <= 1


@pytest.mark.parametrize("channels", [2, 4, 13])
def test_nothing_is_dropped_for_an_rgb_encoder(array_folder, channels):
    with pytest.raises(DataError, match=rf"has {channels} channels and the encoder takes 3"):
        ImageSet(open_source(array_folder(channels)))


def test_other_counts_are_refused(array_folder):
    with pytest.raises(DataError, match="has 13 channels and the encoder takes 4"):
        ImageSet(open_source(array_folder(13)), channels=4)


def test_gray_and_rgb_arrays_for_an_rgb_encoder(array_folder):
    images = ImageSet(open_source(array_folder(0, np.uint16)))
    np.testing.assert_array_equal(images.load(1)[..., 2], random((20, 24), np.uint16, 1) >> 8)
    rgb = random((5, 6, 3))
    np.testing.assert_array_equal(decode_image(npy(rgb))[0], rgb)


def test_image_files_keep_their_bands(tmp_path):
    deep = random((9, 7), np.uint16)
    for kind in ("PNG", "TIFF"):
        buffer = io.BytesIO()
        Image.fromarray(deep).save(buffer, kind)
        np.testing.assert_array_equal(decode_image(buffer.getvalue(), 1)[0][..., 0], deep)
    rgba = random((9, 7, 4))
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "PNG")
    np.testing.assert_array_equal(decode_image(buffer.getvalue(), 4)[0], rgba)
    with pytest.raises(ValueError, match="has 4 channels and the encoder takes 1"):
        decode_image(buffer.getvalue(), 1)[0]


def test_tiff_with_a_band_a_page():
    bands = random((9, 7, 5), np.uint16)
    pages = [Image.fromarray(np.ascontiguousarray(bands[..., i])) for i in range(5)]
    buffer = io.BytesIO()
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(decode_image(buffer.getvalue(), 5)[0], bands)
    with pytest.raises(ValueError, match=r"has 5 pages \(channels\?\) and the encoder takes RGB"):
        decode_image(buffer.getvalue())[0]


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_tiff_of_many_bands(planar):
    tifffile = pytest.importorskip("tifffile")
    bands = random((24, 18, 13), np.uint16)
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        bands if planar == "contig" else np.moveaxis(bands, -1, 0),
        photometric="minisblack",
        planarconfig=planar,
    )
    np.testing.assert_array_equal(decode_image(buffer.getvalue(), 13)[0], bands)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4), np.float32), "float32 values; save images as uint8 or uint16"),
        (np.zeros((4,), np.uint8), "an image is"),
        (np.zeros((13, 40, 40), np.uint8), "channels first it seems"),
        (np.zeros((0, 4, 3), np.uint8), "an image is"),
    ],
)
def test_arrays_that_are_no_images(array, message):
    with pytest.raises(ValueError, match=message):
        as_channels_last(array)


def test_npy_that_lies():
    whole = npy(random((5, 6, 3)))
    assert array_in(npy(np.asfortranarray(random((5, 6, 3))))).shape == (5, 6, 3)
    for broken in (whole[:-1], whole.replace(b"(5, 6, 3)", b"(5, 6,99)"), npy(np.array([None, 1], dtype=object))):
        with pytest.raises(ValueError, match=r"does not fit its file|Python objects"):
            array_in(broken)


def test_resize_equals_pillow_for_each_channel():
    image = random((40, 30, 5))
    small = resize(image, 12, 16)
    for channel in range(5):
        expected = Image.fromarray(image[..., channel]).resize((12, 16), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(small[..., channel], np.asarray(expected))
    wide = resize(image.astype(np.uint16) * 257, 12, 16)
    assert np.abs(wide.astype(np.float64) / 257 - small).max() < 4  # Pillow rounds 8 bits between the directions


def test_photometrics_without_colour_against_a_loop():
    view = ViewSpec("x", 8, jitter_prob=1.0, gray_prob=1.0, solarize_prob=1.0)
    images = torch.from_numpy(random((4, 5, 8, 8)))
    from mim_refiner.data.photometric import BRIGHTNESS, CONTRAST, draw_params

    params = draw_params(view, 4, seeded_generator(3))
    found = BatchPhotometric(view, [0.0] * 5, [1.0] * 5)(images, seeded_generator(3))
    for i in range(4):
        expected = images[i].double() / 255
        for kind in params.order[i].tolist():
            factor = params.factors[i, kind].item()
            if kind == BRIGHTNESS:
                expected = (expected * factor).clamp(0, 1)
            if kind == CONTRAST:
                expected = (factor * expected + (1 - factor) * expected.mean((1, 2), keepdim=True)).clamp(0, 1)
        torch.testing.assert_close(found[i].double(), expected, atol=1e-5, rtol=0)


def test_crops_do_not_depend_on_the_channels():
    uniforms = np.random.default_rng(0).random((4, 24))
    sides = np.full(4, 50)
    boxes, *_ = crop_boxes(uniforms, sides, sides, ViewSpec("x", 8))
    assert boxes.shape == (4, 4)
