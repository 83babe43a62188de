"""Crops made on the device: the boxes and flips of the CPU, and its pixels but for rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import TrainLoader
from mim_refiner.data.resident import ResidentImages, held_on_device, resampling
from mim_refiner.data.sources import open_source
from mim_refiner.data.views import ViewSpec, crop_batch, draws
from mim_refiner.errors import InputError

CPU = torch.device("cpu")
SPECS = {
    "as small images are cut": ((32, 32), ViewSpec("v", 32, scale=(0.2, 1.0), vflip=0.5)),
    "local": ((32, 32), ViewSpec("v", 16, scale=(0.05, 0.5))),
    "enlarged": ((24, 40), ViewSpec("v", 48, scale=(0.3, 1.0))),
    "much reduced": ((150, 200), ViewSpec("v", 32)),
    "by torch's kernel": ((120, 160), ViewSpec("v", 96)),
    "oblong": ((40, 160), ViewSpec("v", (16, 64), flip=0.3)),
    "one axis": ((64, 200), ViewSpec("v", (32, 64), crop_axes="longer", scale=(0.3, 0.6))),
    "not resized": ((16, 16), ViewSpec("v", 16, scale=(1, 1), ratio=(1, 1))),
}


def pictures(count: int, height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    """Smooth shapes with hard edges and some noise, as photographs have them."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width] / 16
    phases = rng.uniform(0, 6, (count, channels, 3))
    smooth = np.stack([[np.sin(x * a + b) + np.cos(y * b + c) for a, b, c in image] for image in phases])
    noisy = 127 + 50 * smooth + 40 * (smooth > 0.5) + rng.normal(0, 8, smooth.shape)
    return noisy.clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def image_set(folder: Path, pixels: NDArray[np.uint8]) -> ImageSet:
    np.save(folder / "images.npy", pixels)
    return ImageSet(open_source(str(folder / "images.npy")), cache=True, channels=pixels.shape[3])


@pytest.mark.parametrize("name", SPECS)
def test_the_pixels_are_those_of_the_cpu(name: str, tmp_path: Path) -> None:
    (height, width), spec = SPECS[name]
    pixels = pictures(24, height, width)
    rows = np.arange(24)[::-1].copy()
    uniforms = draws(3, 2, 0, 7, 24)
    [got] = ResidentImages(image_set(tmp_path, pixels), CPU).views(rows, [spec], [uniforms])
    expected = crop_batch(list(pixels[rows]), spec, uniforms).numpy()
    assert got.dtype == torch.uint8
    assert got.shape == expected.shape
    difference = np.abs(got.numpy().astype(int) - expected)
    assert (difference <= 1).mean() >= 0.999
    assert difference.max() <= 3
    if name == "not resized":
        assert difference.max() == 0


