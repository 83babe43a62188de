"""Segmentation protocol: a linear probe on patch tokens, scored by sliding window and mIoU (method section 6).

BatchNorm without parameters and a 1x1 convolution on the concatenated tokens of several blocks; the encoder is frozen,
so the tokens of all windows are computed once. A patch's loss is the mean cross-entropy over its labelled pixels (the
logits repeated over the patch); for scoring the logits are upsampled bilinearly and averaged where windows overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from mim_refiner.core.device import autocast, resolve_precision
from mim_refiner.core.metrics import class_iou, mean_iou_interval
from mim_refiner.core.modules import evaluation_mode
from mim_refiner.core.schedules import peak_learning_rate, warmup_cosine
from mim_refiner.data.channels import MAX_PIXELS
from mim_refiner.data.decode import ImageSet, Pixels
from mim_refiner.data.masks import Mask, MaskSet
from mim_refiner.data.photometric import normalize
from mim_refiner.errors import InputError
from mim_refiner.evaluation.cache import FeatureCache, data_identity, model_identity
from mim_refiner.models.backbone import Backbone

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SegmentationSettings:
    """``window`` (pixels, None: the encoder's image size) and ``stride`` (share of it) of the sliding window.

    ``short_side`` resizes images and masks first (None: as they are, at least a window). ``count`` blocks, every
    ``every``-th from the last. The optimiser's values are those of the published code's per-block probe.
    """

    window: int | None = None
    stride: float = 2 / 3
    short_side: int | None = None
    every: int = 4
    count: int = 4
    norm: bool = False
    epochs: int = 50
    batch_size: int = 64  # windows
    lr: float = 0.1  # for 256 windows a step
    momentum: float = 0.9
    warmup: float = 0.1
    end_rate: float = 1e-6
    init_std: float = 0.01


@dataclass(frozen=True)
class SegmentationScore:
    """mIoU with its bootstrap interval over test images; ``confusions`` [N, C (truth), C (predicted)]: pixels."""

    mean_iou: float
    ci95: tuple[float, float]
    pixel_accuracy: float
    by_class: tuple[float, ...]
    confusions: NDArray[np.int64]
    blocks: tuple[int, ...]
    window: int


@dataclass(frozen=True)
class Windows:
    """Tokens of all windows of an image set, and where they lie."""

    tokens: Tensor  # float16 [W, P, D]
    places: Tensor  # int64 [W, 3]: image, top, left


def segmentation_blocks(depth: int, settings: SegmentationSettings) -> tuple[int, ...]:
    """Every n-th block counted from the last, ascending: 3, 7, 11 of 12."""
    return tuple(sorted(range(depth - 1, -1, -settings.every)[: settings.count]))


def segmentation_protocol(
    backbone: Backbone,
    train: ImageSet,
    test: ImageSet,
    settings: SegmentationSettings | None = None,
    *,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    cache: FeatureCache | None = None,
    progress: Progress | None = None,
) -> SegmentationScore:
    """Train the probe on ``train`` and score it on ``test`` (both with masks).

    Raises DataError for missing masks, InputError for a window that the patch size does not divide.
    """
    settings = settings or SegmentationSettings()
    window = check_segmentation(settings, backbone)
    train_masks, test_masks = MaskSet(train.source), MaskSet(test.source)
    classes = max(train_masks.num_classes(), test_masks.num_classes())
    device = torch.device(device)
    patch = backbone.info.patch_size
    blocks = segmentation_blocks(backbone.info.depth, settings)

    def tokens(images: ImageSet) -> Windows:
        options = (backbone, images, blocks, window, settings, batch_size, device, resolve_precision(precision, device))
        return _windows(*options, cache, progress)

    seen = tokens(train)
    targets = torch.stack(
        [
            _patch_targets(_sized_mask(train_masks, image, settings, window)[top : top + window, left : left + window],
                           patch, classes, train_masks.ignore_index)
            for image, top, left in seen.places.tolist()
        ]
    )  # fmt: skip
    probe = DenseProbe(seen.tokens.shape[2], classes, settings, seed=seed, device=device)
    probe.fit(seen.tokens, targets)
    del seen, targets
    confusions = _score(probe, tokens(test), test_masks, classes, window, patch, settings)
    value, low, high = mean_iou_interval(confusions, seed=seed)
    whole = confusions.sum(0)
    return SegmentationScore(
        mean_iou=value,
        ci95=(min(low, value), max(high, value)),
        pixel_accuracy=float(np.trace(whole) / max(1, whole.sum())),
        by_class=tuple(class_iou(confusions).tolist()),
        confusions=confusions,
        blocks=blocks,
        window=window,
    )


class DenseProbe:
    """BatchNorm without parameters and one linear map from tokens [.., D] to classes."""

    def __init__(
        self, dim: int, classes: int, settings: SegmentationSettings, *, seed: int, device: torch.device
    ) -> None:
        self.settings, self.seed, self.device = settings, seed, device
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6).to(device)
        generator = torch.Generator().manual_seed(seed)
        self.weight = (torch.randn(dim, classes, generator=generator) * settings.init_std).to(device)
        self.bias = torch.zeros(classes, device=device)

    @torch.no_grad()
    def fit(self, tokens: Tensor, targets: Tensor) -> None:
        """SGD over windows: tokens [W, P, D], counts of labelled pixels by class [W, P, C]."""
        settings, count = self.settings, len(tokens)
        batch_size = min(settings.batch_size, count)
        steps = count // batch_size
        total, peak = settings.epochs * steps, peak_learning_rate(settings.lr, batch_size)
        moving = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        generator = torch.Generator().manual_seed(self.seed)
        self.norm.train()
        for step in range(total):
            if step % steps == 0:
                order = torch.randperm(count, generator=generator)
            rows = order[(step % steps) * batch_size : (step % steps + 1) * batch_size]
            normed = self.norm(tokens[rows].to(self.device).float().flatten(0, 1))
            counts = targets[rows].to(self.device).float().flatten(0, 1)
            pixels = counts.sum().clamp_min(1)
            # gradient of the pixels' mean cross-entropy
            error = ((normed @ self.weight + self.bias).softmax(1) * counts.sum(1, keepdim=True) - counts) / pixels
            rate = warmup_cosine(
                step,
                total_steps=total,
                warmup_steps=round(settings.warmup * total),
                peak=peak,
                end=settings.end_rate,
            )
            gradients = normed.T @ error, error.sum(0)
            for parameter, gradient, velocity in zip((self.weight, self.bias), gradients, moving, strict=True):
                velocity.mul_(settings.momentum).add_(gradient)
                parameter.sub_(rate * velocity)
        self.norm.eval()

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """[W, P, C] of tokens [W, P, D], on the CPU."""
        flat = self.norm(tokens.to(self.device).float().flatten(0, 1)) @ self.weight + self.bias
        return flat.view(*tokens.shape[:2], -1).cpu()


def window_places(height: int, width: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Top-left corners (top, left) of windows that cover an image, the last ones flush with its border."""
    tops = [*range(0, height - window, stride), height - window]
    lefts = [*range(0, width - window, stride), width - window]
    return [(top, left) for top in tops for left in lefts]


def _windows(
    backbone: Backbone,
    images: ImageSet,
    blocks: Sequence[int],
    window: int,
    settings: SegmentationSettings,
    batch_size: int,
    device: torch.device,
    precision: str,
    cache: FeatureCache | None,
    progress: Progress | None,
) -> Windows:
    identity: dict[str, Any] = (
        {}
        if cache is None
        else {
            "kind": "windows",
            "model": model_identity(backbone),
            "data": data_identity(images),
            "transform": [window, settings.stride, settings.short_side],
            "blocks": list(blocks),
            "norm": settings.norm,
            "computed": [precision, device.type, torch.__version__],
        }
    )
    found = None if cache is None else cache.get(identity)
    if found is None:
        found = _compute_windows(backbone, images, blocks, window, settings, batch_size, device, precision, progress)
        if cache is not None:
            cache.put(identity, found)
    return Windows(found["tokens"], found["places"])


def _compute_windows(
    backbone: Backbone,
    images: ImageSet,
    blocks: Sequence[int],
    window: int,
    settings: SegmentationSettings,
    batch_size: int,
    device: torch.device,
    precision: str,
    progress: Progress | None,
) -> dict[str, Tensor]:
    backbone.to(device)
    tokens: list[Tensor] = []
    places: list[tuple[int, int, int]] = []
    with evaluation_mode(backbone), torch.inference_mode():
        for batch, where in _window_batches(images, window, settings, batch_size):
            inputs = normalize(batch.to(device), backbone.info.mean, backbone.info.std)
            with autocast(precision, device):
                outputs = backbone.forward_blocks(inputs, blocks, norm=settings.norm)
            tokens.append(torch.cat([output.patches for output in outputs], dim=2).to(torch.float16).cpu())
            places += where
            if progress:
                progress(where[-1][0] + 1, len(images))
    return {"tokens": torch.cat(tokens).clone(), "places": torch.tensor(places)}


def _window_batches(
    images: ImageSet, window: int, settings: SegmentationSettings, batch_size: int
) -> Iterator[tuple[Tensor, list[tuple[int, int, int]]]]:
    """(uint8 [B, 3, window, window], [(image, top, left)]); an unreadable image has no windows."""
    crops: list[Pixels] = []
    places: list[tuple[int, int, int]] = []
    stride = max(1, round(settings.stride * window))
    for index in range(len(images)):
        pixels = images.try_load(index)
        images.raise_if_too_many_unreadable()
        if pixels is None:
            continue
        if _side(pixels, settings, window) ** 2 * max(pixels.shape[:2]) > MAX_PIXELS * min(pixels.shape[:2]):
            reason = f"{pixels.shape[1]}x{pixels.shape[0]} px are too long for windows of {window} px"
            images.add_unreadable([(index, images.source.name(index), reason)])
            continue
        pixels = _sized(pixels, settings, window, Image.Resampling.BICUBIC)
        for top, left in window_places(pixels.shape[0], pixels.shape[1], window, stride):
            crops.append(pixels[top : top + window, left : left + window])
            places.append((index, top, left))
        while len(crops) >= batch_size:
            yield _stacked(crops[:batch_size]), places[:batch_size]
            crops, places = crops[batch_size:], places[batch_size:]
    if crops:
        yield _stacked(crops), places


def _stacked(crops: Sequence[Pixels]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.stack(crops).transpose(0, 3, 1, 2)))


