"""Multi-crop views: what a view is, and the random resized crop with flip, drawn for a whole batch at once.

The crop follows torchvision's RandomResizedCrop (ten attempts, then a central crop). Every random number of the sample
at position p of an epoch comes from a counter-based generator (Philox) keyed by (seed, epoch, view) at counter p: it
does not depend on the batch size, the worker, the rank, or on where the epoch was entered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mim_refiner.data.channels import common_type, resize_view
from mim_refiner.data.domain import DomainSpec
from mim_refiner.errors import InputError
from mim_refiner.types import ImageSize, height_width

_ATTEMPTS = 10
_DRAWS = 24  # uniform numbers a sample and view: 10 areas, 10 ratios, top, left, flip, upside down
_COUNTERS = _DRAWS // 4  # a Philox counter step gives four 64-bit numbers
_ORDER_STREAM = 0  # stream numbers below the first view's
_FIRST_VIEW_STREAM = 16
Uniforms = NDArray[np.float64]  # [B, 24], rows of :func:`draws`
Sides = NDArray[np.int64]  # [B], pixels
Boxes = tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]  # [B, top left height width], mirrored, upended


@dataclass(frozen=True)
class ViewSpec:
    """One kind of view: its crop and its photometric augmentations (defaults: method.md section 5, without blur).

    size: output pixels, one number for a square or (height, width). count: how many such views a sample gets. scale:
    share of the image area. ratio: width / height of the crop beside that of the view. crop_axes "longer": the crop
    spans the view's shorter axis whole and ``scale`` is its share of the longer one. vflip: upside down. The jitter
    strengths are those of torchvision's ColorJitter; blur_sigma in pixels of the view; solarize_threshold of 255.
    """

    name: str
    size: ImageSize
    count: int = 1
    scale: tuple[float, float] = (0.25, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    vflip: float = 0.0
    crop_axes: Literal["both", "longer"] = "both"
    jitter_prob: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    blur_prob: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    gray_prob: float = 0.2
    solarize_prob: float = 0.0
    solarize_threshold: float = 128.0
    domain: DomainSpec = field(default_factory=DomainSpec)

    @property
    def height(self) -> int:
        return height_width(self.size)[0]

    @property
    def width(self) -> int:
        return height_width(self.size)[1]

    def __post_init__(self) -> None:  # of what recipes do not check themselves
        right = {
            f"scale {self.scale} must be low <= high within (0, 1]": 0 < self.scale[0] <= self.scale[1] <= 1,
            f"blur_sigma {self.blur_sigma} must be low <= high, above 0": 0 < self.blur_sigma[0] <= self.blur_sigma[1],
            f"hue {self.hue} must be at most 0.5": self.hue <= 0.5,
        }
        if problems := [text for text, holds in right.items() if not holds]:
            raise InputError(f"view '{self.name}': {'; '.join(problems)}")


def multi_crop_views(
    global_size: ImageSize,
    local_size: ImageSize,
    num_local: int,
    global_scale: tuple[float, float] = (0.25, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.25),
    *,
    blur_prob: tuple[float, float, float] = (1.0, 0.1, 0.5),
    solarize_prob: tuple[float, float, float] = (0.0, 0.2, 0.0),
    **same: Any,
) -> list[ViewSpec]:
    """Return the refinement views: global0, global1 and ``num_local`` local ones (none for 0).

    ``blur_prob``, ``solarize_prob``: for global0, global1 and local; ``same``: further fields, alike in all views.
    """
    groups = [
        ("global0", global_size, 1, global_scale),
        ("global1", global_size, 1, global_scale),
        ("local", local_size, num_local, local_scale),
    ]
    return [
        ViewSpec(*group, blur_prob=blur, solarize_prob=solarize, **same)
        for group, blur, solarize in zip(groups, blur_prob, solarize_prob, strict=True)
        if group[2]
    ]


def draws(seed: int, epoch: int, view: int, position: int, count: int) -> Uniforms:
    """Uniform numbers [count, 24] that decide the crops of one view of the samples from ``position`` on."""
    stream = _philox(seed, epoch, _FIRST_VIEW_STREAM + view)
    return np.random.Generator(stream.advance(position * _COUNTERS)).random((count, _DRAWS))


def _philox(seed: int, epoch: int, stream: int) -> np.random.Philox:
    return np.random.Philox(key=np.random.SeedSequence([seed % 2**64, epoch, stream]).generate_state(2, np.uint64))


@lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """Return the permutation of ``range(length)`` that is epoch ``epoch``."""
    # Sorting uniform numbers keeps the order independent of NumPy's shuffling algorithm, which may change.
    draws = np.random.Generator(_philox(seed, epoch, _ORDER_STREAM)).random(length)
    return np.argsort(draws, kind="stable").astype(np.int64)


def crop_boxes(uniforms: Uniforms, heights: Sides, widths: Sides, spec: ViewSpec) -> Boxes:
    """The random crops of images [B] of these sizes, as torchvision distributes them."""
    boxes = (_spanning_boxes if spec.crop_axes == "longer" else _free_boxes)(uniforms, heights, widths, spec)
    return boxes, uniforms[:, 22] < spec.flip, uniforms[:, 23] < spec.vflip


def _free_boxes(uniforms: Uniforms, heights: Sides, widths: Sides, spec: ViewSpec) -> NDArray[np.int64]:
    """The first of ten that fits, or the largest central one within the bounds of the ratio."""
    low, high = (bound * spec.width / spec.height for bound in spec.ratio)
    area = (heights * widths)[:, None] * _between(uniforms[:, :_ATTEMPTS], *spec.scale)
    ratio = np.exp(_between(uniforms[:, _ATTEMPTS : 2 * _ATTEMPTS], np.log(low), np.log(high)))
    central = np.minimum(heights, np.rint(widths / low)), np.minimum(widths, np.rint(heights * high))
    crop_h = np.column_stack([np.rint(np.sqrt(area / ratio)), central[0].clip(1)]).astype(np.int64)
    crop_w = np.column_stack([np.rint(np.sqrt(area * ratio)), central[1].clip(1)]).astype(np.int64)
    fits = (crop_w > 0) & (crop_w <= widths[:, None]) & (crop_h > 0) & (crop_h <= heights[:, None])
    first, rows = fits.argmax(axis=1), np.arange(len(uniforms))
    size = np.stack([crop_h[rows, first], crop_w[rows, first]], axis=1)
    spare = np.stack([heights, widths], axis=1) - size
    corner = np.where(first[:, None] < _ATTEMPTS, uniforms[:, 20:22] * (spare + 1), spare / 2).astype(np.int64)
    return np.concatenate([corner, size], axis=1)


def _spanning_boxes(uniforms: Uniforms, heights: Sides, widths: Sides, spec: ViewSpec) -> NDArray[np.int64]:
    """Boxes [B, 4] that span one axis whole: the view's shorter one (of a square view the height)."""
    along_height = spec.height > spec.width
    whole = heights if along_height else widths
    length = np.rint(whole * _between(uniforms[:, 0], *spec.scale)).astype(np.int64).clip(1)
    start = (uniforms[:, 20] * (whole - length + 1)).astype(np.int64)
    zero = np.zeros_like(start)
    edges = (start, zero, length, widths) if along_height else (zero, start, heights, length)
    return np.stack(edges, axis=1)


