"""NumPy files of others: hostile sizes, objects and damage end in one line; odd but sound layouts are read."""

from __future__ import annotations

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from mim_refiner.data.channels import array_in, first_array
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 10, 9, 3), dtype=np.uint8)


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(path, compression=zipfile.ZIP_DEFLATED, **members):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content if isinstance(content, bytes) else npy(content))
    return path


def header(shape: str, descr: str = "|u1") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("order", [np.ascontiguousarray, np.asfortranarray])
@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
def test_sound_layouts(tmp_path, name, order, deep):
    images = order(IMAGES.astype(">u2") * 257 if deep else IMAGES)
    if name == "a.npz":
        np.savez_compressed(tmp_path / name, images=images, labels=np.arange(12) % 2, notes=np.array([None]))
    else:
        np.save(tmp_path / name, images)
    found = ImageSet(open_source(tmp_path / name))
    np.testing.assert_array_equal(found.load(7), IMAGES[7])


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (IMAGES / 255, "images are float64"),
        ((IMAGES / 255).astype(np.float32), "images are float32"),
        (IMAGES.astype(np.float32), "images are float32"),
        (IMAGES.astype(np.int64), "images are int64"),
        (IMAGES.view(np.int8), "images are int8"),
        (IMAGES > 9, "images are bool"),
        (np.full(IMAGES.shape, np.nan), "images are float64"),
        (IMAGES.astype(np.complex64), "images are complex64"),
        (np.array([b"x"]), r"images are \|S1"),
        (IMAGES[:0], "holds no image"),
        (IMAGES[:, :0], "holds no image"),
        (IMAGES[0, 0], r"images have shape \(9, 3\)"),
        (IMAGES[None], "images have shape"),
        (IMAGES.transpose(0, 3, 1, 2), "channels first it seems"),
        (IMAGES[..., :1].transpose(0, 3, 1, 2), "channels first it seems"),
        (np.array([IMAGES, None], dtype=object), "Python objects"),
    ],
)
def test_what_is_refused(tmp_path, images, reason):
    npz(tmp_path / "a.npz", images=images)
    with pytest.raises(DataError, match=rf"a\.npz: .*{reason}"):
        open_source(tmp_path / "a.npz")


def test_four_channels_name_the_way_out(tmp_path):
    npz(tmp_path / "a.npz", images=np.concatenate([IMAGES, IMAGES[..., :1]], axis=3))
    with pytest.raises(DataError, match=r"has 4 channels and the encoder takes 3 .*save RGB images"):
        ImageSet(open_source(tmp_path / "a.npz"))


@pytest.mark.parametrize(
    "shape",
    [
        "(17000000000000,)",
        "(10, 4000000, 4000000, 3)",
        "(-1, -2520)",
        "(2**70,)",
        "(99999999999999999999999,)",
        "(1.5,)",
    ],
)
@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
def test_sizes_that_lie_are_never_asked_for(tmp_path, name, shape):
    content = header(shape) + bytes(2520)
    npz(tmp_path / name, images=content) if name == "a.npz" else (tmp_path / name).write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError, match=f"{name}: "):
        ImageSet(open_source(tmp_path / name))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_a_bomb_and_a_central_directory_that_lies(tmp_path):
    path = npz(tmp_path / "a.npz", images=header("(4000000000,)"))
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\x01\x02")
    data[place + 24 : place + 28] = (4_000_000_128).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(DataError, match="claims 4000000128 bytes"):
        first_array(path, ["images"])


def test_odd_archives(tmp_path):
    path = npz(tmp_path / "a.npz", images=IMAGES)
    whole = path.read_bytes()
    encrypted = bytearray(whole)
    encrypted[whole.index(b"PK\x01\x02") + 8] |= 1
    encrypted[6] |= 1
    others = (b"PK\x05\x06" + bytes(18), b"", b"PK", b"\x93NUMPY", b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    for content in (encrypted, whole[:-30], whole[: len(whole) // 2], *others):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.npz: "):
            open_source(path)
    npz(path, zipfile.ZIP_LZMA, images=IMAGES)
    with pytest.raises(DataError, match="claims"):
        open_source(path)


def test_bytes_of_one_array_that_lie():
    for content in (
        header("(10**9,)"),
        header("(3, 3)", "|O"),
        header("(3,)", "<U9999999999"),
        b"\x93NUMPY\x09\x00",
    ):
        with pytest.raises((ValueError, EOFError, SyntaxError, TypeError)):
            array_in(content)
    assert array_in(b"") is None
