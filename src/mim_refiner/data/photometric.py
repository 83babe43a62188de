"""Colour jitter, blur, grayscale, solarise and normalise for a whole batch, by one code path on CPU and GPU.

Order and distributions are those of the paper's per-image pipeline (arXiv 2402.10093; torchvision's ColorJitter,
GaussianBlur, RandomGrayscale, RandomSolarize); each operation equals torchvision's functional form. All random numbers
come from an explicit CPU generator, one row of numbers an image, so the device changes nothing about what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mim_refiner.core.collectives import Rows
from mim_refiner.data.views import ViewSpec
from mim_refiner.errors import InputError

_LUMA = (0.2989, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_DRAWS = 13  # jitter?, four factors, four order keys, blur?, sigma, gray?, solarise?


def seeded_generator(seed: int, *path: int) -> torch.Generator:
    """Return a CPU generator that depends on the seed and the integers of ``path`` (such as epoch, step) alone."""
    state = np.random.SeedSequence([seed % 2**64, *path]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn uint8 [B, C, H, W] into float32 (x / 255 - mean) / std on the images' device; uint16: x / 65535."""
    return _standardize(_to_unit(images), mean, std)


def _to_unit(images: Tensor) -> Tensor:
    """Float32 on the 0-1 scale."""
    return images.float().div_(65535 if images.dtype == torch.uint16 else 255)


def _standardize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    if len(mean) != images.shape[1] or len(std) != images.shape[1]:
        counts = f"{images.shape[1]} channels, {len(mean)} means and {len(std)} standard deviations"
        raise InputError(f"images have {counts}; give one mean and one deviation for each channel")
    shift = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1).to(images.device, non_blocking=True)
    scale = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1).to(images.device, non_blocking=True)
    return images.sub_(shift).div_(scale)


@dataclass(frozen=True)
class PhotometricParams:
    """Drawn parameters of a batch, on the CPU. A row of ``order`` lists operation numbers in the order of their use."""

    jitter: Tensor  # bool [B]
    factors: Tensor  # float32 [B, 4]: brightness, contrast, saturation factor; hue shift in turns
    order: Tensor  # int64 [B, 4]
    blur: Tensor  # bool [B]
    sigma: Tensor  # float32 [B], pixels
    gray: Tensor  # bool [B]
    solarize: Tensor  # bool [B]

    def of(self, rows: Rows) -> PhotometricParams:
        """Those of some rows, from parameters drawn for ``rows.total`` images."""
        return PhotometricParams(*(getattr(self, item.name)[rows.start : rows.stop] for item in fields(self)))


def draw_params(spec: ViewSpec, count: int, generator: torch.Generator) -> PhotometricParams:
    """Draw the parameters of ``count`` images from a CPU generator."""
    uniform = torch.rand(count, _DRAWS, generator=generator)
    strengths = (spec.brightness, spec.contrast, spec.saturation)
    bounds = [(max(0.0, 1 - strength), 1 + strength) for strength in strengths] + [(-spec.hue, spec.hue)]
    low, high = torch.tensor(bounds).T
    sigma_low, sigma_high = spec.blur_sigma
    return PhotometricParams(
        jitter=uniform[:, 0] < spec.jitter_prob,
        factors=low + (high - low) * uniform[:, 1:5],
        order=uniform[:, 5:9].argsort(dim=1, stable=True),
        blur=uniform[:, 9] < spec.blur_prob,
        sigma=sigma_low + (sigma_high - sigma_low) * uniform[:, 10],
        gray=uniform[:, 11] < spec.gray_prob,
        solarize=uniform[:, 12] < spec.solarize_prob,
    )


