"""Tar shards: read in place, labels beside the images, damage counted and listed, nothing ever unpacked."""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mim_refiner.data import source_tar
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.image_files import decode_image
from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIM_REFINER_CACHE", str(tmp_path / "cache"))


def add(archive: tarfile.TarFile, name: str, content: bytes, **facts: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in facts.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def shard(tmp_path: Path, pixels, encode):
    """Return a maker of shards: image i of all has seed i; ``labels`` gives the member beside it."""

    def make(name: str, count: int, first: int = 0, labels=lambda i: ("cls", str(i % 3))) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for i in range(first, first + count):
                add(archive, f"{i:06d}.png", encode(pixels(i)))
                if labels is not None:
                    ending, text = labels(i)
                    add(archive, f"{i:06d}.{ending}", text.encode())
        return path

    return make


def test_one_shard(shard, pixels):
    source = open_source(shard("a.tar", 5))
    assert len(source) == 5
    assert source.labels.tolist() == [0, 1, 2, 0, 1]
    assert source.name(3) == "a.tar/000003.png"
    for i in (4, 0, 2):
        np.testing.assert_array_equal(decode_image(source.read(i))[0], pixels(i))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(1) == source.read(1)


PATTERNS = ["s-*.tar", "s-{00..02}.tar", "s-{00,01,02}.tar", "s-00.tar,{root}/s-01.tar,{root}/s-02.tar"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_several_shards(tmp_path, shard, pixels, pattern):
    for number in range(3):
        shard(f"s-{number:02d}.tar", 2, first=2 * number)
    source = open_source(f"{tmp_path}/{pattern.replace('{root}', str(tmp_path))}")
    assert len(source) == 6
    assert source.name(3) == "s-01.tar/000003.png"
    np.testing.assert_array_equal(decode_image(source.read(5))[0], pixels(5))
    assert open_source(tmp_path).fingerprint() == source.fingerprint()


def test_labels_as_names_and_json(tmp_path, shard):
    shard("a.tar", 2, labels=lambda i: ("cls", ["zebra", "ant"][i]))
    shard("b.tar", 2, labels=lambda i: ("json", json.dumps({"label": ["ant", "bee"][i]})))
    source = open_source(f"{tmp_path}/*.tar")
    assert source.class_names == ("ant", "bee", "zebra")
    assert source.labels.tolist() == [2, 0, 0, 1]
    assert open_source(shard("c.tar", 2, labels=None)).labels is None
    flags = open_source(shard("e.tar", 2, labels=lambda i: ("json", json.dumps({"label": i > 0}))))
    assert (flags.class_names, flags.labels.tolist()) == (("False", "True"), [0, 1])
    partly = open_source(shard("d.tar", 2, labels=lambda i: (["cls", "txt"][i], "3")))
    assert partly.labels is None
    assert partly.no_labels.startswith("1 of 2 images have no .cls or .json label (first: d.tar/000001.png)")


def test_samples_are_grouped_as_webdataset_does(tmp_path, pixels, encode):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "x/1.seg.png", encode(pixels(9)))  # ends in "seg.png": not the image of the sample
        add(archive, "x/1.json", b'{"cls": 4}')
        add(archive, "x/1.JPG", encode(pixels(1), "JPEG"))
        add(archive, "y/1.png", encode(pixels(2)))
        add(archive, "y/1.cls", b"7\n")
        add(archive, "readme.md", b"text")
    source = open_source(path)
    assert [source.name(i) for i in range(len(source))] == ["a.tar/x/1.JPG", "a.tar/y/1.png"]
    assert source.labels.tolist() == [0, 1]
    assert source.class_names == ("4", "7")
    assert [str(each) for each in source.left_out] == [
        "1 member ending in .md (first: readme.md)",
        "1 further image of a sample that has one (first: x/1.seg.png)",
    ]


def test_the_index_is_kept_and_made_again_when_the_shard_changes(shard, pixels, encode, monkeypatch, tmp_path):
    path = shard("a.tar", 3)
    assert len(open_source(path)) == 3
    scans: list[Path] = []
    scan = source_tar.scan_shard
    monkeypatch.setattr(source_tar, "scan_shard", lambda path: scans.append(path) or scan(path))
    assert len(open_source(path)) == 3
    assert scans == []
    with tarfile.open(path, "a") as archive:
        add(archive, "000009.png", encode(pixels(9)))
        add(archive, "000009.cls", b"1")
    assert len(open_source(path)) == 4
    assert scans == [path]
    for kept in (tmp_path / "cache/tar-index").iterdir():
        kept.write_bytes(b"damaged")
    assert len(open_source(path)) == 4
    assert len(scans) == 2


def test_no_index_is_kept_where_the_cache_is_off(shard, monkeypatch, tmp_path):
    monkeypatch.setenv("MIM_REFINER_CACHE", "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path)
    assert len(open_source(shard("a.tar", 3))) == 3
    assert not (tmp_path / "user").exists()
    assert not (tmp_path / "off").exists()


def test_members_never_escape(tmp_path, pixels, encode):
    path = tmp_path / "in" / "a.tar"
    path.parent.mkdir()
    secret = tmp_path / "secret.png"
    secret.write_bytes(encode(pixels(7)))
    with tarfile.open(path, "w") as archive:
        add(archive, "../../escaped.png", encode(pixels(0)))
        add(archive, "/tmp/absolute.png", encode(pixels(1)))
        add(archive, "link.png", b"", type=tarfile.SYMTYPE, linkname=str(secret))
        add(archive, "hard.png", b"", type=tarfile.LNKTYPE, linkname="../secret.png")
        add(archive, "device.png", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        for number in range(30):
            add(archive, f"{number}.png", encode(pixels(number)))
    images = ImageSet(open_source(path))
    assert len(images) == 35
    assert [name for _, name, _ in images.unreadable] == [f"a.tar/{name}.png" for name in ("link", "hard", "device")]
    assert all("is a link or a special file" in reason for *_, reason in images.unreadable)
    np.testing.assert_array_equal(images.load(0), pixels(0))
    assert {entry.name for entry in tmp_path.iterdir()} <= {"in", "secret.png", "cache"}


def test_damage_is_counted_and_the_rest_is_read(shard, pixels):
    path = shard("a.tar", 40, labels=None)
    content = bytearray(path.read_bytes())
    step = len(content) // 40
    header = content.index(b"000010.png")
    content[header : header + 150] = bytes(150)[:-1] + b"x"
    path.write_bytes(bytes(content))
    images = ImageSet(open_source(path))
    assert step > 512
    assert len(images) == 40  # 39 and the damaged place
    assert len(images.unreadable) == 1
    _, name, reason = images.unreadable[0]
    assert name.startswith("a.tar/byte ")
    assert "damaged here" in reason
    np.testing.assert_array_equal(images.load(39), pixels(39))


def test_a_shard_cut_off(shard):
    path = shard("a.tar", 20, labels=None)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"000019.png") + 512 + 40])
    images = ImageSet(open_source(path))
    assert len(images) in (20, 21)
    assert len(images.unreadable) == len(images) - 19


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no tar file"), (b"text" * 300, "is no tar file|holds no image"), (bytes(10240), "holds no image"),
        (b"\x1f\x8b" + bytes(600), "a packed tar.*unpack it"),
    ],
)  # fmt: skip
def test_no_shards(tmp_path, content, message):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / "a.tar")


