from __future__ import annotations

import dataclasses

import pytest
import torch
from scipy.stats import chisquare, kstest
from torchvision.transforms.v2 import functional as tv

from mim_refiner.core.collectives import Rows
from mim_refiner.data.photometric import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    BatchPhotometric,
    augment,
    blend,
    blur_radius,
    draw_params,
    gaussian_blur,
    seeded_generator,
    shift_hue,
    solarize,
    to_gray,
)
from mim_refiner.data.views import ViewSpec, multi_crop_views
from mim_refiner.errors import InputError

MEAN, STD = (0.48, 0.45, 0.4), (0.22, 0.23, 0.25)
CLOSE = {"rtol": 0, "atol": 1e-5}
PLAIN = ViewSpec("mae", 12, scale=(0.2, 1.0), jitter_prob=0.0, gray_prob=0.0)


@pytest.fixture
def images():
    """Return random float images with every special case of hue: gray, black, white, saturated and tied pixels."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, 256, (6, 3, 12, 12), generator=generator, dtype=torch.uint8)
    special = [[0, 0, 0], [255, 255, 255], [90, 90, 90], [255, 0, 0], [0, 255, 0], [0, 0, 255]]
    special += [[200, 200, 10], [10, 200, 200], [200, 10, 200], [7, 7, 8], [255, 128, 128], [1, 0, 0]]
    batch[:, :, 0] = torch.tensor(special, dtype=torch.uint8).T
    return batch


def to_float(images):
    return images.float() / 255


@pytest.mark.parametrize(
    ("operation", "reference", "values"),
    [
        (BRIGHTNESS, tv.adjust_brightness, [0.0, 0.6, 0.9, 1.0, 1.2, 1.4]),
        (CONTRAST, tv.adjust_contrast, [0.0, 0.6, 0.9, 1.0, 1.2, 1.4]),
        (SATURATION, tv.adjust_saturation, [0.0, 0.8, 0.9, 1.0, 1.1, 1.2]),
        (HUE, tv.adjust_hue, [-0.5, -0.1, 0.0, 0.05, 0.1, 0.5]),
    ],
    ids=["brightness", "contrast", "saturation", "hue"],
)
def test_single_colour_operation(images, operation, reference, values):
    factors = torch.tensor(values)
    if operation == HUE:
        result = shift_hue(to_float(images), factors)
    else:
        weights = torch.stack(
            [factors, (1 - factors) * (operation == SATURATION), (1 - factors) * (operation == CONTRAST)]
        )
        result = blend(to_float(images), {operation}, weights[..., None, None, None])
        mixed = blend(to_float(images), {BRIGHTNESS, CONTRAST, SATURATION}, weights[..., None, None, None])
        assert torch.equal(result, mixed)  # what does not occur is only left out
    expected = torch.stack([reference(x, value) for x, value in zip(to_float(images), values, strict=True)])
    torch.testing.assert_close(result, expected, **CLOSE)


def test_hue_alone(images):
    shift = torch.linspace(-0.5, 0.5, len(images))
    expected = torch.stack([tv.adjust_hue(x, float(s)) for x, s in zip(to_float(images), shift, strict=True)])
    torch.testing.assert_close(shift_hue(to_float(images), shift), expected, **CLOSE)


@pytest.mark.parametrize(("height", "width"), [(12, 12), (9, 14), (33, 70), (65, 5)])
def test_blur(images, height, width):
    part = to_float(images)[:, :, :height, :width] if width <= 12 else torch.rand(6, 3, height, width)
    sigma = torch.tensor([0.1, 0.3, 0.7, 1.0, 1.5, 2.0])
    expected = [tv.gaussian_blur(x, [9, 9], [float(s)] * 2) for x, s in zip(part, sigma, strict=True)]
    torch.testing.assert_close(gaussian_blur(part, sigma, 4), torch.stack(expected), **CLOSE)


@pytest.mark.parametrize(("size", "radius"), [(224, 8), (96, 8), (32, 8), (16, 8), (12, 6), (1, 0)])
def test_blur_radius(size, radius):
    assert blur_radius(ViewSpec("v", size), size) == radius
    pixels = torch.rand(1, 3, size, size)
    assert gaussian_blur(pixels, torch.tensor([2.0]), radius).shape == pixels.shape


def test_blur_differs_little_from_the_wide_kernel():
    pixels = torch.rand(2, 3, 64, 64)
    wide = tv.gaussian_blur(pixels, [23, 23], [2.0, 2.0])
    torch.testing.assert_close(gaussian_blur(pixels, torch.tensor([2.0, 2.0]), 8), wide, rtol=0, atol=1e-4)


def test_gray_and_solarize(images):
    expected = tv.rgb_to_grayscale(to_float(images), num_output_channels=3)
    torch.testing.assert_close(to_gray(to_float(images)).expand(-1, 3, -1, -1), expected, **CLOSE)
    bytes_ = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    expected = tv.solarize(bytes_, 128).float() / 255
    torch.testing.assert_close(solarize(to_float(bytes_), 128 / 255), expected, **CLOSE)


REFERENCE = {
    BRIGHTNESS: tv.adjust_brightness,
    CONTRAST: tv.adjust_contrast,
    SATURATION: tv.adjust_saturation,
    HUE: tv.adjust_hue,
}


def per_image_pipeline(image, params, row, view):
    """Apply the drawn parameters of one image with torchvision, operation by operation, in the paper's order."""
    if params.jitter[row]:
        for operation in params.order[row].tolist():
            image = REFERENCE[operation](image, float(params.factors[row, operation]))
    if params.blur[row]:
        taps = 2 * blur_radius(view, image.shape[-1]) + 1
        image = tv.gaussian_blur(image, [taps, taps], [float(params.sigma[row])] * 2)
    if params.gray[row]:
        image = tv.rgb_to_grayscale(image, num_output_channels=3)
    if params.solarize[row]:
        image = tv.solarize(image, view.solarize_threshold / 255)
    return tv.normalize(image, list(MEAN), list(STD))


