"""Two random views of the same images as feature inputs: what the label-free measures compare.

A view is an :class:`ImageTransform`, so that its features come from the same extraction (and cache) as all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import Indices, decoded_batches
from mim_refiner.data.photometric import BatchPhotometric, seeded_generator
from mim_refiner.data.views import ViewSpec, crop_batch, draws
from mim_refiner.evaluation.features import CENTRE_CROP, Features, ImageTransform, feature_sets
from mim_refiner.models.backbone import Backbone
from mim_refiner.types import ImageSize, height_width

# Crops of at least 40 % of the area and the paper's colour changes: strong enough that a copy of the pixels is no
# help, mild enough that both views mostly show the same thing.
VIEW = ViewSpec("label-free", 1, scale=(0.4, 1.0), gray_prob=0.2, blur_prob=0.25, blur_sigma=(0.1, 1.0))
BLUR_REFERENCE = 32  # pixels; the blur grows with the image


class PairedViews(NamedTuple):
    """Features of the images as they are, and of two random views of each; rows correspond. Keys: norm applied?"""

    clean: Mapping[bool, Features]
    first: Mapping[bool, Features]
    second: Mapping[bool, Features]


def paired_views(backbone: Backbone, images: ImageSet, run: Run, *, what: str = "", **options: Any) -> PairedViews:
    """Features of the centre crop and of two random views, one forward pass each.

    ``options`` go to ``feature_sets`` (blocks, poolings, norms, indices, image_size, cache). The
    draws depend on (seed, position) alone: every encoder sees the same views, and so comparisons are paired.
    """
    transforms = {
        "images": CENTRE_CROP,
        "first views": augmented_view(run.seed, 0),
        "second views": augmented_view(run.seed, 1),
    }
    return PairedViews(
        *(
            feature_sets(backbone, images, run=run, transform=how, phase=f"features of the {name}{what}", **options)
            for name, how in transforms.items()
        )
    )


def augmented_view(seed: int, number: int) -> ImageTransform:
    """Every image changed at random as ``VIEW`` says; ``number`` tells the views apart."""

    def batches(
        images: ImageSet, size: ImageSize, batch_size: int, indices: Indices
    ) -> Iterator[tuple[Tensor, Tensor]]:
        spec, start = scaled_view(size), 0
        for loaded, chosen in decoded_batches(images, indices, batch_size, lambda pixels: pixels):
            readable = {row: pixels for row, pixels in enumerate(loaded) if pixels is not None}
            if kept := list(readable):
                # random numbers belong to the position in the set asked for, whether or not others are readable
                whole = [readable.get(row, readable[kept[0]]) for row in range(len(loaded))]
                crops = crop_batch(whole, spec, draws(seed, 0, number, start, len(whole)))
                channels = crops.shape[1]
                photometric = BatchPhotometric(spec, (0.0,) * channels, (1.0,) * channels)  # normalised after rounding
                views = photometric(crops, seeded_generator(seed, number, start))
                pixels = views.clamp_(0, 1).mul_(255).round_().to(torch.uint8)
                yield pixels[kept], torch.from_numpy(chosen[kept])
            start += len(chosen)

    return ImageTransform(f"random view {number} of seed {seed}: {VIEW}", batches)


def scaled_view(size: ImageSize) -> ViewSpec:
    """The view at ``size`` pixels, its blur as wide in proportion."""
    low, high = VIEW.blur_sigma
    factor = max(1.0, max(height_width(size)) / BLUR_REFERENCE)
    return replace(VIEW, size=size, blur_sigma=(low, high * factor))
