"""A thousand damaged images, in a folder and in a shard: no crash, every one counted, memory flat."""

from __future__ import annotations

import io
import resource
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError

KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "npy")
ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm"}


@pytest.fixture(scope="module")
def whole() -> dict[str, bytes]:
    """One small image in every format."""
    coarse = np.random.default_rng(1).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((24, 20), Image.Resampling.BILINEAR)
    made = {}
    for kind in KINDS:
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(image)) if kind == "npy" else image.save(buffer, kind)
        made[kind] = buffer.getvalue()
    return made


def damaged(content: bytes, generator: np.random.Generator, way: int) -> bytes:
    """Cut off, with bytes changed, with a part missing, doubled, or no image at all."""
    if way == 0:
        return content[: int(generator.integers(0, len(content)))]
    if way == 1:
        changed = bytearray(content)
        for position in generator.integers(0, len(content), 8):
            changed[position] = int(generator.integers(0, 256))
        return bytes(changed)
    if way == 2:
        start, stop = sorted(generator.integers(0, len(content), 2).tolist())
        return content[:start] + content[stop:]
    if way == 3:
        return content[:30] + generator.bytes(200)
    return generator.bytes(int(generator.integers(0, 300)))


def fuzzed(whole: dict[str, bytes], count: int) -> list[tuple[str, bytes]]:
    generator = np.random.default_rng(0)
    made = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        content = damaged(whole[kind], generator, number // len(KINDS) % 5)
        made.append((f"{number:04d}.{ENDINGS.get(kind, 'npy')}", content))
    return made


def check(images: ImageSet, count: int, good: list[int]) -> int:
    """Look at every image; returns how many are unreadable."""
    readable = 0
    for index in range(len(images)):
        pixels = images.try_load(index)
        if pixels is not None:
            readable += 1
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3
    assert len(images) == count
    assert readable + len(images.unreadable) == count
    assert not set(good) & {index for index, *_ in images.unreadable}
    assert all(name and reason and "\n" not in reason for _, name, reason in images.unreadable)
    return len(images.unreadable)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_a_thousand_files(tmp_path: Path, whole: dict[str, bytes]) -> None:
    for name, content in fuzzed(whole, 1000):
        (tmp_path / name).write_bytes(content)
    for kind in KINDS:
        (tmp_path / f"good.{ENDINGS.get(kind, 'npy')}").write_bytes(whole[kind])
    images = ImageSet(open_source(tmp_path), cache=False)
    assert check(images, 1008, list(range(1000, 1008))) > 700
    with pytest.raises(DataError, match=r"of 1008 images cannot be read, more than 10 %"):
        images.raise_if_too_many_unreadable()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_a_damaged_shard(tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIM_REFINER_CACHE", str(tmp_path / "cache"))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in [*fuzzed(whole, 200), *((f"g{i}.png", whole["PNG"]) for i in range(20))]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    sound = buffer.getvalue()
    (tmp_path / "sound.tar").write_bytes(sound)
    check(ImageSet(open_source(tmp_path / "sound.tar"), cache=False), 220, list(range(200, 220)))
    generator = np.random.default_rng(5)
    for number in range(25):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(damaged(sound, generator, number % 4))
        refusal = ""
        try:
            images = ImageSet(open_source(path), cache=False)
        except DataError as error:
            refusal = str(error)
        assert "\n" not in refusal
        if refusal:
            assert path.name in refusal
        else:
            check(images, len(images), [])


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_that_claim_too_much(tmp_path: Path, whole: dict[str, bytes]) -> None:
    for number, (width, height) in enumerate([(13_000, 13_000), (2**31 - 1, 2**31 - 1), (10**6, 100)]):
        (tmp_path / f"{number}.png").write_bytes(png_claiming(width, height))
    lying = whole["npy"].replace(b"(20, 24, 3)", b"(2000000000, 24, 3)".ljust(11))
    (tmp_path / "lying.npy").write_bytes(lying)
    for number in range(60):
        (tmp_path / f"z{number}.png").write_bytes(whole["PNG"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images = ImageSet(open_source(tmp_path))
    assert len(images.unreadable) == 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_memory_is_flat(tmp_path: Path, whole: dict[str, bytes]) -> None:
    for number in range(50):
        (tmp_path / f"{number}.jpg").write_bytes(whole["JPEG"] if number % 20 else whole["JPEG"][:100])
    images = ImageSet(open_source(tmp_path), cache=False)
    for number in range(500):
        images.load(number % 50)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(4000):
        images.load(number % 50)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8_000  # kilobytes


def test_large_views_are_those_of_pillow_to_one_level(whole: dict[str, bytes]) -> None:
    from mim_refiner.data.channels import resize, resize_view

    image = np.asarray(Image.open(io.BytesIO(whole["PNG"])).resize((300, 200)))
    for side in (64, 96, 224):
        for crop in (image, image[20:150, 30:160], image[5:65, 7:90]):
            difference = np.abs(resize_view(crop, side, side).astype(int) - resize(crop, side, side))
            assert difference.max() <= 2
            assert (difference > 1).mean() < 1e-3
    np.testing.assert_array_equal(resize_view(image, 32, 32), resize(image, 32, 32))