def test_splits(tmp_path, shard, image_folder):
    for split, first in (("train", 0), ("val", 3)):
        shard(f"set/x-{split}-00.tar", 2, first=first)
    with pytest.raises(DataError, match="holds the splits train, val; choose one with"):
        open_source(tmp_path / "set")
    assert open_source(f"{tmp_path}/set#train").name(0) == "x-train-00.tar/000000.png"
    for word in ("val", "validation", "valid"):
        assert open_source(f"{tmp_path}/set#{word}[:1]").name(0) == "x-val-00.tar/000003.png"
    with pytest.raises(DataError, match=r"no \.tar file is named so; choose one of the splits: train, val"):
        open_source(f"{tmp_path}/set#test")
    root = image_folder(["train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png"])
    source = open_source(f"{root}#test")
    assert source.class_names == ("a", "b")
    assert [source.name(i) for i in range(2)] == ["a/3.png", "b/4.png"]
    with pytest.raises(DataError, match="no sub-folder 'dev'"):
        open_source(f"{root}#dev")
    with pytest.raises(DataError, match="only a folder or hf:owner/name has splits"):
        open_source(f"{tmp_path}/set/x-train-00.tar#train")


def test_hub_data_sets(tmp_path, shard, monkeypatch):
    import huggingface_hub

    asked: list[Any] = []
    for split in ("train", "test"):
        shard(f"snapshot/data/{split}-00.tar", 3 if split == "train" else 2)

    def download(repository: str, **options: Any) -> str:
        asked.append((repository, options["repo_type"], options["revision"]))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(open_source("hf:owner/name#test")) == 2
    assert len(open_source("hf:owner/name@v1#train[:2]")) == 2
    assert asked == [("owner/name", "dataset", None), ("owner/name", "dataset", "v1")]
    with pytest.raises(DataError, match="holds the splits test, train"):
        open_source("hf:owner/name")


def test_hub_offline_and_malformed(monkeypatch, tmp_path):
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nand nothing in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(DataError, match=r"hf:owner/name: cannot be downloaded .*; check name and network") as caught:
        open_source("hf:owner/name")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="write hf:owner/name"):
        open_source("hf:name/../..")


# members in any order, dots in names, and what is not read


def members(tmp_path: Path, *names: str, name: str = "m.tar") -> Any:
    """A source of members by name; ``NAME=TEXT`` has that text as content."""
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for each in names:
            member, _, content = each.partition("=")
            add(archive, member, content.encode())
    return open_source(path)


def table(source: Any) -> dict[str, str | None]:
    labels = [None] * len(source) if source.labels is None else [source.class_names[n] for n in source.labels]
    return {source.name(i).partition("/")[2]: labels[i] for i in range(len(source))}