@pytest.mark.parametrize("view", multi_crop_views(12, 12, 1, solarize_prob=(0.0, 0.3, 0.1)), ids=lambda v: v.name)
def test_whole_pipeline_equals_the_per_image_reference(view):
    batch = torch.randint(0, 256, (64, 3, 12, 12), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    result = BatchPhotometric(view, MEAN, STD)(batch, seeded_generator(3))
    params = draw_params(view, 64, seeded_generator(3))
    for drawn in (params.jitter, params.gray):
        assert 0 < drawn.sum() < 64  # the mixed case is what is tested
    worst = 0.0
    for row in range(64):
        expected = per_image_pipeline(to_float(batch[row]), params, row, view)
        # A value within rounding of the threshold may be solarised on one side only.
        worst = max(worst, (result[row] - expected).abs().quantile(0.99).item())
        assert (result[row] - expected).abs().mean() < 1e-3
    assert worst < 5e-5  # 1e-5 on the 0-1 scale, divided by the deviation


def test_views_together_parts_of_a_batch_and_chunks_of_any_length_give_the_same_images(monkeypatch):
    """Sorting and cutting are about speed alone. Views of two kinds and three sizes, some all gray, some not at all."""
    specs = [ViewSpec("a", 12, blur_prob=0.5, solarize_prob=0.4), ViewSpec("b", 12, gray_prob=1.0)]
    specs += [
        ViewSpec("c", 9, blur_prob=1.0),
        ViewSpec("d", 12, blur_prob=0.7, blur_sigma=(0.1, 1.0)),
        ViewSpec("e", 40, blur_prob=1.0),
    ]
    numbers = torch.Generator().manual_seed(1)
    views = [torch.randint(0, 256, (24, 3, v.size, v.size), generator=numbers, dtype=torch.uint8) for v in specs]
    photometrics = [BatchPhotometric(view, MEAN, STD) for view in specs]
    together = augment(views, photometrics, seeded_generator(3), torch.device("cpu"))
    generator = seeded_generator(3)
    for alone, view, photometric in zip(together, views, photometrics, strict=True):
        torch.testing.assert_close(photometric(view, generator), alone, rtol=0, atol=2e-6)
    for start in (0, 8, 16):
        part = [view[start : start + 8] for view in views]
        found = augment(part, photometrics, seeded_generator(3), torch.device("cpu"), Rows(start, start + 8, 24))
        for whole, own in zip(together, found, strict=True):
            torch.testing.assert_close(own, whole[start : start + 8], rtol=0, atol=2e-6)
    for limit in (1, 10_000, 2**40):
        monkeypatch.setattr("mim_refiner.data.photometric._CHUNK_BYTES", limit)
        found = augment(views, photometrics, seeded_generator(3), torch.device("cpu"))
        for whole, own in zip(together, found, strict=True):
            torch.testing.assert_close(own, whole, rtol=0, atol=2e-6)


def test_the_input_is_left_alone_and_output_is_float32(images):
    copy = images.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = BatchPhotometric(multi_crop_views(12, 8, 1)[0], MEAN, STD)(images, seeded_generator(0))
    plain = BatchPhotometric(multi_crop_views(12, 8, 1)[0], MEAN, STD)(images, seeded_generator(0))
    assert torch.equal(images, copy)
    assert result.dtype == torch.float32
    assert torch.equal(result, plain)


def test_no_photometrics_is_normalisation(images):
    result = BatchPhotometric(PLAIN, MEAN, STD)(images, seeded_generator(0))
    torch.testing.assert_close(result, tv.normalize(to_float(images), list(MEAN), list(STD)), **CLOSE)


def test_a_batch_that_is_gray_as_a_whole(images):
    """Every image drawn gray: the three channels must not share memory when they are normalised in place."""
    view = ViewSpec("gray", 12, jitter_prob=0, gray_prob=1)
    shown = BatchPhotometric(view, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))(images, seeded_generator(0))
    expected = tv.rgb_to_grayscale(to_float(images), num_output_channels=3)
    torch.testing.assert_close(shown, expected - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), **CLOSE)


