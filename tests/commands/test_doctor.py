"""Planted faults of twelve kinds in real images: all of them are found, and nothing in the clean set."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance

from mim_refiner.cli.app import main
from mim_refiner.commands.doctor import doctor
from mim_refiner.data.sources import open_source

PLANTED = (
    "unreadable", "truncated", "tiny", "huge", "constant", "animated", "CMYK", "16-bit", "transparent",
    "exact duplicate", "near duplicate", "leak from test",
)  # fmt: skip
# True near duplicates in the CIFAR-10 test set, each pair looked at: (row, the earlier row).
CIFAR10_PAIRS = {
    (4259, 3045), (4766, 3723), (4881, 3813), (5164, 1712), (5976, 2801), (6086, 3033), (8447, 7809), (8822, 5075),
    (9633, 5224),
}  # fmt: skip


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def shown(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def nearly(data: bytes, rng: np.random.Generator) -> bytes:
    """The image re-encoded, brightened, resized or with a little noise."""
    image, how = shown(data), int(rng.integers(4))
    if how == 0:
        return encoded(image, "JPEG", quality=int(rng.integers(70, 95)))
    if how == 1:
        return encoded(ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.85, 1.1))))
    if how == 2:
        return encoded(image.resize((48, 48), Image.Resampling.BICUBIC))
    pixels = np.asarray(image) + rng.normal(0, 4, (*image.size[::-1], 3))
    return encoded(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))


def faulty(kind: str, data: bytes, rng: np.random.Generator, huge: bytes) -> bytes:
    """The image with a fault of its own (duplicates and leaks are made from another image)."""
    image = shown(data)
    if kind == "unreadable":
        return rng.bytes(400) if rng.random() < 0.5 else b"<html>404 not found</html>"
    if kind == "truncated":
        whole = encoded(image, str(rng.choice(["PNG", "JPEG", "WEBP"])))
        return whole[: int(len(whole) * rng.uniform(0.3, 0.8))]
    if kind == "tiny":
        width, height = (int(side) for side in rng.integers(1, 7, 2))
        return encoded(image.resize((width, height)))
    if kind == "constant":
        return encoded(Image.new("RGB", image.size, tuple(int(value) for value in rng.integers(0, 256, 3))))
    if kind == "animated":
        frames = [ImageEnhance.Brightness(image).enhance(0.5 + 0.2 * step) for step in range(3)]
        return encoded(image, str(rng.choice(["GIF", "WEBP"])), save_all=True, append_images=frames)
    if kind == "CMYK":
        return encoded(image.convert("CMYK"), "JPEG", quality=95)
    if kind == "16-bit":
        return encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257))
    if kind == "transparent":
        image.putalpha(int(rng.integers(60, 250)))
        return encoded(image)
    assert kind == "huge"
    return huge


def plant(images: Sequence[bytes], test: Sequence[bytes], count: int) -> tuple[list[bytes], dict[int, str]]:
    """Replace ``count`` images by faulty ones; returns images and {index: kind}."""
    rng = np.random.default_rng(0)
    free = rng.permutation(range(1, len(images)))
    places = {int(index): PLANTED[number % len(PLANTED)] for number, index in enumerate(free[:count])}
    sound = sorted(set(range(len(images))) - places.keys())
    huge = encoded(Image.new("1", (7200, 7200)))
    planted = list(images)
    for index, kind in places.items():
        if kind == "leak from test":
            other = test[int(rng.integers(len(test)))]
            planted[index] = other if rng.random() < 0.5 else nearly(other, rng)
        elif kind.endswith("duplicate"):
            earlier = [row for row in sound if row < index]
            original = images[earlier[int(rng.integers(len(earlier)))]] if earlier else images[0]
            planted[index] = encoded(shown(original)) if kind == "exact duplicate" else nearly(original, rng)
        else:
            planted[index] = faulty(kind, images[index], rng, huge)
    return planted, places


def write(path: Path, images: Sequence[bytes], labels: Sequence[int], names: Sequence[str] = ()) -> Path:
    table = pa.table({"image": pa.array(images, pa.binary()), "label": pa.array(labels, pa.int64())})
    pq.write_table(table.replace_schema_metadata({"class_names": json.dumps(names)} if names else None), path)
    return path


def read(path: object, rows: slice) -> tuple[list[bytes], list[int]]:
    source = open_source(str(path))
    indices = range(len(source))[rows]
    assert source.labels is not None
    return [bytes(source.read(index)) for index in indices], [int(source.labels[index]) for index in indices]


@pytest.fixture(scope="module")
def embedded() -> tuple[list[bytes], list[int], list[bytes], list[int]]:
    """Real CIFAR-10 images that travel with the package."""
    asset = files("mim_refiner") / "assets" / "cifar10_test.parquet"
    return *read(asset, slice(0, 400)), *read(asset, slice(400, 500))


def test_nothing_is_found_in_clean_images(embedded, tmp_path):
    images, labels, test, test_labels = embedded
    before = write(tmp_path / "data.parquet", images, labels).read_bytes()
    held_out = write(tmp_path / "test.parquet", test, test_labels)
    result = doctor(data=str(tmp_path / "data.parquet"), test=str(held_out))
    assert result["findings"] == []
    assert result["to_exclude"] == 0
    assert result["classes"]["classes"] == 10
    assert result["pixels"]["median_size"] == "32x32"
    assert (tmp_path / "data.parquet").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.parquet", "test.parquet"]


def test_sixty_planted_faults_are_found(embedded, tmp_path):
    images, labels, test, test_labels = embedded
    planted, places = plant(images, test, 60)
    data = write(tmp_path / "data.parquet", planted, labels)
    held_out = write(tmp_path / "test.parquet", test, test_labels)
    found: dict[int, set[str]] = {}
    for finding in doctor(data=str(data), test=str(held_out))["findings"]:
        found.setdefault(finding["index"], set()).add(finding["kind"])
    missed = {index: (kind, found.get(index)) for index, kind in places.items() if kind not in found.get(index, ())}
    assert missed == {}
    assert found.keys() == places.keys()


@pytest.mark.slow
def test_nothing_but_true_pairs_is_found_in_the_cifar10_test_set(shared_dir, tmp_path):
    """The first 9,000 images are the data, the last 1,000 the test set that must not leak."""
    path = shared_dir / "data" / "cifar10_test.parquet"
    images, labels = read(path, slice(0, 9000))
    held_out = write(tmp_path / "test.parquet", *read(path, slice(9000, 10000)))
    clean = doctor(data=str(write(tmp_path / "clean.parquet", images, labels)), test=str(held_out))
    # one pair of the list has its later image in the test part, where it is a true leak of row 5224
    assert {(finding["index"], finding["kind"]) for finding in clean["findings"]} == {
        *((row, "near duplicate") for row, _ in CIFAR10_PAIRS if row < 9000),
        (5224, "leak from test"),
    }


def test_through_the_command_line_to_a_list_that_refine_takes(embedded, tmp_path, capsys):
    from mim_refiner.commands.inputs import open_images
    from mim_refiner.reporting import Reporter

    images, labels, test, _ = embedded
    planted, places = plant(images[:120], test, 24)
    data = write(tmp_path / "data.parquet", planted, labels[:120])
    out, model = tmp_path / "checked", files("mim_refiner") / "assets" / "mae"
    arguments = ["doctor", "--data", str(data), "--model", str(model), "--out", str(out), "--device", "cpu"]
    assert main([*arguments, "--quiet"]) == 0
    text = capsys.readouterr().out
    for words in ("exact duplicate", "truncated", "what it means", "coverage: 100.0 %", "refine --exclude", "ratio"):
        assert words in text, words
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "doctor.json").read_text())
    assert result["model"]["estimated_hours"] >= 0
    assert result["model"]["training_memory_gb"] > 0
    kept = open_images(str(data), Reporter(), exclude=str(out / "exclude.txt"))
    assert len(kept) == 120 - result["to_exclude"]
    assert kept.unreadable == []
    assert 0 < result["to_exclude"] <= len(places)


def test_unbalanced_classes_are_noted(embedded, tmp_path):
    images, *_ = embedded
    data = write(tmp_path / "data.parquet", images[:40], [0] * 38 + [2] * 2, ["a", "b", "c"])
    notes = " ".join(doctor(data=str(data))["classes"]["notes"])
    for words in ("unbalanced", "without an image: 1 class name", "fewer than 5 images"):
        assert words in notes


def test_classes_of_one_size_have_no_smallest(embedded, tmp_path):
    images, *_ = embedded
    classes = doctor(data=str(write(tmp_path / "even.parquet", images[:8], [0, 1] * 4, ["a", "b"])))["classes"]
    assert (classes["images_of_each"], classes["ratio"]) == (4, 1.0)
    assert not {"smallest", "largest"} & classes.keys()
    classes = doctor(data=str(write(tmp_path / "odd.parquet", images[:8], [0] * 3 + [1] * 5, ["a", "b"])))["classes"]
    assert (classes["smallest"], classes["largest"]) == ("a (3)", "b (5)")


def test_bad_input_is_one_line(tmp_path, capsys):
    assert main(["doctor", "--data", str(tmp_path / "none"), "--quiet"]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_a_one_coloured_image_is_no_near_duplicate_of_a_tinted_one(tmp_path):
    """Both thumbnails are far from grey in the same direction, which says nothing about their content."""
    rng = np.random.default_rng(0)
    tint = np.array([30, 90, 220])
    tinted = (tint + rng.normal(0, 9, (32, 32, 1))).clip(0, 255).astype(np.uint8)
    images = [
        encoded(Image.new("RGB", (32, 32), tuple(int(value) for value in tint))),
        encoded(Image.fromarray(tinted)),
    ]
    images += [encoded(Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))) for _ in range(4)]
    data = write(tmp_path / "data.parquet", images, [0] * 6)
    test = write(tmp_path / "test.parquet", images[:1], [0])
    found = doctor(data=str(data), test=str(test))["findings"]
    assert [(finding["index"], finding["kind"]) for finding in found] == [(0, "constant"), (0, "leak from test")]


def test_heads_that_are_yet_to_be_placed_cost_as_many_as_the_last_third(embedded, tmp_path, monkeypatch):
    """The word "auto" is no list of four blocks."""
    from mim_refiner.training import estimate

    monkeypatch.setattr(estimate, "ENOUGH", 0.0)
    images, labels, _, _ = embedded
    data, model = write(tmp_path / "data.parquet", images[:80], labels[:80]), files("mim_refiner") / "assets" / "mae"
    costs = {}
    for blocks in ("auto", "last_third", "[8, 9, 10, 11]", "[11]"):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"name: tiny\nbatch_size: 16\nheads:\n  blocks: {blocks}\n")
        found = doctor(data=str(data), model=str(model), recipe=str(recipe), device="cpu")["model"]
        costs[blocks] = (found["training_memory_gb"], found["disk_gb"])
    depth = 12
    assert costs["auto"] == costs["last_third"] == costs[str([*range(depth - depth // 3, depth)])]
    assert costs["[11]"] < costs["auto"]