@pytest.mark.parametrize("together", [True, False])
def test_images_of_many_sizes_are_padded_and_cut_as_on_the_cpu(
    together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [(40, 56), (64, 33), (90, 90), (33, 34), (64, 96), (48, 48)] * 4
    pixels = [np.roll(pictures(1, height, width)[0], row, axis=1) for row, (height, width) in enumerate(sizes)]
    for row, each in enumerate(pixels):
        Image.fromarray(each).save(tmp_path / f"{row:02}.png")
    (tmp_path / "03.png").write_bytes(b"damaged")
    images = ImageSet(open_source(str(tmp_path)), cache=True)
    resident = ResidentImages(images, CPU)
    assert resident.pixels.shape == (24, 3, 90, 96)
    if not together:
        monkeypatch.setattr("mim_refiner.data.resident._NUMBERS", 5 * 3 * 90 * 96)
    rows = np.array([row for row in range(24)[::-1] if row != 3])
    specs = [ViewSpec("global", 32, scale=(0.3, 1.0), vflip=0.5), ViewSpec("local", 16, scale=(0.05, 0.3))]
    drawn = [draws(3, 2, view, 7, 23) for view in range(2)]
    for got, spec, uniforms in zip(resident.views(rows, specs, drawn), specs, drawn, strict=True):
        expected = crop_batch([pixels[row] for row in rows], spec, uniforms).numpy()
        assert (np.abs(got.numpy().astype(int) - expected) <= 1).mean() >= 0.999
    with_damage = TrainLoader(images, specs, 24, 0, resident=resident), TrainLoader(images, specs, 24, 0)
    ours, theirs = (next(iter(loader.epoch(0))) for loader in with_damage)
    assert torch.equal(ours.sample_ids, theirs.sample_ids)
    assert ((ours.views[1].int() - theirs.views[1].int()).abs() <= 1).float().mean() >= 0.999


def test_weights_against_a_loop() -> None:
    start, length, mirrored = torch.tensor([3.0, 0.0]), torch.tensor([7.0, 12.0]), torch.tensor([0.0, 1.0])
    got = resampling(start, length, 12, 5, mirrored)
    for row in range(2):
        scale = float(length[row]) / 5
        for out in range(5):
            place = 4 - out if mirrored[row] else out
            weights = []
            for source in range(12):
                inside = source - float(start[row])
                x = abs((inside + 0.5 - (place + 0.5) * scale) / max(scale, 1.0))
                cubic = 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0
                weights.append(cubic if 0 <= inside < float(length[row]) else 0.0)
            torch.testing.assert_close(got[row, out], torch.tensor(weights) / sum(weights), rtol=1e-5, atol=1e-6)


def test_a_loader_gives_the_same_samples_and_boxes(tmp_path: Path) -> None:
    images = image_set(tmp_path, pictures(20, 32, 32))
    views = [ViewSpec("global", 32, count=2), ViewSpec("local", 16, count=3, scale=(0.1, 0.4))]
    usual = TrainLoader(images, views, 8, 0)
    resident = TrainLoader(images, views, 8, 0, 3, resident=ResidentImages(images, CPU))
    for one, other in zip(usual.epoch(1, 1), resident.epoch(1, 1), strict=True):
        assert torch.equal(one.sample_ids, other.sample_ids)
        for ours, theirs in zip(one.views, other.views, strict=True):
            assert ((ours.int() - theirs.int()).abs() <= 1).float().mean() >= 0.999


def test_only_what_fits_stays_on_the_device(tmp_path: Path) -> None:
    images = image_set(tmp_path, pictures(4, 8, 8))
    size = 4 * 8 * 8 * 3
    gpu = torch.device("meta")  # stands for a device that is not the CPU
    assert held_on_device("auto", images, gpu, 4 * size) is not None
    assert held_on_device("auto", images, gpu, 4 * size - 1) is None
    assert held_on_device("auto", images, CPU, 1e12) is None
    assert held_on_device("off", images, gpu, 1e12) is None
    assert held_on_device("on", images, CPU, 0) is not None
    rows = [np.zeros((side, 8, 3), dtype=np.uint8) for side in (8, 4)]
    (tmp_path / "mixed").mkdir()
    for number, each in enumerate(rows):
        Image.fromarray(each).save(tmp_path / "mixed" / f"{number}.png")
    mixed = ImageSet(open_source(str(tmp_path / "mixed")), cache=True)
    assert held_on_device("auto", mixed, gpu, 4 * 2 * 8 * 8 * 3) is not None
    assert held_on_device("auto", mixed, gpu, 4 * 2 * 8 * 8 * 3 - 1) is None
    lazy = ImageSet(open_source(str(tmp_path / "mixed")), cache=False)
    assert held_on_device("auto", lazy, gpu, 1e12) is None
    many = image_set(tmp_path, pictures(4, 8, 8, channels=5).astype(np.uint16) * 257)
    assert held_on_device("auto", many, gpu, 1e12) is None
    with pytest.raises(InputError, match="images_on_device=on: needs 8-bit images"):
        held_on_device("on", many, CPU, 1e12)