def _between(uniform: Uniforms, low: float, high: float) -> Uniforms:
    return low + (high - low) * uniform


def scale_reduction(specs: Sequence[ViewSpec], drawn: Sequence[Uniforms], height: int, width: int) -> int:
    """How many times (1, 2, 4, 8) smaller a sample may be with no view enlarged; ``drawn`` [1, 24] for each view."""
    most = min(height // max(spec.height for spec in specs), width // max(spec.width for spec in specs))
    for spec, uniforms in zip(specs, drawn, strict=True):
        if most < 2:  # nearly always so at once for images of the usual sizes
            return 1
        (box,), *_ = crop_boxes(uniforms, np.array([height]), np.array([width]), spec)
        most = min(most, int(box[2]) // (spec.height + 1), int(box[3]) // (spec.width + 1))  # edges are rounded
    return 1 << min(most, 8).bit_length() - 1 if most else 1


def crop_batch(
    images: Sequence[NDArray[Any]],
    spec: ViewSpec,
    uniforms: Uniforms,
    shapes: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """Crop one view of every image [H, W, C] by its row of :func:`draws` [B, 24], to [B, C, height, width].

    Bicubic with antialiasing, then the flips. uint8 stays uint8; beside 16-bit images all become uint16. ``shapes``:
    (height, width) of the whole images, which are cropped, where these are reduced.
    """
    given = np.array([image.shape[:2] for image in images], dtype=np.int64)
    whole = given if shapes is None else np.array(shapes, dtype=np.int64)
    boxes, flips, upside_down = crop_boxes(uniforms, whole[:, 0], whole[:, 1], spec)
    if shapes is not None:
        edges = np.stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])  # [2 corners, B, 2]
        corner, opposite = np.rint(edges * (given / whole)).astype(np.int64)
        boxes = np.concatenate([corner, opposite - corner], axis=1)
    images = common_type(list(images))
    size = spec.height, spec.width
    planes = np.empty((len(images), images[0].shape[2], *size), dtype=images[0].dtype)
    for output, image, (top, left, height, width), flip, turned in zip(
        planes.transpose(0, 2, 3, 1), images, boxes.tolist(), flips.tolist(), upside_down.tolist(), strict=True
    ):
        crop = image[top : top + height, left : left + width]
        if crop.shape[:2] != size:
            crop = resize_view(crop, *size)
        crop = crop[:, ::-1] if flip else crop
        output[:] = crop[::-1] if turned else crop
    return torch.from_numpy(planes)
