"""Common corruptions of images at five severities, as batched tensor operations.

Kinds and severities follow those of Hendrycks and Dietterich (ICLR 2019); lengths (blur radii, displacements) are
shares of the image side, so that they mean the same at 32 and at 224 px. The operations are our own: numbers compare
between encoders measured here, not with published ImageNet-C tables (for those, give the ImageNet-C folders).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pydantic import AfterValidator, Field
from torch import Tensor

from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import eval_batches
from mim_refiner.data.photometric import seeded_generator
from mim_refiner.evaluation.features import ImageTransform
from mim_refiner.settings import FrozenSettings, Listed, PositiveInt, one_of

SEVERITIES = (1, 2, 3, 4, 5)
Draw = Callable[..., Tensor]  # shape -> standard normal numbers, one generator an image


def corrupt(images: Tensor, positions: Tensor, kind: str, severity: int, seed: int) -> Tensor:
    """Corrupt uint8 images [B, 3, S, S]; image i's random numbers depend on (seed, kind, its position) alone."""
    number = list(CORRUPTIONS).index(kind)
    generators = [seeded_generator(seed, 31, number, int(position)) for position in positions]

    def draw(*shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    result = CORRUPTIONS[kind](images.float() / 255, severity - 1, draw)
    return result.clamp(0, 1).mul(255).round().to(torch.uint8)


def _gaussian_noise(x: Tensor, level: int, draw: Draw) -> Tensor:
    return x + (0.08, 0.12, 0.18, 0.26, 0.38)[level] * draw(*x.shape[1:])


def _shot_noise(x: Tensor, level: int, draw: Draw) -> Tensor:
    """Photon noise: variance x / photons (the normal limit of the Poisson distribution)."""
    photons = (60, 25, 12, 5, 3)[level]
    return x + (x / photons).sqrt() * draw(*x.shape[1:])


def _impulse_noise(x: Tensor, level: int, draw: Draw) -> Tensor:
    """Salt and pepper on a share of all values."""
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[level]
    uniform = torch.special.ndtr(draw(*x.shape[1:]))
    return torch.where(uniform < share / 2, 0.0, torch.where(uniform > 1 - share / 2, 1.0, x))


def _defocus_blur(x: Tensor, level: int, draw: Draw) -> Tensor:
    radius = (3, 4, 6, 8, 10)[level] / 224 * x.shape[-1]
    reach = math.floor(radius) + 1
    grid = torch.arange(-reach, reach + 1.0)
    distance = (grid[:, None] ** 2 + grid[None] ** 2).sqrt()
    disk = (radius + 1 - distance).clamp(0, 1)  # blurred by the pixel's own size
    weight = (disk / disk.sum()).expand(x.shape[1], 1, -1, -1)
    mode = "reflect" if reach < min(x.shape[2:]) else "replicate"
    return F.conv2d(F.pad(x, (reach,) * 4, mode=mode), weight, groups=x.shape[1])


def _motion_blur(x: Tensor, level: int, draw: Draw) -> Tensor:
    length = (10, 15, 15, 20, 25)[level] / 224 * x.shape[-1]
    angles = (torch.special.ndtr(draw()) - 0.5) * math.pi / 2
    taps = max(3, 2 * math.ceil(length) + 1)
    offsets = torch.linspace(-length / 2, length / 2, taps) * 2 / x.shape[-1]
    base = F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), list(x.shape), align_corners=False)
    direction = torch.stack([angles.cos(), angles.sin()], dim=1)[:, None, None]
    views = [
        F.grid_sample(x, base + offset * direction, padding_mode="reflection", align_corners=False)
        for offset in offsets
    ]
    return torch.stack(views).mean(0)


def _zoom_blur(x: Tensor, level: int, draw: Draw) -> Tensor:
    largest = (1.11, 1.16, 1.21, 1.26, 1.31)[level]
    views = []
    for factor in torch.linspace(1, largest, 8).tolist():
        theta = torch.tensor([[1 / factor, 0, 0], [0, 1 / factor, 0]]).expand(len(x), 2, 3)
        views.append(F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False))
    return torch.stack(views).mean(0)


