"""Photometric operations on float32 images [B, 3, H, W] of the 0-1 scale; each equals torchvision's functional form."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (0.2989, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_TILE = 32  # pixels of output that a product of the blur gives


def to_gray(images: Tensor) -> Tensor:
    """Return the luma [B, 1, H, W] of RGB images."""
    red, green, blue = images.unbind(1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2]).unsqueeze(1)


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Invert the values at or above ``threshold`` (0-1 scale)."""
    return torch.lerp(images, 1 - images, (images - threshold).sign_().add_(1).clamp_(max=1))


def blend(images: Tensor, kinds: Collection[int], weights: Tensor) -> Tensor:
    """Brightness, contrast or saturation: factor * image + (1 - factor) * reference, clamped to 0-1; in place.

    The reference is black, the mean luma, or the luma of each pixel (of images without colour: the channel's mean).
    ``weights`` [3, B, 1, 1, 1]: of the image, of its luma and of its mean; ``kinds``: operations that occur in them.
    """
    own, luma, mean = weights
    reference = None
    if CONTRAST in kinds or SATURATION in kinds:
        gray = to_gray(images) if images.shape[1] == 3 else images
        if CONTRAST in kinds:
            reference = gray.mean(dim=(2, 3), keepdim=True).mul_(mean)
        if SATURATION in kinds:
            gray = gray.mul_(luma)
            reference = gray if reference is None else gray.add_(reference)
    images = images.mul_(own)
    return (images if reference is None else images.add_(reference)).clamp_(0, 1)


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of RGB images by ``shift`` [B] turns, keeping HSV saturation and value.

    Uses the closed form channel = V - C * clamp(min(k, 4 - k), 0, 1) with k = (offset + 6 hue) mod 6, chroma C.
    """
    # Choices are lerps with weights 0 and 1, which is exact: comparisons and where() are ten times slower on a CPU.
    red, green, blue = images.unbind(1)
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)
    inverse = (1 - chroma.sign()).add_(chroma).reciprocal_()  # of 1 where there is no colour
    hue = torch.lerp((blue - red).mul_(inverse).add_(2), (red - green).mul_(inverse).add_(4), (value - green).sign_())
    hue = torch.lerp((green - blue).mul_(inverse), hue, (value - red).sign_()).add_((shift * 6).view(-1, 1, 1))
    offsets = torch.arange(5.0, 0.0, -2.0, device=images.device).view(3, 1, 1)
    k = hue.unsqueeze(1) + offsets
    k = k.sub_(k.div(6).floor_(), alpha=6)
    k = torch.minimum(k, 4 - k).clamp_(0, 1)
    return k.mul_(chroma.unsqueeze(1)).neg_().add_(value.unsqueeze(1))


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each image [B, C, H, W] with its own ``sigma`` [B] (pixels), 2 * radius + 1 taps, reflected border.

    Each direction is a batched product of an image's banded matrix with windows, tiles with their surroundings: faster
    than a grouped convolution with a kernel an image, on CPU and GPU.
    """
    batch, channels, height, width = images.shape
    taps = torch.arange(-radius, radius + 1, dtype=torch.float32, device=images.device)
    kernel = torch.softmax(-0.5 * (taps / sigma[:, None]).square(), dim=1)
    tiles, tile, span = _tiles(width, radius)
    padded = F.pad(F.pad(images, (radius, radius, 0, 0), mode="reflect"), (0, tiles * tile - width))
    windows = padded.unfold(3, span, tile).reshape(batch, -1, span)
    across = torch.bmm(windows, _band(kernel, tile).mT).view(batch, channels, height, tiles * tile)[..., :width]
    tiles, tile, span = _tiles(height, radius)
    source = (
        torch.arange(span, device=images.device) + tile * torch.arange(tiles, device=images.device)[:, None] - radius
    )
    source = (height - 1 - (height - 1 - source.abs()).abs()).clamp_(0)  # reflected; rows that nobody reads stay inside
    windows = across.index_select(2, source.view(-1)).view(batch, channels, tiles, span, width)
    down = torch.matmul(_band(kernel, tile)[:, None, None], windows).view(batch, channels, tiles * tile, width)
    return down[:, :, :height]


def _tiles(size: int, radius: int) -> tuple[int, int, int]:
    """How many tiles cover ``size`` pixels, their length, and that of the windows they are made of."""
    tiles = math.ceil(size / _TILE)
    tile = math.ceil(size / tiles)
    return tiles, tile, tile + 2 * radius


def _band(kernel: Tensor, tile: int) -> Tensor:
    """[B, tile, taps - 1 + tile] with band[o, o + t] = kernel[t]: kernel and zeros in a row, read a number short."""
    batch, taps = kernel.shape
    return F.pad(kernel, (0, tile)).repeat(1, tile)[:, : tile * (taps - 1 + tile)].view(batch, tile, -1)
