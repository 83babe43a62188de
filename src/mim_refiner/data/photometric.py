"""Colour jitter, blur, grayscale, solarise and normalise for a whole batch, by one code path on CPU and GPU.

Order and distributions are those of the paper's per-image pipeline (arXiv 2402.10093; torchvision's ColorJitter,
GaussianBlur, RandomGrayscale, RandomSolarize). All random numbers come from an explicit CPU generator, one row of
numbers an image, so the device changes nothing about what is drawn; what a step drew reaches it in one copy.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mim_refiner.core.collectives import Rows
from mim_refiner.core.run import send
from mim_refiner.data import domain
from mim_refiner.data.views import ViewSpec
from mim_refiner.errors import InputError
from mim_refiner.reporting import number_of

_LUMA = (0.2989, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_TILE = 32  # pixels of output that a product of the blur gives
_PHOTOGRAPHS = domain.DomainSpec()  # those that nothing of data/domain.py is done to
_DRAWS = 13  # jitter?, four factors, four order keys, blur?, sigma, gray?, solarise?
_CHUNK_BYTES = 2**19  # of images that a CPU takes through all operations together: they stay in its cache


def seeded_generator(seed: int, *path: int) -> torch.Generator:
    """Return a CPU generator that depends on the seed and the integers of ``path`` (such as epoch, step) alone."""
    state = np.random.SeedSequence([seed % 2**64, *path]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn uint8 [B, C, H, W] into float32 (x / 255 - mean) / std on the images' device; uint16: x / 65535."""
    shift, scale = send([_moments(mean, std, images.shape[1])], images.device)[0]
    return _to_unit(images).sub_(shift).div_(scale)


def _to_unit(images: Tensor) -> Tensor:
    """Float32 on the 0-1 scale."""
    return images.float().div_(65535 if images.dtype == torch.uint16 else 255)


def _moments(mean: Sequence[float], std: Sequence[float], channels: int) -> Tensor:
    """[2, C, 1, 1]."""
    if len(mean) != channels or len(std) != channels:
        counts = f"{number_of(channels, 'channels')}, {number_of(len(mean), 'means')} and "
        counts += number_of(len(std), "standard deviations")
        raise InputError(f"images have {counts}; give one mean and one deviation for each channel")
    return torch.tensor([tuple(mean), tuple(std)], dtype=torch.float32)[:, :, None, None]


class PhotometricParams(NamedTuple):
    """Drawn parameters of a batch, on the CPU. A row of ``order`` lists operation numbers in the order of their use."""

    jitter: Tensor  # bool [B]
    factors: Tensor  # float32 [B, 4]: brightness, contrast, saturation factor; hue shift in turns
    order: Tensor  # int64 [B, 4]
    blur: Tensor  # bool [B]
    sigma: Tensor  # float32 [B], pixels
    gray: Tensor  # bool [B]
    solarize: Tensor  # bool [B]


def draw_params(spec: ViewSpec, count: int, generator: torch.Generator, own: slice = slice(None)) -> PhotometricParams:
    """Draw the parameters of ``count`` images from a CPU generator; those of the images ``own``."""
    uniform = torch.rand(count, _DRAWS, generator=generator)[own]
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


@dataclass(frozen=True)
class BatchPhotometric:
    """The photometric augmentations of one view: uint8 or uint16 [B, C, H, W] in, normalised float32 out.

    Images of other than three channels have no colour: the jitter then changes brightness and contrast, each channel
    about its own mean; saturation, hue, grayscale and solarise are left out.
    """

    view: ViewSpec
    mean: Sequence[float]
    std: Sequence[float]

    def draw(
        self, count: int, generator: torch.Generator, rows: Rows | None = None
    ) -> tuple[PhotometricParams, Tensor | None]:
        """What happens to ``count`` images or ``rows``, and the table of data/domain.py for what is no photograph."""
        total, own = (count, slice(None)) if rows is None else (rows.total, slice(rows.start, rows.stop))
        params, photographs = draw_params(self.view, total, generator, own), self.view.domain == _PHOTOGRAPHS
        return params, None if photographs else domain.draw(total, len(self.mean), generator, own)

    def __call__(self, images: Tensor, generator: torch.Generator, rows: Rows | None = None) -> Tensor:
        """:func:`augment` of one view, on the images' device."""
        return augment([images], [self], generator, images.device, rows)[0]


@torch.no_grad()
def augment(
    views: Sequence[Tensor],
    photometrics: Sequence[BatchPhotometric],
    generator: torch.Generator,
    device: torch.device,
    rows: Rows | None = None,
) -> list[Tensor]:
    """Bring all views of a step to the device and augment them with random numbers of the CPU ``generator``.

    ``rows``: which of all processes' batch they are, for which is drawn. Views of one kind are neighbours in memory.
    """
    groups: dict[object, list[int]] = {}  # views that the same operations suit
    drawn, domains = [], {}
    for number, (images, photometric) in enumerate(zip(views, photometrics, strict=True)):
        view = photometric.view
        params, table = photometric.draw(len(images), generator, rows)
        drawn.append(params)
        if table is not None:
            domains[number] = table
        key = (images.dtype, images.shape[1:], view.blur_sigma[1], view.solarize_threshold)
        groups.setdefault((*key, *photometric.mean, *photometric.std), []).append(number)
    plans = [
        _plan(views[group[0]], photometrics[group[0]], [drawn[number] for number in group], device)
        for group in groups.values()
    ]
    tables = iter(send([table for _, tables in plans for table in tables] + [*domains.values()], device))
    output, moments = list(views), {}
    for group, (chunks, _) in zip(groups.values(), plans, strict=True):
        own = _Tables(*(next(tables) for _ in _Tables._fields))
        pixels = torch.cat([views[number].to(device, non_blocking=True) for number in group])
        with torch.autocast(device.type, enabled=False):
            images = _augmented(pixels, photometrics[group[0]].view, chunks, own)
        for number, part in zip(group, images.split([len(views[number]) for number in group]), strict=True):
            output[number], moments[number] = part, own.moments
    for number, table in zip(domains, tables, strict=True):
        output[number] = domain.apply(output[number], table, photometrics[number].view.domain, moments[number])
    return output


