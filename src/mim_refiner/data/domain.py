"""What images other than photographs need: rotation, gain and noise of each channel, masked bands; batched, any device.

Works on normalised images, whose mean is zero: that is what a masked band holds. Random numbers are one row an image of
a CPU generator; the noise of a pixel is a hash of its image's number and its place, so the device changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mim_refiner.core.device import hashed, in_float64

_DRAWS = 7  # angle, noise, its seed, length and place of both bands; then a gain a channel
_NOISY_AT_ONCE = 2**22  # values


@dataclass(frozen=True)
class DomainSpec:
    """Augmentations of images that are no photographs; all off.

    rotate: largest turn in degrees, either way, border mirrored. gain: each channel times 1 - gain to 1 + gain. noise:
    largest standard deviation, 0-1 scale. mask_rows, mask_columns: largest share of a band (SpecAugment, 1904.08779).
    """

    rotate: float = 0.0
    gain: float = 0.0
    noise: float = 0.0
    mask_rows: float = 0.0
    mask_columns: float = 0.0


def draw(count: int, channels: int, generator: torch.Generator, own: slice = slice(None)) -> Tensor:
    """Uniform numbers [count, 7 + channels] that decide all of :func:`apply`; the rows ``own`` of them."""
    return torch.rand(count, _DRAWS + channels, generator=generator)[own]


@torch.no_grad()
def apply(images: Tensor, drawn: Tensor, spec: DomainSpec, moments: Tensor) -> Tensor:
    """Augment normalised float32 images [B, C, H, W] by their rows of ``drawn`` [B, 7 + C]; ``moments`` [2, C, 1, 1]:
    mean and standard deviation that they were normalised by. All on one device.
    """
    mean, std = moments
    angle, sigma, seed, rows_length, rows_start, columns_length, columns_start = drawn[:, :_DRAWS].unbind(1)
    if spec.rotate:
        images = rotated(images, (2 * angle - 1) * math.radians(spec.rotate))
    if spec.gain:  # of the values before normalisation
        gain = (1 + spec.gain * (2 * drawn[:, _DRAWS:] - 1))[:, :, None, None]
        images = images * gain + (gain - 1) * (mean / std)
    if spec.noise:
        numbers = (seed * 2**24).long().split(max(1, _NOISY_AT_ONCE // images[0].numel()))
        noise = torch.cat([hashed_normal(part, images.shape[1:]) for part in numbers])
        images = images + (spec.noise * sigma)[:, None, None, None] / std * noise
    if spec.mask_rows or spec.mask_columns:
        in_rows = _band(images.shape[2], rows_length * spec.mask_rows, rows_start)[:, None, :, None]
        in_columns = _band(images.shape[3], columns_length * spec.mask_columns, columns_start)[:, None, None, :]
        images = images.masked_fill(in_rows | in_columns, 0.0)
    return images


def rotated(images: Tensor, angle: Tensor) -> Tensor:
    """Turn each image about its centre by ``angle`` [B] radians, by pixels; bilinear, mirrored border."""
    height, width = images.shape[2:]
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    first = torch.stack([cos, -sin * height / width, zero], dim=1)
    second = torch.stack([sin * width / height, cos, zero], dim=1)
    grid = F.affine_grid(torch.stack([first, second], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def hashed_normal(numbers: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal values [B, *shape], a function of the image's number (int64 [B] below 2**24) and the place."""
    place = torch.arange(math.prod(shape), device=numbers.device)
    keys = hashed(hashed(numbers).unsqueeze(1) + place)
    radius = (-2 * (in_float64(keys + 1) / 2**32).log()).sqrt()
    turn = in_float64(hashed(keys ^ 0x9E3779B9)) * (2 * math.pi / 2**32)
    return (radius * turn.cos()).float().to(numbers.device).view(len(numbers), *shape)


def _band(size: int, share: Tensor, start: Tensor) -> Tensor:
    """[B, size], True within a band of ``share`` of the size that begins anywhere where it fits."""
    length = (share * size).round()
    first = (start * (size - length + 1)).floor()
    place = torch.arange(size, device=share.device)
    return (place >= first[:, None]) & (place < (first + length)[:, None])