def _fog(x: Tensor, level: int, draw: Draw) -> Tensor:
    """Smooth noise of several scales over the image, then the range pressed back."""
    strength = (1.5, 2.0, 2.5, 2.5, 3.0)[level]
    size, haze = x.shape[-1], torch.zeros(len(x), 1, *x.shape[2:])
    for octave in range(1, 6):
        cells = min(2**octave, size)
        haze = haze + F.interpolate(draw(1, cells, cells), size=x.shape[2:], mode="bilinear") / 2**octave
    haze = haze - haze.amin((2, 3), keepdim=True)
    haze = haze / haze.amax((2, 3), keepdim=True).clamp_min(1e-6)
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + strength * haze) * brightest / (brightest + strength)


def _brightness(x: Tensor, level: int, draw: Draw) -> Tensor:
    """Raise the value (largest channel) of every pixel, hue and saturation kept."""
    value = x.amax(1, keepdim=True).clamp_min(1e-6)
    return x * ((value + (0.1, 0.2, 0.3, 0.4, 0.5)[level]).clamp(max=1) / value)


def _contrast(x: Tensor, level: int, draw: Draw) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return mean + (0.4, 0.3, 0.2, 0.1, 0.05)[level] * (x - mean)


def _elastic(x: Tensor, level: int, draw: Draw) -> Tensor:
    """Displace pixels by smooth random vectors of this typical length (share of the side)."""
    length = (0.008, 0.012, 0.018, 0.026, 0.036)[level]
    cells = max(3, min(12, x.shape[-1] // 4))
    shift = F.interpolate(draw(2, cells, cells), size=x.shape[2:], mode="bicubic", align_corners=True)
    base = F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), list(x.shape), align_corners=False)
    grid = base + 2 * length * shift.permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def _pixelate(x: Tensor, level: int, draw: Draw) -> Tensor:
    side = max(1, round((0.6, 0.5, 0.4, 0.3, 0.25)[level] * x.shape[-1]))
    return F.interpolate(F.interpolate(x, size=(side, side), mode="area"), size=x.shape[2:], mode="nearest")


def _jpeg(x: Tensor, level: int, draw: Draw) -> Tensor:
    quality = (25, 18, 15, 10, 7)[level]
    pixels = x.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    decoded = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        decoded.append(np.asarray(Image.open(buffer)))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float() / 255


# in this order, which is part of the random numbers' seeds
CORRUPTIONS: dict[str, Callable[[Tensor, int, Draw], Tensor]] = {each.__name__.removeprefix("_"): each for each in (
    _gaussian_noise, _shot_noise, _impulse_noise, _defocus_blur, _motion_blur, _zoom_blur, _fog, _brightness, _contrast,
    _elastic, _pixelate, _jpeg,
)}  # fmt: skip

_Kind = Annotated[str, AfterValidator(one_of(CORRUPTIONS))]
_Severity = Annotated[int, Field(ge=min(SEVERITIES), le=max(SEVERITIES))]


class RobustnessSettings(FrozenSettings):
    """``images``: at most so many test images, evenly spaced (None: all). ``classifiers``: knn, linear or both."""

    kinds: Annotated[tuple[_Kind, ...], Field(min_length=1), Listed] = tuple(CORRUPTIONS)
    severities: Annotated[tuple[_Severity, ...], Field(min_length=1), Listed] = SEVERITIES
    classifiers: Annotated[tuple[Literal["knn", "linear"], ...], Field(min_length=1), Listed] = ("knn", "linear")
    images: PositiveInt | None = None


def corrupted(kind: str, severity: int, seed: int) -> ImageTransform:
    """Centre crops with one corruption."""

    def batches(
        images: ImageSet, size: int, batch_size: int, indices: NDArray[np.int64] | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for batch, positions in eval_batches(images, size, batch_size, indices=indices):
            yield corrupt(batch, positions, kind, severity, seed), positions

    return ImageTransform(f"corruption {kind} {severity} seed {seed}", batches)