class _Tables(NamedTuple):
    """What the device needs to know of N images, in the order in which they are worked on."""

    order: Tensor  # int64 [N], where they lie in the batch
    weights: Tensor  # float32 [4, 3, N, 1, 1, 1], for ``blend`` in each slot of the jitter
    turns: Tensor  # float32 [N], of the hue
    sigma: Tensor  # float32 [N]
    moments: Tensor  # float32 [2, C, 1, 1]


class _Chunk(NamedTuple):
    """Images that go through the operations together."""

    images: slice
    kinds: list[set[int]]  # operations in each slot of the jitter
    runs: tuple[list[slice], ...]  # of these images: which to blur, to make gray, to solarise


def _plan(
    images: Tensor, photometric: BatchPhotometric, drawn: Sequence[PhotometricParams], device: torch.device
) -> tuple[list[_Chunk], _Tables]:
    """Sort all images, which are like ``images``, by what befalls them and cut them into chunks.

    Within a chunk the hue has its turn at the same time, and those to blur, make gray or solarise lie in few runs (a
    Gray code sorts them): nothing need be picked out and put back.
    """
    params = PhotometricParams(*map(torch.cat, zip(*drawn, strict=True)))
    colour = images.shape[1] == 3
    usable = {BRIGHTNESS, CONTRAST, SATURATION, HUE} if colour else {BRIGHTNESS, CONTRAST}
    turn = (params.order == HUE).int().argmax(1) * colour
    turn[~params.jitter] = 4
    blur, gray, solar = params.blur, params.gray & colour, params.solarize & colour
    code = blur * 4 + (blur ^ gray) * 2 + (gray ^ solar)
    order = ((turn * 8 + code) * 64 + params.order @ torch.tensor([16, 4, 1, 0])).argsort(stable=True)
    kind = params.order[order]
    factor = params.factors[order].gather(1, kind)
    own = torch.where(kind <= max(usable), factor, 1.0)
    weights = torch.stack([own, (1 - factor) * (kind == SATURATION), (1 - factor) * (kind == CONTRAST)])

    most = max(1, _CHUNK_BYTES // (4 * images[0].numel())) if device.type == "cpu" else len(order)
    ends = torch.bincount(turn, minlength=5).cumsum(0).tolist()
    cuts = sorted({cut for start, end in pairwise([0, *ends]) for cut in [*range(start, end, most), end]})
    kinds, flags = kind.T.tolist(), [flag[order].tolist() for flag in (blur, gray, solar)]
    chunks = [
        _Chunk(
            slice(start, end),
            [usable & set(slot[start:end]) if start < ends[3] else set() for slot in kinds],
            tuple(_runs(flag[start:end]) for flag in flags),
        )
        for start, end in pairwise(cuts)
    ]
    tables = _Tables(
        order,
        weights.movedim(2, 0)[..., None, None, None],
        params.factors[order, HUE],
        params.sigma[order],
        _moments(photometric.mean, photometric.std, images.shape[1]),
    )
    return chunks, tables


def _runs(flags: list[bool]) -> list[slice]:
    """Where ``flags`` are set."""
    edges = [place for place, (one, other) in enumerate(pairwise([False, *flags, False])) if one != other]
    return [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def _augmented(pixels: Tensor, view: ViewSpec, chunks: list[_Chunk], tables: _Tables) -> Tensor:
    sorted_images = torch.empty(pixels.shape, device=pixels.device)
    radius = blur_radius(view, min(pixels.shape[2:]))
    shift, scale = tables.moments
    stored = pixels.view(torch.int16) if pixels.dtype == torch.uint16 else pixels  # uint16 has no kernel to pick rows
    for chosen, slots, (blurred, gray, solarized) in chunks:
        images = _to_unit(stored.index_select(0, tables.order[chosen]).view(pixels.dtype))
        for slot, kinds in enumerate(slots):
            if HUE in kinds:
                images = shift_hue(images, tables.turns[chosen])
            elif kinds:
                images = blend(images, kinds, tables.weights[slot, :, chosen])
        for run in blurred:
            images[run] = gaussian_blur(images[run], tables.sigma[chosen][run], radius)
        for run in gray:
            images[run] = to_gray(images[run])
        for run in solarized:
            images[run] = solarize(images[run], view.solarize_threshold / 255)
        torch.div(images.sub_(shift), scale, out=sorted_images[chosen])
    return torch.empty_like(sorted_images).index_copy_(0, tables.order, sorted_images)


def blur_radius(view: ViewSpec, size: int) -> int:
    """Of the kernel: four of the largest sigma (less than 1e-4 of the weight lies beyond), at most half the view."""
    return min(math.ceil(4 * view.blur_sigma[1]), size // 2)


# --- the operations, on float32 images [B, 3, H, W] of the 0-1 scale; each equals torchvision's functional form


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
