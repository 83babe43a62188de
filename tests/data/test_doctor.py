"""What the doctor sees in single images, duplicates against a slow loop, and the list of images to leave out."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mim_refiner.data.doctor import HUGE_PIXELS, KINDS, known_signature, scan
from mim_refiner.data.duplicates import exact_duplicates, exact_matches, near_duplicates, near_matches
from mim_refiner.data.name_lists import list_lines, without_listed
from mim_refiner.data.source_base import ImageSource
from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError


class Listed(ImageSource):
    """Encoded images from a list."""

    def __init__(self, items):
        self.items = items
        self.description = f"list of {len(items)}"

    def __len__(self):
        return len(self.items)

    def read(self, index):
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]

    def name(self, index):
        return f"item {index}"

    def fingerprint(self):
        return "listed"


def kinds_of(*items):
    """{index: kinds} of what is found in a set of sound images with ``items`` in front."""
    sound = [png(Image.fromarray(noise(seed))) for seed in range(100, 112)]
    found: dict[int, set[str]] = {}
    for finding in scan(Listed([*items, *sound])).findings:
        found.setdefault(finding.index, set()).add(finding.kind)
    return found


def noise(seed, height=32, width=32):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def png(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_sound_images_of_every_common_kind_are_not_found():
    image = Image.fromarray(noise(0))
    items = [png(image), png(image, "JPEG"), png(image, "WEBP"), png(image.convert("L")), png(image.convert("P"))]
    assert kinds_of(*items) == {}


def test_damaged_files():
    whole = png(Image.fromarray(noise(0)))
    jpeg = png(Image.fromarray(noise(1)), "JPEG")
    found = kinds_of(b"", b"hello, no image", whole[: len(whole) // 2], jpeg[: len(jpeg) // 2], FileNotFoundError())
    assert found == {0: {"empty"}, 1: {"unreadable"}, 2: {"truncated"}, 3: {"truncated"}, 4: {"unreadable"}}


def test_odd_images():
    image = Image.fromarray(noise(0))
    alpha = image.copy()
    alpha.putalpha(128)
    frames = [image, Image.fromarray(noise(1))]
    items = [
        png(image.resize((5, 4))),
        png(Image.new("RGB", (32, 32), (10, 200, 30))),
        png(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        png(image.convert("CMYK"), "JPEG"),
        png(Image.fromarray(noise(2)[:, :, 0].astype(np.uint16) * 257)),
        png(alpha),
        png(Image.fromarray(noise(3, 32, 320))),
        png(Image.fromarray(noise(4)[:, :, 0].astype(np.int32) * 1000), "TIFF"),
    ]
    assert kinds_of(*items) == {
        0: {"tiny"}, 1: {"constant"}, 2: {"animated"}, 3: {"CMYK"}, 4: {"16-bit"}, 5: {"transparent"}, 6: {"elongated"},
        7: {"unusable"},
    }  # fmt: skip


def test_a_huge_image_is_told_by_its_header_and_never_decoded(monkeypatch):
    side = int(HUGE_PIXELS**0.5) + 1
    data = png(Image.new("1", (side, side)))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded") if max(self.size) >= side else None)
    assert [finding.kind for finding in scan(Listed([data])).findings] == ["huge"]


def test_a_bomb_is_huge():
    data = png(Image.new("1", (15_000, 15_000)))
    assert kinds_of(data) == {0: {"huge"}}


def test_sixteen_bit_colour_is_told_although_pillow_hides_it():
    import struct
    import zlib

    rows = b"".join(b"\0" + bytes(range(8 * 6)) for _ in range(8))

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert "16-bit" in kinds_of(data)[0]


def test_mean_and_std_are_those_of_the_pixels():
    images = [noise(seed) for seed in range(5)]
    result = scan(Listed([png(Image.fromarray(image)) for image in images]))
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]) / 255
    assert result.mean == pytest.approx(pixels.mean(0).tolist(), abs=1e-6)
    assert result.std == pytest.approx(pixels.std(0).tolist(), abs=1e-6)
    assert result.rows.tolist() == [0, 1, 2, 3, 4]


def test_signatures():
    assert known_signature(png(Image.new("RGB", (2, 2)), "WEBP"))
    assert not known_signature(b"PK\x03\x04")


def test_every_kind_says_what_it_means():
    assert all(len(text) > 10 for _, text in KINDS.values())


def thumbs(count, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((16, 16), Image.Resampling.BICUBIC)) for c in coarse])


def slow_near(images, threshold):
    vectors = images.reshape(len(images), -1).astype(np.float64)
    groups = list(range(len(images)))
    for b in range(len(images)):
        for a in range(b):
            x, y = vectors[a] - vectors[a].mean(), vectors[b] - vectors[b].mean()
            if x @ y >= threshold * np.linalg.norm(x) * np.linalg.norm(y):
                groups = [groups[a] if g == groups[b] else g for g in groups]
    return {b: groups.index(g) for b, g in enumerate(groups) if groups.index(g) != b}


def test_near_duplicates_are_those_of_a_loop(monkeypatch):
    images = thumbs(60)
    rng = np.random.default_rng(1)
    for copy, original, strength in ((40, 3, 4), (41, 3, 6), (50, 20, 30), (59, 10, 2)):
        changed = 0.9 * images[original] + 10 + strength * rng.normal(size=images[0].shape)
        images[copy] = changed.clip(0, 255).astype(np.uint8)
    for threshold in (0.97, 0.8):
        monkeypatch.setattr("mim_refiner.data.duplicates.NEAR", threshold)
        assert {b: a for a, b in near_duplicates(images)} == slow_near(images, threshold)
    assert {40, 41, 59} <= slow_near(images, 0.97).keys()
    assert near_duplicates(images[:1]) == near_duplicates(images[:0]) == []


def test_plain_thumbnails_are_not_compared():
    plain = np.full((4, 16, 16, 3), 100, np.uint8)
    plain[1:] += np.random.default_rng(0).integers(0, 3, plain[1:].shape, dtype=np.uint8)
    assert near_duplicates(plain) == []


def test_matches_across_two_sets():
    data, test = thumbs(30), thumbs(10, seed=5)
    data[7] = test[4]
    assert near_matches(data, test) == [(4, 7)]
    assert near_matches(data[:0], test) == []
    assert exact_matches([b"a", b"b", b"a"], [b"x", b"a", b"a"]) == [(1, 0), (1, 2)]
    assert exact_duplicates([b"a", b"b", b"a", b"a"]) == [(0, 2), (0, 3)]


def test_the_list_takes_names_and_numbers(image_folder, tmp_path):
    source = open_source(image_folder([f"{kind}/{n}.png" for kind in ("a", "b") for n in range(3)]))
    listed = tmp_path / "exclude.txt"
    listed.write_text("# comment\na/1.png\ttruncated\n\n5\nelsewhere/x.png\tunreadable\n")
    kept = without_listed(source, listed)
    assert [kept.name(index) for index in range(len(kept))] == ["a/0.png", "a/2.png", "b/0.png", "b/1.png"]
    assert kept.labels.tolist() == [0, 0, 1, 1]
    assert kept.class_names == ("a", "b")
    assert kept.read(1) == source.read(2)
    assert kept.fingerprint() != source.fingerprint()
    listed.write_text("# nothing was found\n")
    assert len(without_listed(source, listed)) == 6


ODD_NAMES = [
    "#1 best.png",
    " lead.png",
    "tab\there.png",
    "z\nnew.png",
    "trail .png",
    "gr\udcfc.png",
    "5",
    "5.png",
    "ü.png",
]


def test_a_written_list_drops_what_it_lists(image_folder, tmp_path):
    source = open_source(image_folder([name if name.endswith(".png") else f"{name}.png" for name in ODD_NAMES]))
    listed = tmp_path / "exclude.txt"
    for chosen in ([0], [3, 4], list(range(len(source) - 1))):
        listed.write_bytes(list_lines((index, source.name(index), "why\tever\n") for index in chosen))
        kept = without_listed(source, listed)
        assert set(range(len(source))) - set(kept.indices.tolist()) == set(chosen)
        assert "none" not in kept.description.rpartition(" of ")[2]


def test_names_that_occur_twice_are_dropped_by_number(image_folder, tmp_path):
    root = image_folder(["a.png", "b.png"])
    (root / "list.txt").write_text("a.png\nb.png\na.png\na.png\n")
    source = open_source(root / "list.txt")
    (tmp_path / "exclude.txt").write_bytes(list_lines([(2, "a.png", "exact duplicate"), (9, "gone.png", "")]))
    kept = without_listed(source, tmp_path / "exclude.txt")
    assert kept.indices.tolist() == [0, 1, 3]
    assert kept.description.endswith("without 1 of exclude.txt, 1 of its lines name none")
    (tmp_path / "exclude.txt").write_bytes(list_lines([(0, "b.png", "it was there before")]))
    assert without_listed(source, tmp_path / "exclude.txt").indices.tolist() == [0, 2, 3]


def test_lists_that_cannot_be_meant_are_refused(image_folder, tmp_path):
    source = open_source(image_folder(["a.png", "b.png"]))
    listed = tmp_path / "exclude.txt"
    with pytest.raises(DataError, match=r"cannot be read .*the list of images to leave out"):
        without_listed(source, listed)
    listed.write_text("a.pgn\n")
    with pytest.raises(DataError, match=r"none of its 1 line .* did you mean 'a.png'"):
        without_listed(source, listed)
    listed.write_text("a.png\nb.png\n")
    with pytest.raises(DataError, match="leaves none of the 2 images"):
        without_listed(source, listed)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_other_numbers_of_channels_are_told_by_the_encoder():
    four = np.random.default_rng(0).integers(0, 60_000, (32, 32, 4)).astype(np.uint16)
    pages = [Image.fromarray(four[:, :, channel]) for channel in range(4)]
    tiff = png(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert kinds_of(npy(four), four, tiff, npy(four[:, :, :3])) == {
        0: {"channels"}, 1: {"channels"}, 2: {"channels"}, 3: {"16-bit"},
    }  # fmt: skip
    found = scan(Listed([npy(four), tiff, four, png(Image.fromarray(noise(0)))]), channels=4)
    assert [(finding.kind, finding.index) for finding in found.findings] == [("channels", 3)]
    assert found.rows.tolist() == [0, 1, 2]
    assert exact_duplicates(found.digests) == [(0, 1), (0, 2)]
    assert np.allclose(found.mean, (four >> 8).reshape(-1, 4).mean(0) / 255)