def lost(source: Any) -> list[str]:
    return [str(each) for each in source.left_out]


def test_labels_need_not_be_neighbours(tmp_path):
    names = [f"x/{n}.jpg=1" for n in range(6)] + [f"x/{n}.cls=c{n % 2}" for n in (3, 0, 5, 1, 2, 4)]
    wanted = {f"x/{n}.jpg": f"c{n % 2}" for n in range(6)}
    for order in (names, names[::-1], sorted(names), names[3:] + names[:3]):
        assert table(members(tmp_path, *order)) == dict(
            sorted(wanted.items(), key=lambda item: order.index(f"{item[0]}=1"))
        )


def test_names_may_hold_dots(tmp_path):
    source = members(tmp_path, "img_2024.05.01_1.cls=7", "img_2024.05.01_1.jpg=1", "img_2.jpg=1", "img_2.cls=8",
                     "v1.0/img_3.JPG=1",
                     "v1.0/img_3.CLS=7", "./a.b.jpeg=1", "./a.cls=9", "c..png=1", "c..json=8")  # fmt: skip
    assert table(source) == {
        "img_2024.05.01_1.jpg": "7", "img_2.jpg": "8", "v1.0/img_3.JPG": "7", "a.b.jpeg": "9", "c..png": "8",
    }  # fmt: skip
    assert lost(source) == []


def test_members_that_are_not_read_are_counted(tmp_path):
    source = members(tmp_path, "1.jpg=1", "1.mask.png=1", "1.png=1", "1.cls=a", "2.heic=1", "3.heic=1", "._1.jpg=1",
                     "1.jpg=2", "9.cls=b", "8.cls=b", "2.jpg=1", "2.cls=b")  # fmt: skip
    assert table(source) == {"1.jpg": "a", "2.jpg": "b"}
    assert lost(source) == [
        "2 members ending in .heic (first: 2.heic)",
        "1 hidden member (with a dot before the name) (first: ._1.jpg)",
        "1 repeated member (first: 1.jpg)",
        "2 further images of a sample that has one (first: 1.mask.png)",
        "2 members with labels of no image (first: 9)",
    ]
    assert lost(open_source(tmp_path / "m.tar")) == lost(source)  # from the cache


@pytest.mark.parametrize(("names", "reason"), [
    (["1.jpg=1", "2.jpg=1"], r"no image has a label beside it: put a \.cls or \.json beside each"),
    (["1.jpg=1", "1.txt=a cat"], r": 1 \.txt member not read as labels; name them \.cls"),
    (["a/1.jpg=1", "b/1.cls=3"], "1 member with labels of no image .* give them the names"),
    (["1.jpg=1", "1.json={\"caption\": 3}"], "no image has a label"),
    (["1.jpg=1", "1.cls=1", "2.jpg=1"], r"1 of 2 images have no .* \(first: m\.tar/2\.jpg\)"),
    (["1.jpg=1", "1.json={\"label\": 1.5}"], "label 1.5, which is a fraction"),
    (["1.jpg=1", "1.json={\"label\": -1}"], "every label is -1"),
    (["1.jpg=1", "1.json=" + "[" * 100_000], "no image has a label"),
    (["1.jpg=1", "1.json={\"label\": \"\\ud800\"}", "2.jpg=1", "2.json=[1]"], "1 of 2 images have no"),
    (["1.jpg=1", "1.json={\"label\": " + "9" * 10_000 + "}"], "no image has a label"),
])  # fmt: skip
def test_no_labels_says_why(tmp_path, names, reason):
    source = members(tmp_path, *names)
    assert source.labels is None
    assert re.search(reason, source.no_labels)


def test_labels_of_json(tmp_path):
    source = members(tmp_path, "1.jpg=1", '1.json={"cls": 3}', "2.jpg=1", '2.json={"label": "4", "cls": 9}', "3.jpg=1",
                     "3.json=3", "4.jpg=1", '4.json={"class": 4.0}')  # fmt: skip
    assert table(source) == {"1.jpg": "3", "2.jpg": "4", "3.jpg": "3", "4.jpg": "4"}


def test_shards_of_one_name_in_two_folders(tmp_path):
    for folder in ("a", "b"):
        members(tmp_path, "1.jpg=1", "1.cls=x", name=f"{folder}/0.tar")
    source = open_source(tmp_path)
    assert [source.name(i) for i in range(2)] == ["a/0.tar/1.jpg", "b/0.tar/1.jpg"]


def test_names_that_are_no_utf8(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as archive:
        add(archive, "gr\xfc\xdf.jpg", b"1")
        add(archive, "gr\xfc\xdf.cls", b"caf\xe9")
        add(archive, "new\nline.jpg", b"1")
        add(archive, "new\nline.cls", b"tea")
    source = open_source(path)
    assert [source.name(i) for i in range(2)] == ["a.tar/gr\\xfc\\xdf.jpg", "a.tar/new\\nline.jpg"]
    assert source.class_names == ("caf\\xe9", "tea")
