"""Published splits as lists of names: what they fit, in every kind of source, and what is refused."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_refiner.data.name_lists import match_names, without_listed
from mim_refiner.data.source_base import ImageSource
from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError

CLASSES = ("n01440764", "n01443537")
NAMES = [f"{name}_{number}.JPEG" for name in CLASSES for number in (7, 10043, 10)]  # as ImageNet calls them
LISTED = [4, 0, 5]
Make = Callable[..., ImageSource]


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "1percent.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def in_folders(tmp_path: Path, encode: Callable[..., bytes], pixels: Callable[..., np.ndarray]) -> ImageSource:
    for number, name in enumerate(NAMES):
        place = tmp_path / "train" / name.partition("_")[0] / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encode(pixels(number)))
    return open_source(tmp_path / "train")


def in_shards(tmp_path: Path, encode: Callable[..., bytes], pixels: Callable[..., np.ndarray]) -> ImageSource:
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(3 * shard, 3 * shard + 3):
                stem = NAMES[number].removesuffix(".JPEG")
                for ending, data in ((".jpg", encode(pixels(number))), (".cls", str(shard).encode())):
                    member = tarfile.TarInfo(stem + ending)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return open_source(str(tmp_path / "*.tar"))


def in_tables(tmp_path: Path, encode: Callable[..., bytes], pixels: Callable[..., np.ndarray]) -> ImageSource:
    """A column of paths in one file, Hugging Face's struct with ImageNet's names there in the other."""
    data = [encode(pixels(number)) for number in range(6)]
    first = {"image": data[:3], "label": [0] * 3, "path": [f"{CLASSES[0]}/{name}" for name in NAMES[:3]]}
    structs = [{"bytes": raw, "path": f"{name.removesuffix('.JPEG')}_{CLASSES[1]}.JPEG"}
               for raw, name in zip(data[3:], NAMES[3:], strict=True)]  # fmt: skip
    pq.write_table(pa.table(first), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": structs, "label": [1] * 3}), tmp_path / "b.parquet")
    return open_source(str(tmp_path / "*.parquet"))


@pytest.mark.parametrize("make", [in_folders, in_shards, in_tables])
@pytest.mark.parametrize("ending", [".JPEG", ""])
def test_names_find_their_images_in_every_kind_of_source(
    make: Make, ending: str, tmp_path: Path, encode: Callable[..., bytes], pixels: Callable[..., np.ndarray]
) -> None:
    source = make(tmp_path, encode, pixels)
    lines = [NAMES[number].replace(".JPEG", ending) for number in LISTED]
    found = match_names(source, written(tmp_path, "# SimCLR's", *lines, "", lines[0]))
    assert (found.listed, found.missing) == (3, 0)
    whole = [name.split("/")[-1] for name in source.file_names()]
    stems = {re.match(r"n\d+_\d+", whole[row])[0] for row in found.rows}  # type: ignore[index]
    assert stems == {NAMES[number].removesuffix(".JPEG") for number in LISTED}


def test_a_selection_numbers_its_own_images(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    root = image_folder(["a/1.png", "a/2.png", "b/3.png", "b/4.png"])
    found = match_names(open_source(f"{root}[1:]"), written(tmp_path, "4", "a/2.jpeg", "5.png"))
    assert found.rows.tolist() == [0, 2]
    assert str(found).endswith("1percent.txt: 3 names, 2 found; 1 not found (first: 5.png)")


def test_folders_and_endings_tell_images_apart(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    root = image_folder(["a/x.png", "b/x.png", "a/y.v2.png", "b/z.png", "b/z.jpg"])
    source = open_source(root)
    names = list(source.file_names())
    for line, expected in {
        "b/x": "b/x.png",
        "./a\\x.JPEG": "a/x.png",
        "y.v2": "a/y.v2.png",
        "z.jpg": "b/z.jpg",
    }.items():
        other = "b/x" if expected.startswith("a") else "a/x"
        found = match_names(source, written(tmp_path, line, other))
        assert names.index(expected) in found.rows
        assert len(found.rows) == 2


def test_folders_above_those_of_the_source_are_left_out_where_all_names_share_them(
    image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source = open_source(image_folder(["a/x.png", "b/x.png", "b/z.png"]))
    found = match_names(source, written(tmp_path, "imagenet/train/a/x.png", "/imagenet/train/b/x.JPEG"))
    assert (found.rows.tolist(), found.missing) == ([0, 1], 0)
    with pytest.raises(DataError, match=r"begins with 'train/a/x.png', the images with 'a/x.png'"):
        match_names(source, written(tmp_path, "train/a/x.png", "val/b/x.png"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["x.png", "y"], r"1 of its 2 names fit several images .* \(first: 'x.png' fits 'a/x.png', 'b/x.png'\)"),
        (["a/x.png", "b/z"], r"1 of its 2 names fit several images"),
        (["n1_2.JPEG", "n1_3.JPEG"], r"none of its 2 names .* begins with 'n1_2.JPEG', the images with 'a/x.png'"),
        (["a/x.png", "nine"], r"1 not found \(first: nine\): no image of 1 of the 2 classes .* \('b'\)"),
        (["", "# nothing"], r"names no image"),
        (["x\0.png"], r"cannot be read"),
    ],
)
def test_lists_that_cannot_be_meant(
    image_folder: Callable[..., Path], tmp_path: Path, lines: list[str], message: str
) -> None:
    source = open_source(image_folder(["a/x.png", "b/x.png", "a/y.png", "b/z.png", "b/z.jpg"]))
    with pytest.raises(DataError) as caught:
        match_names(source, written(tmp_path, *lines))
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_list_that_is_not_there(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = open_source(image_folder(["a/x.png", "b/y.png"]))
    with pytest.raises(DataError, match=r"absent\.txt: cannot be read"):
        match_names(source, tmp_path / "absent.txt")


def test_images_without_labels_need_no_classes(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = open_source(image_folder(["x.png", "y.png"]))
    assert match_names(source, written(tmp_path, "y.png")).rows.tolist() == [1]


@pytest.mark.parametrize(
    "lines",
    [
        ["b/2.png 0", "a/1 3.png 1"],
        ["b/2.png,0", "a/1 3.png,1"],
        ["b/2.png ; 0", "a/1 3.png ; 1"],
        ["b/2.png\t0", "a/1 3.png\t1"],
        ["1,b/2.png", "2,a/1 3.png"],
        ["1 b/2.png", "1 a/1_3"],  # the label 1 is no name, though an image is called so
        ["path,label", "b/2.png,0", "a/1 3.png,1"],
        ['"b/2.png",0', '"a/1 3.png",1'],
        ["b/2.png", "a/1 3.png"],
    ],
)
def test_a_label_may_stand_beside_the_name(image_folder: Callable[..., Path], tmp_path: Path, lines: list[str]) -> None:
    source = open_source(image_folder(["a/1 3.png", "a/1_3.png", "b/2.png", "b/1.png"]))
    found = match_names(source, written(tmp_path, *lines))
    assert found.missing == 0
    assert found.listed == 2
    names = source.file_names()
    assert {names[row] for row in found.rows} == {"b/2.png", "a/1_3.png" if "1_3" in lines[1] else "a/1 3.png"}
    with pytest.raises(DataError, match=r"1 not found \(first: b/2\.png two words\): no image of 1 of the 2 classes"):
        match_names(source, written(tmp_path, "b/2.png two words", "a/1_3.png"))


def test_an_empty_list_leaves_the_source_as_it_is(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = open_source(image_folder(["a/x.png", "b/x.png"]))
    assert without_listed(source, written(tmp_path, "# images to leave out")) is source
