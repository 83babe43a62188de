"""Resize tables of positions to other grids, each family by its own rule."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mim_refiner.errors import InputError
from mim_refiner.models.mae import sincos_position_table

Grid = tuple[int, int]  # rows and columns of patches

# Rule -> what it does to absolute tables, and to BEiT's tables of relative positions.
RULES = {
    "timm": "bicubic with antialiasing; relative: linear at geometrically spaced distances",
    "flexi": "bilinear without antialiasing (FlexiViT, as timm loads it)",
    "bicubic": "bicubic without antialiasing; relative: linear at geometrically spaced distances",
    "dino": "bicubic without antialiasing, scale computed with an offset of 0.1",
    "hf": "bicubic without antialiasing; relative: bilinear",
    "corners": "bicubic without antialiasing, the corners of both grids on each other (Prithvi)",
    "sincos": "computed anew: sine and cosine of row and column (Scale-MAE)",
    "sinusoid": "computed anew: sine and cosine of the number of the patch (MAE-pytorch, VideoMAE)",
    "hf_transposed": "bicubic without antialiasing; relative: bilinear, rows and columns exchanged (as transformers)",
}
_CLASS_ENTRIES = 3  # of a relative table: class token to patch, patch to class token, class token to itself


def made_once(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``make(*numbers)`` as a function of a tensor and these: the same table on the tensor's device, copied there once.

    At every step the host would wait for the copy. What a trace on fake tensors makes is not kept.
    """

    @lru_cache(maxsize=32)
    def kept(device: torch.device, *numbers: Any) -> Tensor:
        with torch.inference_mode(False):
            return make(*numbers).to(device)

    def on_device_of(like: Tensor, *numbers: Any) -> Tensor:
        return make(*numbers).to(like.device) if isinstance(like, FakeTensor) else kept(like.device, *numbers)

    return on_device_of


def resize_absolute(table: Tensor, old: Grid, new: Grid, *, num_prefix: int, rule: str) -> Tensor:
    """Table [1, P+N, D] of grid ``old`` for grid ``new``; the first ``num_prefix`` entries stay as they are."""
    if old == new:
        return table
    if rule in ("timm", "flexi"):
        kind = {"interpolation": "bilinear", "antialias": False} if rule == "flexi" else {}
        resized: Tensor = resample_abs_pos_embed(table, list(new), list(old), num_prefix, **kind)
        return resized
    prefix, patches = table[:, :num_prefix], table[:, num_prefix:]
    if rule in ("sincos", "sinusoid"):
        return torch.cat([prefix, _kept_table(table, rule, table.shape[-1], new).to(table.dtype)], dim=1)
    image = patches.reshape(1, *old, -1).permute(0, 3, 1, 2).float()  # float32 as in the published code and in timm
    if rule == "dino":
        factors = [(side + 0.1) / before for side, before in zip(new, old, strict=True)]
        image = F.interpolate(image, scale_factor=factors, mode="bicubic")
    else:
        image = F.interpolate(image, size=new, mode="bicubic", align_corners=rule == "corners")
    return torch.cat([prefix, image.permute(0, 2, 3, 1).flatten(1, 2).to(table)], dim=1)


def computed_table(rule: str, dim: int, grid: Grid) -> Tensor:
    """Fixed positions [1, N, dim] of the rules "sincos" and "sinusoid"."""
    return sinusoid_table(grid[0] * grid[1], dim) if rule == "sinusoid" else sincos_position_table(dim, *grid, 0)


_kept_table = made_once(computed_table)


def sinusoid_table(count: int, dim: int) -> Tensor:
    """Fixed positions [1, count, dim] of tokens in a row: sine in even channels, cosine in odd ones."""
    channels = torch.arange(dim, dtype=torch.float64)
    angles = torch.arange(count, dtype=torch.float64)[:, None] / 10000 ** (2 * (channels // 2) / dim)
    return torch.where(channels % 2 == 0, angles.sin(), angles.cos()).float()[None]


def resize_relative(table: Tensor, old: Grid, new: Grid, *, rule: str) -> Tensor:
    """BEiT's table [(2 rows - 1)(2 columns - 1) + 3, K] of grid ``old`` for grid ``new``; differentiable."""
    if old == new and rule != "hf_transposed":
        return table
    if rule in ("hf", "hf_transposed"):
        distances, rest = table[:-_CLASS_ENTRIES], table[-_CLASS_ENTRIES:]
        shape = _span(old) if rule == "hf" else _span(old)[::-1]
        image = distances.reshape(1, *shape, -1).permute(0, 3, 1, 2)
        image = F.interpolate(image, size=_span(new), mode="bilinear")
        return torch.cat([image.permute(0, 2, 3, 1).flatten(0, 2), rest])
    return _geometric(table, old, new).to(table.dtype) @ table


@made_once
def _geometric(old: Grid, new: Grid) -> Tensor:
    """BEiT's resizing of a relative table as a matrix [entries of new, of old]: fast, and differentiable."""
    rows, columns = (_interpolation(before, after) for before, after in zip(_span(old), _span(new), strict=True))
    return torch.block_diag(torch.kron(rows, columns), torch.eye(_CLASS_ENTRIES))


def _interpolation(before: int, after: int) -> Tensor:
    """Linear interpolation [after, before] along one axis of distances.

    The ``before`` known values lie at 0, +-1, +-(1 + q), +-(1 + q + q^2), ...: dense near 0, with q such that the last
    reaches the largest new distance. Beyond the last known one its value holds.
    """
    ratio = _ratio(before // 2, after // 2)
    half = torch.tensor([ratio**k for k in range(before // 2)], dtype=torch.float64).cumsum(0)
    known = torch.cat([-half.flip(0), torch.zeros(1, dtype=torch.float64), half])
    wanted = torch.arange(-(after // 2), after // 2 + 1, dtype=torch.float64)
    # share of each gap between known values that lies before a wanted distance
    passed = ((wanted[:, None] - known[:-1]) / known.diff()).clamp(0, 1)
    return (F.pad(passed, (1, 0), value=1.0) - F.pad(passed, (0, 1))).float()


def _ratio(count: int, reach: int) -> float:
    """q between 1.01 and 1.5 for which 1 + q + ... + q^(count - 1) is ``reach``, to 1e-6, by bisection."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q**count) / (1 - q) > reach else (q, high)
    return (low + high) / 2


def _span(grid: Grid) -> Grid:
    """Number of vertical and of horizontal distances between patches."""
    return 2 * grid[0] - 1, 2 * grid[1] - 1


def check_image_size(image_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
    """Raise InputError unless both sides of ``image_size`` (H, W pixels) are multiples of the patch."""
    if any(side < patch or side % patch for side, patch in zip(image_size, patch_size, strict=True)):
        near = [max(patch, round(side / patch) * patch) for side, patch in zip(image_size, patch_size, strict=True)]
        raise InputError(
            f"image size {image_size[0]}x{image_size[1]} is not a multiple of the patch size "
            f"{patch_size[0]}x{patch_size[1]}; use for example {near[0]}x{near[1]}"
        )