def _sized(
    array: NDArray[np.uint8], settings: SegmentationSettings, window: int, filter_: Image.Resampling
) -> NDArray[np.uint8]:
    """Resize so that the shorter side is ``short_side``, or at least a window."""
    height, width = array.shape[:2]
    short = _side(array, settings, window)
    if short == min(height, width):
        return array
    size = (round(width * short / min(height, width)), round(height * short / min(height, width)))
    return np.asarray(Image.fromarray(array).resize(size, filter_))


def _side(array: NDArray[Any], settings: SegmentationSettings, window: int) -> int:
    return max(settings.short_side or min(array.shape[:2]), window)


def _sized_mask(masks: MaskSet, index: int, settings: SegmentationSettings, window: int) -> Mask:
    return _sized(masks.load(index), settings, window, Image.Resampling.NEAREST)


def _patch_targets(mask: Mask, patch: tuple[int, int], classes: int, ignore: int) -> Tensor:
    """How many pixels of every class a patch has: int16 [P, C]."""
    rows, columns = mask.shape[0] // patch[0], mask.shape[1] // patch[1]
    tiles = mask.reshape(rows, patch[0], columns, patch[1]).transpose(0, 2, 1, 3).reshape(rows * columns, -1)
    counts = np.stack([((tiles == number) & (tiles != ignore)).sum(1) for number in range(classes)], axis=1)
    return torch.from_numpy(counts.astype(np.int16))


