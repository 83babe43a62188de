"""The CPU part of the data path: time per image by stage beside a Pillow pipeline, and memory of each source's index.

python benchmarks/data_path.py [--part crops|photos|index|memory|all] [--entries N] [--repeat N] [--json FILE]
CPU seconds of this process (not wall-clock time), one thread, best of five rounds.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import resource
import tarfile
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from mim_refiner.data.decode import ImageSet
from mim_refiner.data.image_files import decode_image
from mim_refiner.data.loaders import TrainLoader
from mim_refiner.data.source_files import FileSource, folder_source
from mim_refiner.data.source_list import list_source
from mim_refiner.data.sources import open_source
from mim_refiner.data.views import crop_batch, crop_boxes, draws, multi_crop_views


def photograph(width: int, height: int, seed: int = 0) -> bytes:
    """A JPEG with smooth shapes and noise, about as large as a photograph of this size."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
    pixels = (smooth + generator.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def cpu_ms(work: Callable[[], Any], repeat: int) -> float:
    """Milliseconds of CPU a call: the best of five rounds."""
    work()
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        for _ in range(repeat):
            work()
        best = min(best, (time.process_time() - start) / repeat)
    return round(best * 1e3, 3)


def crops(repeat: int, width: int = 500, height: int = 375) -> dict[str, Any]:
    """12 views (2 x 224 + 10 x 96 px) of one JPEG: ours up to the uint8 tensors, and Pillow with the same boxes."""
    data = photograph(width, height)
    views = [spec for spec in multi_crop_views(224, 96, 10) for _ in range(spec.count)]
    pixels = decode_image(data)[0]
    position = iter(range(10**9))

    def ours(images: list[Any]) -> None:
        start = next(position)
        for number, spec in enumerate(views):
            crop_batch(images, spec, draws(0, 0, number, start, len(images)))

    sides = np.array([height]), np.array([width])

    def pillow_crops(image: Image.Image) -> None:
        start = next(position)
        for number, spec in enumerate(views):
            boxes, flips, _ = crop_boxes(draws(0, 0, number, start, 1), *sides, spec)
            top, left, rows, columns = boxes[0].tolist()
            crop = image.crop((left, top, left + columns, top + rows))
            crop = crop.resize((spec.size, spec.size), Image.Resampling.BICUBIC)
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flips[0] else crop
            torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()

    def pillow() -> None:
        with Image.open(io.BytesIO(data)) as image:
            pillow_crops(image.convert("RGB"))

    whole = Image.fromarray(pixels)
    batch, rounds = 16, max(1, repeat // 8)

    def of_a_batch(work: Callable[[], Any]) -> float:
        return round(cpu_ms(work, rounds) / batch, 3)

    return {
        "image": f"{width}x{height} JPEG, {len(data)} bytes; milliseconds of CPU an image",
        "decode": cpu_ms(lambda: decode_image(data)[0], repeat),
        "crops, batch of 16": of_a_batch(lambda: ours([pixels] * batch)),
        "decode and crops, batch of 16": of_a_batch(lambda: ours([decode_image(data)[0] for _ in range(batch)])),
        "decode and crops, one image": cpu_ms(lambda: ours([decode_image(data)[0]]), repeat),
        "Pillow crops": cpu_ms(lambda: pillow_crops(whole), repeat),
        "Pillow decode and crops": cpu_ms(pillow, repeat),
    }


def photos() -> dict[str, Any]:
    """The same views of larger JPEGs as the training loader makes them, at full scale and reduced."""
    found: dict[str, Any] = {"image": "milliseconds of CPU an image"}
    for width, height in ((500, 375), (1000, 750), (1600, 1200), (4000, 3000)):
        with tempfile.TemporaryDirectory() as name:
            for number in range(8):
                (Path(name) / f"{number}.jpg").write_bytes(photograph(width, height, number))
            images = ImageSet(open_source(name), cache=False)
            for reduced in (False, True):
                loader = TrainLoader(images, multi_crop_views(224, 96, 10), 8, seed=0, reduced_decode=reduced)
                key = f"{width}x{height}, {'reduced' if reduced else 'full scale'}"
                found[key] = round(cpu_ms(lambda loader=loader: list(loader.epoch(0)), 1) / 8, 2)
    return found


def index(entries: int) -> dict[str, Any]:
    """Bytes of memory an image for the index of each source (labels included), measured by tracemalloc."""
    found: dict[str, Any] = {"entries": entries}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def measured(make: Callable[[], Any]) -> float:
            gc.collect()
            tracemalloc.start()
            source = make()
            gc.collect()
            held = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
            assert len(source) == entries
            return round(held / entries, 1)

        names = (f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(entries))
        found["folder_with_classes"] = measured(lambda: folder_source(folder, names))
        flat = (f"{i:09d}.jpg" for i in range(entries))
        found["folder_flat"] = measured(lambda: FileSource(folder, flat))
        found["as_python_strings"] = measured(
            lambda: [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(entries)]
        )
        with (folder / "list.csv").open("w") as file:
            file.writelines(f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG,{i % 1000}\n" for i in range(entries))
        found["list_with_labels"] = measured(lambda: list_source(folder / "list.csv"))
        table = pa.table({"image": [b""] * entries, "label": np.arange(entries) % 1000})
        pq.write_table(table, folder / "t.parquet", row_group_size=10_000)
        found["parquet_with_labels"] = measured(lambda: open_source(folder / "t.parquet"))
        write_tar(folder / "t.tar", entries)
        start = time.process_time()
        open_source(folder / "t.tar")
        found["tar_scan_us_an_image"] = round((time.process_time() - start) / entries * 1e6, 1)
        start = time.process_time()
        found["tar_with_labels"] = measured(lambda: open_source(folder / "t.tar"))
        found["tar_again_from_cache_us_an_image"] = round((time.process_time() - start) / entries * 1e6, 1)
    return found


def write_tar(path: Path, entries: int) -> None:
    """A shard of tiny members, with its headers written from one template."""
    header = tarfile.TarInfo("000000000.jpg")
    header.size = 1
    with path.open("wb") as file:
        for i in range(entries):
            header.name = f"{i:09d}.jpg"
            file.write(header.tobuf(tarfile.USTAR_FORMAT) + b"x" + bytes(511))
            header.name = f"{i:09d}.cls"
            file.write(header.tobuf(tarfile.USTAR_FORMAT) + str(i % 10).encode() + bytes(511))
        file.write(bytes(1024))


def memory(images: int) -> dict[str, Any]:
    """Peak memory of the process after a tenth of the images and after all of them, read one by one from a shard."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "t.tar"
        content = photograph(64, 48)
        with tarfile.open(path, "w") as archive:
            for i in range(1000):
                member = tarfile.TarInfo(f"{i:04d}.jpg")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        source = ImageSet(open_source(path), cache=False)
        peaks = []
        for number in range(images):
            source.load(number % len(source))
            if number + 1 in (images // 10, images):
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return {"images": images, "peak_mb_after_a_tenth": round(peaks[0], 1), "peak_mb_after_all": round(peaks[1], 1)}


def main() -> None:
    """Run the parts and print a table and, with --json, a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("crops", "photos", "index", "memory", "all"), default="all")
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--repeat", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = {
        "crops": lambda: crops(options.repeat), "photos": photos, "index": lambda: index(options.entries),
        "memory": lambda: memory(options.images),
    }  # fmt: skip
    results = {name: make() for name, make in parts.items() if options.part in (name, "all")}
    for part, values in results.items():
        print(f"{part}:")
        for key, value in values.items():
            print(f"  {key:34} {value}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