class BatchPhotometric:
    """The photometric augmentations of one view: uint8 or uint16 [B, C, H, W] in, normalised float32 out.

    Images of other than three channels have no colour: the jitter then changes brightness and contrast, each channel
    about its own mean; saturation, hue, grayscale and solarise are left out.
    """

    def __init__(self, view: ViewSpec, mean: Sequence[float], std: Sequence[float]) -> None:
        self.view = view
        self.mean = tuple(mean)
        self.std = tuple(std)

    @torch.no_grad()
    def __call__(self, images: Tensor, generator: torch.Generator, rows: Rows | None = None) -> Tensor:
        """Augment ``images`` on their device with random numbers of the CPU ``generator``.

        ``rows``: which rows of the batch of all processes they are; drawn is for the whole batch.
        """
        view = self.view
        params = draw_params(view, len(images) if rows is None else rows.total, generator)
        params = params if rows is None else params.of(rows)
        with torch.autocast(images.device.type, enabled=False):
            return _standardize(apply_params(_to_unit(images), params, view), self.mean, self.std)


def apply_params(images: Tensor, params: PhotometricParams, view: ViewSpec) -> Tensor:
    """Apply drawn parameters to float32 images [B, C, H, W] on the 0-1 scale, in place where possible."""
    if images.shape[1] != 3:
        return _apply_without_colour(images, params, view)
    images = _apply_to(images, params.jitter, lambda part, rows: jitter(part, params.factors[rows], params.order[rows]))
    radius = blur_radius(view, min(images.shape[2:]))
    images = _apply_to(images, params.blur, lambda part, rows: gaussian_blur(part, params.sigma[rows], radius))
    images = _apply_to(images, params.gray, lambda part, rows: to_gray(part).expand_as(part).contiguous())
    threshold = view.solarize_threshold / 255
    return _apply_to(images, params.solarize, lambda part, rows: solarize(part, threshold))


def _apply_without_colour(images: Tensor, params: PhotometricParams, view: ViewSpec) -> Tensor:
    """Brightness and contrast in the drawn order, then the blur."""
    for slot in range(4):
        operation = params.order[:, slot]
        for kind in (BRIGHTNESS, CONTRAST):
            change = partial(_blend_channels, params.factors[:, kind], about_mean=kind == CONTRAST)
            images = _apply_to(images, params.jitter & (operation == kind), change)
    radius = blur_radius(view, min(images.shape[2:]))
    return _apply_to(images, params.blur, lambda part, rows: gaussian_blur(part, params.sigma[rows], radius))