def _score(
    probe: DenseProbe,
    windows: Windows,
    masks: MaskSet,
    classes: int,
    window: int,
    patch: tuple[int, int],
    settings: SegmentationSettings,
) -> NDArray[np.int64]:
    """Pixel counts [N, C, C] of every test image, at the size of its own mask."""
    confusions = []
    for image in windows.places[:, 0].unique().tolist():
        mine = windows.places[:, 0] == image
        logits = probe.logits(windows.tokens[mine])
        logits = logits.transpose(1, 2).unflatten(2, (window // patch[0], window // patch[1]))
        logits = F.interpolate(logits, size=(window, window), mode="bilinear", align_corners=False)
        places = windows.places[mine]
        height, width = (int(places[:, axis].max()) + window for axis in (1, 2))
        total, seen = torch.zeros(classes, height, width), torch.zeros(height, width)
        for part, (_, top, left) in zip(logits, places.tolist(), strict=True):
            total[:, top : top + window, left : left + window] += part
            seen[top : top + window, left : left + window] += 1
        truth = masks.load(image)
        mean = (total / seen)[None]
        if mean.shape[2:] != truth.shape:
            mean = F.interpolate(mean, size=truth.shape, mode="bilinear", align_corners=False)
        confusions.append(confusion(truth, mean[0].argmax(0).numpy(), classes, masks.ignore_index))
    return np.stack(confusions)


def confusion(truth: Mask, predicted: NDArray[np.int64], classes: int, ignore: int) -> NDArray[np.int64]:
    """Pixel counts [C (truth), C (predicted)] over labelled pixels."""
    labelled = (truth != ignore) & (truth < classes)
    pairs = truth[labelled].astype(np.int64) * classes + predicted[labelled]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def check_segmentation(settings: SegmentationSettings, backbone: Backbone) -> int:
    """Return the window in pixels; raise InputError for settings that mean nothing."""
    window, patch = settings.window or backbone.info.image_size[0], backbone.info.patch_size
    if window % patch[0] or window % patch[1]:
        raise InputError(f"segmentation.window {window} must be a multiple of the patch size {patch[0]}x{patch[1]}")
    if not 0 < settings.stride <= 1 or settings.every < 1 or settings.count < 1 or settings.epochs < 1:
        raise InputError(
            f"segmentation: stride {settings.stride:g} must be a share of the window; "
            f"every {settings.every}, count {settings.count} and epochs {settings.epochs} at least 1"
        )
    return window
