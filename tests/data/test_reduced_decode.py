"""Large JPEGs decoded at 1/2, 1/4, 1/8 for training: the same crops as at full scale, up to what libjpeg leaves out."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import ExifTags, Image

from mim_refiner.data.decode import ImageSet
from mim_refiner.data.image_files import decode_image
from mim_refiner.data.loaders import TrainLoader
from mim_refiner.data.sources import open_source
from mim_refiner.data.views import crop_boxes, draws, multi_crop_views, scale_reduction

VIEWS = multi_crop_views(64, 32, 4)
EACH = [spec for spec in VIEWS for _ in range(spec.count)]


def photograph(
    width: int, height: int, seed: int = 0, mode: str = "RGB", rotation: int = 1, kind: str = "JPEG", **save: object
) -> bytes:
    """Smooth shapes, edges and a little noise."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
    smooth[height // 3 : height // 2, width // 4 : width // 2] = (200, 60, 30)
    pixels = (smooth + generator.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = rotation
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **{"quality": 92, "exif": exif, **save})
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    def write(*files: bytes) -> ImageSet:
        for number, content in enumerate(files):
            (tmp_path / f"{number}.jpg").write_bytes(content)
        return ImageSet(open_source(tmp_path), cache=False)

    return write


def psnr(one, other) -> float:
    error = ((one.double() - other.double()) ** 2).mean().item()
    return 10 * np.log10(255**2 / error) if error else np.inf


def test_the_reduction_is_the_largest_that_enlarges_no_view() -> None:
    seen = set()
    for position in range(300):
        height, width = 100 + 8 * position, 120 + 9 * position
        drawn = [draws(1, 2, view, position, 1) for view in range(len(EACH))]
        found = scale_reduction(EACH, drawn, height, width)
        room = min(
            int(crop_boxes(uniforms, np.array([height]), np.array([width]), spec)[0][0, 2:].min()) / (spec.size + 1)
            for uniforms, spec in zip(drawn, EACH, strict=True)
        )
        assert found in (1, 2, 4, 8)
        assert found <= max(1, room)
        assert found == 8 or 2 * found > room
        seen.add(found)
    assert seen == {1, 2, 4, 8}
    assert scale_reduction(EACH, drawn, 20, 30) == 1


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("rotation", [1, 6])
def test_views_are_those_of_the_whole_image(folder, mode, rotation):
    images = folder(*(photograph(1203, 901, seed, mode, rotation) for seed in range(3)))
    sizes = []
    original = images.load_resolved
    images.load_resolved = lambda *a: sizes.append(original(*a)) or original(*a)
    (reduced,) = TrainLoader(images, VIEWS, 3, seed=0, reduced_decode=True).epoch(0)
    (whole,) = TrainLoader(images, VIEWS, 3, seed=0).epoch(0)
    assert any(loaded.pixels.shape[0] < loaded.shape[0] for loaded in sizes[:3])
    assert {loaded.shape for loaded in sizes} == {(901, 1203) if rotation == 1 else (1203, 901)}
    assert reduced.sample_ids.tolist() == whole.sample_ids.tolist()
    for ours, theirs in zip(reduced.views, whole.views, strict=True):
        assert psnr(ours, theirs) > 30
        assert (ours.double() - theirs.double()).mean().abs() < 0.5


def test_phone_photos_with_a_second_picture_inside_are_reduced_too(folder):
    preview = [Image.new("RGB", (160, 120))]
    images = folder(photograph(1203, 901, 0, rotation=6, kind="MPO", save_all=True, append_images=preview))
    assert images.load_resolved(0, lambda height, width: 4).pixels.shape == (301, 226, 3)
    (reduced,) = TrainLoader(images, VIEWS, 1, seed=0, reduced_decode=True).epoch(0)
    (whole,) = TrainLoader(images, VIEWS, 1, seed=0).epoch(0)
    assert all(psnr(ours, theirs) > 30 for ours, theirs in zip(reduced.views, whole.views, strict=True))


@pytest.mark.parametrize("size", [(90, 70), (1203, 500)])
def test_an_image_that_cannot_be_turned_upright_is_cropped_as_it_lies(folder, size):
    # Orientation 6 is read, but the resolution is text where a number belongs: Pillow cannot write the metadata anew.
    tags = struct.pack("<HHIHHHHI4s", 0x0112, 3, 1, 6, 0, 0x011A, 2, 4, b"abc")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    images = folder(photograph(*size, exif=exif))
    found = images.load_resolved(0, lambda height, width: 1)
    assert found.shape == found.pixels.shape[:2] == size[::-1]
    (reduced,) = TrainLoader(images, VIEWS, 1, seed=0, reduced_decode=True).epoch(0)
    (whole,) = TrainLoader(images, VIEWS, 1, seed=0).epoch(0)
    assert all(psnr(ours, theirs) > 30 for ours, theirs in zip(reduced.views, whole.views, strict=True))


def test_images_without_room_are_the_same_bytes(folder):
    images = folder(*(photograph(90, 70, seed) for seed in range(4)))
    (reduced,) = TrainLoader(images, VIEWS, 4, seed=0, reduced_decode=True).epoch(0)
    (whole,) = TrainLoader(images, VIEWS, 4, seed=0).epoch(0)
    assert all(ours.equal(theirs) for ours, theirs in zip(reduced.views, whole.views, strict=True))


def test_batches_do_not_depend_on_workers_or_where_the_epoch_was_entered(folder):
    images = folder(*(photograph(800 + 100 * seed, 640, seed) for seed in range(6)))
    first, second = TrainLoader(images, VIEWS, 3, seed=0, reduced_decode=True).epoch(1)
    assert first.views[0].shape == second.views[0].shape
    loader = TrainLoader(images, VIEWS, 3, seed=0, workers=1, reduced_decode=True)
    (entered,) = loader.epoch(1, 1)
    loader.close()
    assert all(ours.equal(theirs) for ours, theirs in zip(second.views, entered.views, strict=True))


def test_damaged_images_are_counted_and_replaced_with_the_next_one_s_own_crop(folder):
    whole = [photograph(900, 700, 0)] * 11
    files = [photograph(1400, 1000, 1)[:20_000], *whole]
    images = folder(*files)
    (batch,) = TrainLoader(images, VIEWS, 12, seed=0, reduced_decode=True).epoch(0)
    (reference,) = TrainLoader(folder(*files), VIEWS, 12, seed=0).epoch(0)
    assert [name for name, _ in batch.skipped] == [name for name, _ in reference.skipped] != []
    assert batch.sample_ids.tolist() == reference.sample_ids.tolist()
    for ours, theirs in zip(batch.views, reference.views, strict=True):
        assert psnr(ours, theirs) > 30


def test_evaluation_and_the_cache_decode_at_full_scale(folder):
    content = photograph(900, 700)
    images = folder(content)
    assert images.load(0).shape == (700, 900, 3)
    np.testing.assert_array_equal(images.load(0), decode_image(content)[0])
    images.scan()
    loaded = images.load_resolved(0, lambda height, width: 8)
    assert loaded.pixels.shape == (700, 900, 3)
    assert loaded.shape == (700, 900)
