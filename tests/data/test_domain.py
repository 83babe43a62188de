"""Augmentations of images that are no photographs, against slow loops and what they are to keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mim_refiner.data.domain import DomainSpec, apply, draw, hashed_normal, rotated
from mim_refiner.data.photometric import BatchPhotometric, seeded_generator
from mim_refiner.data.views import ViewSpec, crop_batch, crop_boxes, draws
from mim_refiner.training.domains import DOMAINS, suggest_domain
from mim_refiner.training.recipe import override
from mim_refiner.training.recipes import tiny
from mim_refiner.training.refine import view_specs

MEAN, STD = (0.5, 0.4), (0.25, 0.2)
MOMENTS = torch.tensor([MEAN, STD])[:, :, None, None]


def normalised(*shape: int) -> tuple[Tensor, Tensor]:
    values = torch.rand(*shape, generator=torch.Generator().manual_seed(0))
    mean, std = MOMENTS
    return values, (values - mean) / std


def test_gain_is_of_the_values_before_normalisation() -> None:
    values, images = normalised(3, 2, 4, 5)
    drawn = draw(3, 2, torch.Generator().manual_seed(1))
    got = apply(images, drawn, DomainSpec(gain=0.3), MOMENTS)
    for row in range(3):
        for channel in range(2):
            gain = 1 + 0.3 * (2 * float(drawn[row, 7 + channel]) - 1)
            expected = (values[row, channel] * gain - MEAN[channel]) / STD[channel]
            torch.testing.assert_close(got[row, channel], expected, rtol=1e-5, atol=1e-5)


def test_quarter_turns_of_squares_are_exact() -> None:
    images = torch.rand(2, 3, 6, 6)
    got = rotated(images, torch.tensor([math.pi / 2, math.pi]))
    torch.testing.assert_close(got[0], images[0].rot90(1, (1, 2)), rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1], images[1].flip(1, 2), rtol=0, atol=1e-5)


def test_rotation_of_an_oblong_moves_pixels_by_pixels() -> None:
    image = torch.zeros(1, 1, 9, 21)
    image[0, 0, 4, 10 + 3] = 1.0  # three pixels right of the centre
    turned = rotated(image, torch.tensor([math.pi / 2]))
    row, column = divmod(int(turned.argmax()), 21)
    assert (abs(row - 4), column) == (3, 10)  # three pixels above or below it


def test_noise_is_normal_and_depends_on_image_and_place_alone() -> None:
    numbers = torch.tensor([5, 9, 5])
    noise = hashed_normal(numbers, (2, 64, 64))
    assert torch.equal(noise[0], noise[2])
    assert torch.equal(noise[1], hashed_normal(numbers[1:2], (2, 64, 64))[0])
    flat = noise[:2].flatten().double()
    assert abs(float(flat.mean())) < 4 / math.sqrt(len(flat))
    assert abs(float(flat.var()) - 1) < 4 * math.sqrt(2 / len(flat))
    assert abs(float((flat**3).mean())) < 4 * math.sqrt(15 / len(flat))
    assert abs(float(np.corrcoef(noise[0].flatten(), noise[1].flatten())[0, 1])) < 4 / math.sqrt(2 * 64 * 64)
    neighbours = noise[0, 0]
    assert abs(float((neighbours[:, 1:] * neighbours[:, :-1]).mean())) < 4 / 63


def test_noise_has_the_asked_deviation() -> None:
    images = torch.zeros(64, 2, 16, 16)
    drawn = draw(64, 2, torch.Generator().manual_seed(0))
    got = apply(images, drawn, DomainSpec(noise=0.1), MOMENTS)
    for channel in range(2):
        expected = 0.1 * drawn[:, 1] / STD[channel]
        torch.testing.assert_close(got[:, channel].std(dim=(1, 2)), expected, rtol=0.25, atol=1e-3)


def test_masks_are_one_band_of_rows_and_one_of_columns_at_the_mean() -> None:
    images = torch.full((40, 1, 20, 30), 7.0)
    got = apply(images, draw(40, 1, torch.Generator().manual_seed(3)), DomainSpec(mask_rows=0.5, mask_columns=0.2),
                torch.full((2, 1, 1, 1), 0.5))  # fmt: skip
    longest_rows = longest_columns = 0
    for image in got[:, 0]:
        hidden_rows, hidden_columns = (image == 0).all(1), (image == 0).all(0)
        expected = hidden_rows[:, None] | hidden_columns
        assert torch.equal(image == 0, expected)
        for hidden in (hidden_rows, hidden_columns):
            places = hidden.nonzero().flatten()
            assert len(places) == 0 or int(places[-1] - places[0]) + 1 == len(places)
        longest_rows = max(longest_rows, int(hidden_rows.sum()))
        longest_columns = max(longest_columns, int(hidden_columns.sum()))
    assert 7 <= longest_rows <= 10
    assert 4 <= longest_columns <= 6


def test_photographs_see_the_numbers_they_always_saw() -> None:
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    plain = BatchPhotometric(ViewSpec("v", 16), (0.5,) * 3, (0.5,) * 3)
    noisy = BatchPhotometric(ViewSpec("v", 16, domain=DomainSpec(mask_rows=0.9)), (0.5,) * 3, (0.5,) * 3)
    one, other = (each(pixels, seeded_generator(0, 1)) for each in (plain, noisy))
    shown = other != 0
    assert shown.any()
    assert torch.equal(one[shown], other[shown])


# --- views that are not square


def test_a_crop_has_the_shape_of_its_view() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 160, 3), dtype=np.uint8)
    crops = crop_batch([image] * 3, ViewSpec("v", (16, 64)), draws(0, 0, 0, 0, 3))
    assert crops.shape == (3, 3, 16, 64)


def test_the_ratio_is_beside_that_of_the_view() -> None:
    uniforms = np.random.default_rng(0).random((500, 24))
    sides = np.full(500, 400), np.full(500, 1600)
    boxes, *_ = crop_boxes(uniforms, *sides, ViewSpec("v", (32, 128), scale=(0.1, 0.5)))
    ratios = boxes[:, 3] / boxes[:, 2] / 4
    assert 0.74 < ratios.min() < 0.8
    assert 1.25 < ratios.max() < 1.35


@pytest.mark.parametrize("size", [(64, 16), (16, 64)])
def test_crops_along_the_longer_axis_span_the_other(size: tuple[int, int]) -> None:
    uniforms = np.random.default_rng(0).random((300, 24))
    spec = ViewSpec("v", size, scale=(0.3, 0.6), crop_axes="longer")
    heights, widths = np.full(300, 5 * size[0]), np.full(300, 5 * size[1])
    boxes, *_ = crop_boxes(uniforms, heights, widths, spec)
    long, short = (0, 1) if size[0] > size[1] else (1, 0)
    assert (boxes[:, 2 + short] == 5 * size[short]).all()
    assert (boxes[:, short] == 0).all()
    share = boxes[:, 2 + long] / (5 * size[long])
    assert 0.295 < share.min() < 0.32
    assert 0.58 < share.max() < 0.605
    assert (boxes[:, long] >= 0).all()
    assert (boxes[:, long] + boxes[:, 2 + long] <= 5 * size[long]).all()
    assert len(set(boxes[:, long].tolist())) > 50


def test_upside_down_is_drawn_for_itself() -> None:
    image = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
    spec = ViewSpec("v", 4, scale=(1, 1), ratio=(1, 1), flip=0.0, vflip=0.5)
    crops = crop_batch([image] * 40, spec, draws(0, 0, 0, 0, 40)).permute(0, 2, 3, 1).numpy()
    turned = sum(np.array_equal(crop, image[::-1]) for crop in crops)
    assert sum(np.array_equal(crop, image) for crop in crops) + turned == 40
    assert 8 < turned < 32


# --- sets by domain


@pytest.mark.parametrize("name", DOMAINS)
def test_a_domain_lies_over_the_recipe_and_settings_over_it(name: str) -> None:
    recipe = override(tiny(), [f"domain={name}", "views.global_size=16x64", "views.local_size=8x32"])
    for key, value in DOMAINS[name].views.items():
        assert getattr(recipe.views, key) == value, key
    specs = view_specs(recipe)
    assert [spec.size for spec in specs] == [(16, 64), (16, 64), (8, 32)]
    own = override(tiny(), ["views.flip=0.25", f"domain={name}"])
    assert own.views.flip == 0.25  # whatever the order


def test_sets_follow_channels_bits_shape_and_background() -> None:
    assert suggest_domain(3, 8, 1.3) == "photographs"
    assert suggest_domain(3, 8, 1.4, background=0.8) == "documents"
    assert suggest_domain(1, 16, 1.1) == suggest_domain(1, 8, 1.1) == suggest_domain(3, 16, 1.0) == "medical"
    assert suggest_domain(1, 8, 8.0) == "spectrogram"
    assert suggest_domain(13, 16, 1.0) == suggest_domain(2, 8, 1.0) == "multispectral"