def _blend_channels(factors: Tensor, images: Tensor, rows: Tensor, *, about_mean: bool) -> Tensor:
    factor = factors[rows].view(-1, 1, 1, 1).to(images.device, non_blocking=True)
    mean = images.mean(dim=(2, 3), keepdim=True) if about_mean else images.new_zeros(1)
    return images.mul(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _apply_to(images: Tensor, mask: Tensor, operation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Replace the images chosen by the CPU ``mask`` [B] with operation(chosen images, their row numbers)."""
    rows = mask.nonzero().squeeze(1)
    if len(rows) == 0:
        return images
    if len(rows) == len(images):
        return operation(images, rows)
    where = rows.to(images.device, non_blocking=True)
    return images.index_copy_(0, where, operation(images.index_select(0, where), rows))


def to_gray(images: Tensor) -> Tensor:
    """Return the luma [B, 1, H, W] of RGB images."""
    red, green, blue = images.unbind(1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2]).unsqueeze(1)


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Invert the values at or above ``threshold`` (0-1 scale)."""
    return torch.where(images >= threshold, 1 - images, images)


def jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Apply brightness, contrast, saturation and hue to every image, each image in its own ``order`` [B, 4].

    ``factors`` [B, 4] and ``order`` lie on the CPU. The images may be changed in place.
    """
    for slot in range(4):
        operation = order[:, slot]
        images = _apply_to(images, operation != HUE, partial(_blend_rows, factors, operation))
        images = _apply_to(images, operation == HUE, lambda part, rows: shift_hue(part, factors[rows, HUE]))
    return images


def _blend_rows(factors: Tensor, operation: Tensor, images: Tensor, rows: Tensor) -> Tensor:
    return _blend(images, factors[rows], operation[rows])


def _blend(images: Tensor, factors: Tensor, operation: Tensor) -> Tensor:
    """Brightness, contrast or saturation: factor * image + (1 - factor) * reference, clamped to 0-1.

    The reference is black, the mean luma, or the luma of each pixel.
    """
    device = images.device
    factor = factors.gather(1, operation[:, None])[:, 0]
    rest = 1 - factor
    weights = torch.stack([factor, rest * (operation == SATURATION), rest * (operation == CONTRAST)])
    own, luma, mean = weights.view(3, -1, 1, 1, 1).to(device, non_blocking=True)
    gray = to_gray(images)
    reference = gray.mean(dim=(2, 3), keepdim=True).mul_(mean).add(gray.mul_(luma))
    return images.mul_(own).add_(reference).clamp_(0, 1)


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of RGB images [B, 3, H, W] (0-1) by ``shift`` [B] turns, keeping HSV saturation and value.

    Uses the closed form channel = V - C * clamp(min(k, 4 - k), 0, 1) with k = (offset + 6 hue) mod 6, chroma C.
    """
    turns = (shift * 6).view(-1, 1, 1).to(images.device, non_blocking=True)
    red, green, blue = images.unbind(1)
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)
    inverse = torch.where(chroma == 0, torch.ones_like(chroma), chroma).reciprocal_()
    hue = torch.where(
        value == red,
        (green - blue).mul_(inverse),
        torch.where(value == green, (blue - red).mul_(inverse).add_(2), (red - green).mul_(inverse).add_(4)),
    ).add_(turns)
    offsets = torch.tensor([5.0, 3.0, 1.0]).view(3, 1, 1).to(images.device, non_blocking=True)
    k = (hue.unsqueeze(1) + offsets).remainder_(6)
    k = torch.minimum(k, 4 - k).clamp_(0, 1)
    return k.mul_(chroma.unsqueeze(1)).neg_().add_(value.unsqueeze(1))


def blur_radius(view: ViewSpec, size: int) -> int:
    """Return the kernel radius: four of the largest sigma, at most half the view.

    For sigma up to 2 px that is 8 (a 17-tap kernel). The common 23-tap kernel of 224 px pipelines differs from it by
    less than 1e-4 of the weight, as the tail beyond 4 sigma holds no more.
    """
    return min(math.ceil(4 * view.blur_sigma[1]), size // 2)


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each image [B, C, H, W] with its own ``sigma`` [B] (pixels), 2 * radius + 1 taps, reflected border.

    Each direction is one batched product with a banded matrix that includes the border: faster than a grouped
    convolution with a kernel an image, on CPU and GPU.
    """
    batch, channels, height, width = images.shape
    taps = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.softmax(-0.5 * (taps / sigma[:, None]).square(), dim=1).to(images.device, non_blocking=True)
    across = _blur_matrices(kernel, width)
    down = across if height == width else _blur_matrices(kernel, height)
    rows = torch.bmm(images.reshape(batch, channels * height, width), across).view(batch, channels, height, width)
    return torch.matmul(down.transpose(1, 2).unsqueeze(1), rows)


def _blur_matrices(kernel: Tensor, size: int) -> Tensor:
    """Return M [B, size, size] with (x @ M)[o] = sum over taps t of kernel[t] * x[reflect(o + t - radius)]."""
    taps = kernel.shape[1]
    source = torch.arange(size) + torch.arange(taps)[:, None] - taps // 2
    source = source.abs()
    source = torch.where(source >= size, 2 * (size - 1) - source, source)  # [taps, size]
    matrices = torch.zeros(len(kernel), size * size, device=kernel.device)
    flat = (source * size + torch.arange(size)).reshape(-1).to(kernel.device, non_blocking=True)
    matrices.index_add_(1, flat, kernel.repeat_interleave(size, dim=1))
    return matrices.view(len(kernel), size, size)
