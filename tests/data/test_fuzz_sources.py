"""Every reader of data with damaged input: a result, or one line that names the file; soon, and in bounded memory."""

from __future__ import annotations

import io
import json
import tarfile
import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mim_refiner.data.decode import ImageSet
from mim_refiner.data.masks import MaskSet
from mim_refiner.data.name_lists import without_listed
from mim_refiner.data.sources import open_source
from mim_refiner.errors import MimRefinerError

MOST_SECONDS, MOST_BYTES = 10, 300 * 2**20
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 9, 3), dtype=np.uint8)
MASK = np.arange(72, dtype=np.uint8).reshape(8, 9) % 3


def png(pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def npz(**options) -> bytes:
    buffer = io.BytesIO()
    save = np.savez_compressed if options.get("packed") else np.savez
    save(buffer, images=PIXELS, labels=np.arange(6) % 3)
    return buffer.getvalue()


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, PIXELS)
    return buffer.getvalue()


def parquet(kind="bytes") -> bytes:
    images = [png(image) for image in PIXELS]
    cells = images if kind == "bytes" else [{"bytes": image, "path": "x.png"} for image in images]
    names = {"class_names": json.dumps(["a", "b", "c"])}
    table = pa.table({"image": cells, "label": np.arange(6) % 3, "mask": [png(MASK)] * 6})
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(names), buffer, compression=None if kind == "bytes" else "snappy")
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for number, image in enumerate(PIXELS):
            for name, content in ((f"{number}.png", png(image)), (f"{number}.cls", b"%d" % (number % 3))):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


NAMES = [f"{number}.png" for number in range(6)]
KINDS = {
    "a.npz": npz(),
    "packed.npz": npz(packed=True),
    "a.npy": npy(),
    "a.parquet": parquet(),
    "hf.parquet": parquet("struct"),
    "a.tar": tar(),
    "a.txt": "".join(f"{name}\tclass {number % 3}\n" for number, name in enumerate(NAMES)).encode(),
    "a.csv": ("path,label\n" + "".join(f'"{name}",{number % 3}\n' for number, name in enumerate(NAMES))).encode(),
}


@pytest.fixture
def beside(tmp_path):
    """A folder with the images that lists name."""
    for name, image in zip(NAMES, PIXELS, strict=True):
        (tmp_path / name).write_bytes(png(image))
    return tmp_path


def use(path):
    """All that reading a source does."""
    source = open_source(path)
    images = ImageSet(source, cache=True)
    assert source.labels is None or len(source.labels) == len(source)
    for index in range(min(8, len(source))):
        images.try_load(index)
        assert "\n" not in source.name(index)
    source.fingerprint()
    if path.suffix == ".parquet":
        MaskSet(source).class_numbers()


def survives(call, *arguments):
    tracemalloc.start()
    started = time.monotonic()
    try:
        call(*arguments)
    except MimRefinerError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert len(str(error)) < 2000  # noqa: PT017
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MOST_BYTES
    assert time.monotonic() - started < MOST_SECONDS


@pytest.mark.parametrize("name", KINDS)
def test_fuzz_a_source(beside, damaged, fuzz_rounds, name):
    path = beside / name
    path.write_bytes(KINDS[name])
    use(path)
    for seed in range(fuzz_rounds):
        path.write_bytes(damaged(KINDS[name], np.random.default_rng(seed)))
        survives(use, path)


def test_fuzz_a_list_of_images_to_leave_out(beside, damaged, fuzz_rounds):
    source = open_source(beside)
    content = b"# kept by doctor\n0.png\texact duplicate\n3\n" + b"5.png\n"
    for seed in range(fuzz_rounds):
        (beside / "exclude.lst").write_bytes(damaged(content, np.random.default_rng(seed)))
        survives(without_listed, source, beside / "exclude.lst")


def test_fuzz_masks(tmp_path, damaged, fuzz_rounds):
    for folder, content in (("images", png(PIXELS[0])), ("masks", png(MASK))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.png").write_bytes(content)
    for seed in range(fuzz_rounds):
        (tmp_path / "masks" / "0.png").write_bytes(damaged(png(MASK), np.random.default_rng(seed)))
        survives(lambda: MaskSet(open_source(tmp_path / "images")).class_numbers())


@pytest.mark.parametrize(
    "spec",
    [
        "{a,b}" * 40, "{1..9}" * 12, "{0..999999}" * 3, "{" * 5000, "a," * 5000, "[" * 500, "x\0y", "y" * 5000,
        "a#" * 900,
        "{a,{b,{c", "*" * 300 + "/", "hf:" + "a" * 9000, "{9..-1}",
    ],
)  # fmt: skip
def test_hostile_names_of_sources(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    survives(open_source, spec)
