"""Decoded images that stay on the device: crops are made there, and nothing but boxes travels.

A crop is resized by one matrix an axis, with the weights of Pillow's bicubic filter with antialiasing: the same boxes
and flips as on the CPU, and the same pixels but for rounding (tests/data/test_resident.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mim_refiner.core.run import send
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.views import Uniforms, ViewSpec, crop_boxes
from mim_refiner.errors import InputError

SHARE = 0.25  # of the free memory that the images may take when nobody says
_NUMBERS = 2**27  # of images that are cut at a time (512 MiB in float32)


class ResidentImages:
    """All images of a set, uint8 [N, C, H, W] padded to the largest, on ``device``; InputError where that cannot be."""

    def __init__(self, images: ImageSet, device: torch.device) -> None:
        if (shape := padded_shape(images)) is None:
            raise InputError("images_on_device=on: needs 8-bit images, all decoded in memory; set it to auto or off")
        self.pixels = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.sides = np.ones((len(images), 2), dtype=np.int64)
        for index, pixels in enumerate(map(images.try_load, range(len(images)))):
            if pixels is not None:
                self.sides[index] = height, width = pixels.shape[:2]
                self.pixels[index, :, :height, :width] = torch.from_numpy(pixels).permute(2, 0, 1)

    def views(self, rows: NDArray[np.int64], specs: Sequence[ViewSpec], drawn: Sequence[Uniforms]) -> list[Tensor]:
        """Every view of the images ``rows`` [B] by its draws [B, 24], uint8 [B, C, h, w], on the device."""
        heights, widths = self.sides[rows].T
        boxes = [crop_boxes(each, heights, widths, spec) for spec, each in zip(specs, drawn, strict=True)]
        tables = [torch.from_numpy(np.column_stack(parts).astype(np.float32)) for parts in boxes]
        chosen, *tables = send([torch.from_numpy(rows), *tables], self.pixels.device)
        step = max(1, _NUMBERS // self.pixels[0].numel())
        parts = []
        for start in range(0, len(rows), step):
            images = self.pixels.index_select(0, chosen[start : start + step]).float()
            cut = zip(tables, specs, strict=True)
            parts.append([crops(images, table[start : start + step], spec) for table, spec in cut])
        return parts[0] if len(parts) == 1 else [torch.cat(part) for part in zip(*parts, strict=True)]


def padded_shape(images: ImageSet) -> tuple[int, int, int, int] | None:
    """[N, C, H, W] of all images padded to the highest and widest; None unless all are in memory, with 8 bits."""
    loaded = map(images.try_load, range(len(images)) if images.cached else ())
    held = [pixels for pixels in loaded if pixels is not None]
    if not held or any(pixels.dtype != np.uint8 for pixels in held):
        return None
    height, width = np.max([pixels.shape[:2] for pixels in held], axis=0).tolist()
    return len(images), images.channels, height, width


def held_on_device(setting: str, images: ImageSet, device: torch.device, free: float) -> ResidentImages | None:
    """``setting`` "on", "off", or "auto": on a GPU, where they take at most a quarter of the ``free`` bytes, padded."""
    if setting == "auto" and device.type != "cpu":
        shape = padded_shape(images)
        setting = "on" if shape and math.prod(shape) <= SHARE * free else "off"
    return ResidentImages(images, device) if setting == "on" else None


def crops(images: Tensor, table: Tensor, spec: ViewSpec) -> Tensor:
    """Float images [B, C, H, W] cut, resized, flipped by ``table`` [B, 6] (box, flips) to uint8 [B, C, h, w]."""
    top, left, height, width, flip, turned = table.unbind(1)
    across = resampling(left, width, images.shape[3], spec.width, flip)
    down = resampling(top, height, images.shape[2], spec.height, turned)
    rows = (images @ across[:, None].mT).round_().clamp_(0, 255)  # after each axis, as Pillow does
    return (down[:, None] @ rows).round_().clamp_(0, 255).to(torch.uint8)


def resampling(start: Tensor, length: Tensor, given: int, wanted: int, mirrored: Tensor) -> Tensor:
    """Weights [B, wanted, given] that resize ``length`` [B] pixels from ``start`` [B] on to ``wanted`` ones.

    The cubic filter of Keys (1981) with a = -0.5, widened where pixels are merged; ``mirrored`` [B]: 1 reverses.
    """
    scale = (length / wanted)[:, None, None]
    place = torch.arange(wanted, device=start.device, dtype=torch.float32)
    place = torch.where(mirrored[:, None] > 0, wanted - 1 - place, place)[:, :, None]
    source = (torch.arange(given, device=start.device) - start[:, None])[:, None]
    x = ((source + 0.5 - (place + 0.5) * scale) / scale.clamp(min=1)).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, far) * (x < 2) * ((source >= 0) & (source < length[:, None, None]))
    return weights / weights.sum(2, keepdim=True)