def test_drawn_parameters_have_the_recipe_distribution():
    view = dataclasses.replace(ViewSpec("v", 32), blur_prob=0.5, solarize_prob=0.2)
    params = draw_params(view, 20_000, seeded_generator(0))
    bounds = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]
    for column, (low, high) in enumerate(bounds):
        assert kstest(params.factors[:, column].numpy(), "uniform", (low, high - low)).pvalue > 1e-3
    assert kstest(params.sigma.numpy(), "uniform", (0.1, 1.9)).pvalue > 1e-3
    for drawn, probability in ((params.jitter, 0.8), (params.blur, 0.5), (params.gray, 0.2), (params.solarize, 0.2)):
        assert abs(drawn.float().mean().item() - probability) < 0.012
    codes, counts = (params.order * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)
    assert len(codes) == 24
    assert chisquare(counts.numpy()).pvalue > 1e-3
    flags = torch.stack([params.jitter, params.blur, params.gray, params.solarize]).float()
    assert (torch.corrcoef(flags) - torch.eye(4)).abs().max() < 0.04


def test_strong_jitter_does_not_draw_negative_factors():
    factors = draw_params(ViewSpec("v", 8, brightness=2.0), 1000, seeded_generator(0)).factors
    assert factors[:, 0].min() >= 0
    assert factors[:, 0].max() > 2.5


def test_generators():
    view = multi_crop_views(12, 8, 1)[1]
    first, again, other = (torch.rand(4, generator=seeded_generator(*key)) for key in ((0, 1), (0, 1), (0, 2)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    drawn = draw_params(view, 5, seeded_generator(9))
    assert torch.equal(drawn.factors, draw_params(view, 5, seeded_generator(9)).factors)


def test_other_channel_counts(images):
    gray = images[:, :1]
    plain = BatchPhotometric(PLAIN, (0.5,), (0.25,))(gray, seeded_generator(0))
    assert plain.shape == gray.shape
    with pytest.raises(InputError, match="3 channels, 1 mean and 1 standard deviation"):
        BatchPhotometric(PLAIN, (0.5,), (0.25,))(images, seeded_generator(0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gpu_equals_cpu():
    batch = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    operation = BatchPhotometric(multi_crop_views(32, 16, 1)[0], MEAN, STD)
    expected = operation(batch, seeded_generator(0))
    torch.testing.assert_close(operation(batch.cuda(), seeded_generator(0)).cpu(), expected, rtol=0, atol=5e-5)
