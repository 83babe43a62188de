"""Does the exported model compute what the encoder computes? Measured on real images at every export."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import as_file, files

import torch
from torch import Tensor

from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import eval_batches
from mim_refiner.data.photometric import normalize
from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError, InputError
from mim_refiner.types import BackboneInfo, side_or_pair

CHECK_IMAGES = 4
DEMO_IMAGES = "CIFAR-10 test images embedded in mim-refiner"


@dataclass(frozen=True)
class CheckImages:
    """Images for the comparison, normalised [B, C, H, W], and where they come from, in words."""

    pixels: Tensor
    source: str


@dataclass(frozen=True)
class Parity:
    """Largest difference between the exported model and the encoder, over everything compared."""

    max_abs_difference: float
    largest_value: float  # largest absolute value compared
    tolerance: float  # allowed difference, times the largest value of the tensor where that is above 1
    images: int
    source: str
    compared: str

    def sentence(self) -> str:
        """One line for a model card."""
        return (
            f"largest difference to the encoder {self.max_abs_difference:.2g} (values up to {self.largest_value:.3g}, "
            f"tolerance {self.tolerance:.0e} of the largest value) over {self.compared} of {self.images} images, "
            f"{self.source}"
        )


def check_images(info: BackboneInfo, images: ImageSet | None = None, source: str | None = None) -> CheckImages:
    """The first images of ``images`` as the encoder wants them; those embedded in the package when None.

    An encoder of other than three channels gets the colour channels in turn: real pixels, if not its own kind of data.
    """
    if images is None:
        with as_file(files("mim_refiner") / "assets" / "cifar10_test.parquet") as path:
            return check_images(info, ImageSet(open_source(f"{path}[:{CHECK_IMAGES}]"), cache=False), DEMO_IMAGES)
    size = side_or_pair(info.image_size)
    batch = next(eval_batches(images, size, CHECK_IMAGES, indices=range(min(len(images), 64))), None)
    if batch is None:
        raise DataError(f"{images.description}: none of the first images can be read; give readable ones")
    pixels = batch[0][:, torch.arange(info.in_chans) % batch[0].shape[1]]
    return CheckImages(normalize(pixels, info.mean, info.std), source or images.description)


def compare(
    pairs: Iterable[tuple[Tensor, Tensor]], tolerance: float, images: CheckImages, *, what: str, compared: str
) -> Parity:
    """Compare (expected, exported) tensors; InputError when a difference is above ``tolerance`` x max(1, largest).

    ``what`` names the exported model in the message, ``compared`` what the tensors are.
    """
    worst, largest = 0.0, 0.0
    for expected, got in pairs:
        same, scale = expected.shape == got.shape, float(expected.abs().max())
        difference = float((expected - got).abs().max()) if same else float("inf")
        allowed = tolerance * max(1.0, scale)
        if not difference <= allowed:
            found = f"differs by {difference:.2g} (allowed {allowed:.2g})"
            found = found if same else f"gives shape {list(got.shape)} instead of {list(expected.shape)}"
            raise InputError(f"export: {what} {found}: the format lacks parts of this encoder; choose another --format")
        worst, largest = max(worst, difference), max(largest, scale)
    return Parity(worst, largest, tolerance, len(images.pixels), images.source, compared)
