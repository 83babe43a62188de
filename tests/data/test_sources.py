from __future__ import annotations

import base64
import json
import os
import pickle
import re
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_refiner.data.decode import ImageSet
from mim_refiner.data.image_files import decode_image
from mim_refiner.data.source_base import LeftOut
from mim_refiner.data.source_parquet import ParquetSource
from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError
from mim_refiner.report.tables import left_out_lines


def write_parquet(
    path: Path, columns: dict[str, object], metadata: dict[str, str] | None = None, **options: object
) -> str:
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata) if metadata else table, path, **options)
    return str(path)


# folders


def test_class_folders_give_labels(image_folder, pixels):
    source = open_source(image_folder(["dog/b.png", "cat/a.png", "dog/a.png"]))
    assert source.class_names == ("cat", "dog")
    assert [source.name(i) for i in range(3)] == ["cat/a.png", "dog/a.png", "dog/b.png"]
    assert source.labels.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(decode_image(source.read(2))[0], pixels(0))


def test_fingerprint_knows_content_but_not_place(image_folder, tmp_path):
    root = image_folder(["x/a.png", "y/b.png"])
    before = open_source(root).fingerprint()
    moved = root.rename(tmp_path / "moved")
    assert open_source(moved).fingerprint() == before
    (moved / "y/b.png").rename(moved / "x/b.png")
    assert open_source(moved).fingerprint() != before


# parquet


def test_parquet_bytes_labels_class_names(tmp_path, pixels, encode):
    columns = {"image": [encode(pixels(i)) for i in range(5)], "label": [0, 1, 0, 1, 1]}
    path = write_parquet(tmp_path / "a.parquet", columns, {"class_names": json.dumps(["x", "y"])}, row_group_size=2)
    source = open_source(path)
    assert source.class_names == ("x", "y")
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0, 1, 0, 1, 1]
    for i in (4, 0, 2):
        np.testing.assert_array_equal(decode_image(source.read(i))[0], pixels(i))


def test_large_parquet_reads_by_row_group(tmp_path, pixels, encode):
    columns = {"image": [encode(pixels(i)) for i in range(20)]}
    source = ParquetSource(Path(write_parquet(tmp_path / "a.parquet", columns, row_group_size=2)))
    source.stream()
    for i in (19, 0, 7, 8, 3, 12, 19):
        np.testing.assert_array_equal(decode_image(source.read(i))[0], pixels(i))
    assert len(source._groups) <= 4
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(decode_image(copy.read(11))[0], pixels(11))


def test_parquet_hugging_face_struct(tmp_path, pixels, encode):
    (tmp_path / "beside.png").write_bytes(encode(pixels(1)))
    rows = [{"bytes": encode(pixels(0)), "path": None}, {"bytes": None, "path": "beside.png"}]
    features = {"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}}
    path = write_parquet(tmp_path / "a.parquet", {"img": rows, "label": [1, 0]}, {"huggingface": json.dumps(features)})
    source = open_source(path)
    assert source.class_names == ("no", "yes")
    for i in range(2):
        np.testing.assert_array_equal(decode_image(source.read(i))[0], pixels(i))


def test_parquet_string_labels_and_unlabelled(tmp_path, pixels, encode):
    image = encode(pixels(0))
    source = open_source(write_parquet(tmp_path / "a.parquet", {"image": [image] * 2, "label": ["b", "a"]}))
    assert source.labels.tolist() == [1, 0]
    assert open_source(write_parquet(tmp_path / "b.parquet", {"image": [image], "label": [-1]})).labels is None


def test_several_parquet_files(tmp_path, pixels, encode):
    for part in range(3):
        columns = {"image": [encode(pixels(10 * part + i)) for i in range(2)], "label": [part, part]}
        write_parquet(tmp_path / f"train-{part}.parquet", columns)
    by_glob = open_source(tmp_path / "train-*.parquet")
    by_list = open_source(",".join(str(tmp_path / f"train-{part}.parquet") for part in range(3)))
    by_folder = open_source(tmp_path)
    for source in (by_glob, by_list, by_folder):
        assert source.labels.tolist() == [0, 0, 1, 1, 2, 2]
        np.testing.assert_array_equal(decode_image(source.read(3))[0], pixels(11))
        assert source.name(3) == "train-1.parquet[1]"
    assert by_glob.fingerprint() == by_list.fingerprint() == by_folder.fingerprint()


def test_folder_with_two_splits_is_refused(tmp_path, pixels, encode):
    for name in ("train-00.parquet", "test-00.parquet"):
        write_parquet(tmp_path / name, {"image": [encode(pixels(0))]})
    with pytest.raises(DataError, match=r"splits test, train; choose one with a pattern like .*\*test\*\.parquet"):
        open_source(tmp_path)


# arrays


def test_npz_and_npy(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=images, y=np.array([2, 0, 1, 1], dtype=np.uint8))
    np.save(tmp_path / "b.npy", images[..., 0])
    source = open_source(tmp_path / "a.npz")
    assert source.labels.tolist() == [2, 0, 1, 1]
    np.testing.assert_array_equal(source.read(3), images[3])
    gray = pickle.loads(pickle.dumps(open_source(tmp_path / "b.npy")))
    assert gray.labels is None
    np.testing.assert_array_equal(decode_image(gray.read(1))[0], np.repeat(images[1, :, :, :1], 3, axis=2))


# slices


@pytest.mark.parametrize("text", ["[:3]", "[2:]", "[1:9:3]", "[-2:]", "[::2]"])
def test_slice(tmp_path, text):
    np.savez(tmp_path / "a.npz", images=np.arange(8, dtype=np.uint8)[:, None, None].repeat(2, 1), labels=np.arange(8))
    source = open_source(f"{tmp_path / 'a.npz'}{text}")
    expected = eval(f"list(range(8)){text}")
    assert [int(source.class_names[number]) for number in source.labels] == expected
    assert [int(source.read(i)[0, 0]) for i in range(len(source))] == expected
    assert source.name(0) == f"a.npz[{expected[0]}]"
    assert source.fingerprint() != open_source(tmp_path / "a.npz").fingerprint()


# bad input: every message is one line that names the place and the remedy


def _bad_sources(root: Path) -> dict[str, tuple[str, str]]:
    (root / "empty").mkdir()
    (root / "words").mkdir()
    (root / "words/readme.md").write_text("x")
    (root / "a.zip").write_bytes(b"x")
    (root / "a.docx").write_bytes(b"x")
    (root / "bad.parquet").write_bytes(b"PAR1 but no more")
    (root / "bad.npz").write_bytes(b"PK and no more")
    (root / "bad.npy").write_bytes(b"no array")
    (root / "none.txt").write_text("# nothing\n")
    (root / "ragged.csv").write_text("a.png,1\nb.png,2\nc,d.png,3\n")
    (root / "words.csv").write_text("daisy;rose\ntulip;lily\n")
    (root / "null.csv").write_bytes(b"a.png\0,1\n")
    (root / "huge.csv").write_text('"' + "x" * 200_000)
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    write_parquet(root / "columns.parquet", {"picture": [b"x"], "thumbnail": [b"x"], "label": [0]})
    write_parquet(root / "typed.parquet", {"image": [1.5]})
    write_parquet(root / "rows.parquet", {"image": pa.array([], pa.binary())})
    write_parquet(root / "good.parquet", {"image": [b"x"]})
    np.save(root / "float.npy", np.zeros((2, 4, 4, 3), dtype=np.float32))
    np.save(root / "planes.npy", np.zeros((2, 3, 8, 8), dtype=np.uint8))
    np.save(root / "zero.npy", np.zeros((0, 8, 8), dtype=np.uint8))
    np.save(root / "objects.npy", np.array([{}], dtype=object))
    np.savez(root / "keys.npz", pictures=np.zeros((2, 4, 4), dtype=np.uint8))
    os.mkfifo(root / "pipe.csv")
    return {
        "nowhere": ("no such file", "check the path"),
        "nowhere-*.parquet": ("no such file", "did you mean"),
        "empty": ("the folder is empty", "give a folder"),
        "words": (r"none of its files is an image: 1 file with other endings \(1 .md\)", "give a folder"),
        "a.zip": (r"is packed \(.zip\)", "unpack it"),
        "a.docx": ("unknown kind of data", "give a folder, .txt"),
        "pipe.csv": ("no regular file", "give a folder"),
        "{0..9}{0..9}{0..999999}.tar": ("more than a million files", "correct the numbers"),
        "x" * 5000: ("no such file", "check the path"),
        "s-{00..02}.tar": ("no such file", "check the path"),
        "bad.parquet": ("cannot be read", "download"),
        "bad.npz": ("cannot be read", "save it again"),
        "bad.npy": ("cannot be read", "save it again"),
        "objects.npy": ("cannot be read", "save it again"),
        "none.txt": ("names no image", "one path per line"),
        "ragged.csv": ("row 3 has 3 columns, the others 2", "double quotes"),
        "words.csv": (r"name no images \(the first is 'daisy;rose'\)", "path,label"),
        "null.csv": ("null bytes", "UTF-8"),
        "huge.csv": ("name no images", "path,label"),
        "binary.txt": ("name no images", "path,label"),
        "columns.parquet": ("found picture, thumbnail, label; 'picture', 'thumbnail' could hold them", "rename"),
        "typed.parquet": ("is double", "store encoded"),
        "rows.parquet": ("no rows", "give one"),
        "float.npy": ("float32", "convert them to uint8"),
        "planes.npy": (r"\(2, 3, 8, 8\)", r"\[N, H, W, C\]"),
        "zero.npy": ("holds no image", "save at least one"),
        "keys.npz": ("found pictures", "save it under"),
        "good.parquet[5:]": ("selects none of 1 image;", "widen"),
        "good.parquet[::0]": ("step", "use 1 or more"),
    }


def test_bad_sources(tmp_path):
    for name, (problem, remedy) in _bad_sources(tmp_path).items():
        with pytest.raises(DataError, match=problem) as caught:
            open_source(tmp_path / name)
        caught.match(remedy)
        assert name.split("[")[0].split(",")[0][:100].partition("{0")[0] in str(caught.value)
        assert "\n" not in str(caught.value)
    for twice in ("{0}/good.parquet,{0}/../{1}/good.parquet", "{0},{0}/good.parquet", "{0}/a.docx,{0}"):
        with pytest.raises(DataError, match=r"twice.*; name every file once"):
            open_source(twice.format(tmp_path, tmp_path.name))
    with pytest.raises(DataError, match="no data source given"):
        open_source(" ")


# what is not read is counted and named


def left_out(source):
    return [str(each) for each in source.left_out]


def test_other_endings_and_odd_entries_are_counted(image_folder):
    root = image_folder(["x/a.png", "x/b.jpe", "y/c.jfif", "y/d.PNG", "y/.e.png", "y/._f.png", ".cache/g.png"])
    for name in ("x/1.heic", "x/2.HEIC", "notes.md", "x/plain"):
        (root / name).write_bytes(b"x")
    write_parquet(root / "t.parquet", {"image": [b"x"]})
    os.mkfifo(root / "x/pipe.png")
    (root / "y/gone.png").symlink_to("nowhere")
    source = open_source(root)
    assert [source.name(i) for i in range(len(source))] == ["x/a.png", "x/b.jpe", "y/c.jfif", "y/d.PNG", "y/gone.png"]
    assert source.class_names == ("x", "y")
    assert left_out(source) == [
        "1 special file (pipes, sockets, devices) (first: x/pipe.png)",
        "1 hidden file (with a dot before the name) (first: y/.e.png)",
        "5 files with other endings (2 .heic, 1 .md, 1 without, 1 .parquet) (first: notes.md)",
    ]
    facts = source.facts()
    assert facts["images"] == 5
    assert facts["left_out"][2]["count"] == 5
    assert facts["classes"] == 2


def test_a_folder_that_may_not_be_read_is_said(image_folder, monkeypatch):
    root = image_folder(["x/a.png", "y/b.png", "z/c.png"])
    scan = os.scandir

    def refuse(folder):
        if str(folder).endswith("y"):
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    source = open_source(root)
    assert source.class_names == ("x", "z")
    assert left_out(source) == ["1 folder cannot be opened (Permission denied) (first: y/)"]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train/a.png", "val/b.png"], "train, val"),
        (["Train/x/a.png", "Train/y/b.png", "test/x/c.png"], "Train, test"),
        (["other/a.png", "test/b.png", "training/c.png"], "test, training"),
        (["valid/x/a.png", "test/x/b.png"], "test, valid"),
        (["train2017/a.png", "val2017/b.png"], "train2017, val2017"),
        (["Training_images/a.png", "Testing-Set/b.png"], "Testing-Set, Training_images"),
    ],
)
def test_a_root_of_splits_is_refused(image_folder, names, splits):
    root = image_folder(names)
    with pytest.raises(DataError, match=f"holds the splits {splits}; choose one, such as {root}/.*#"):
        open_source(root)
    first = splits.split(",")[0]
    assert len(open_source(f"{root}#{first}")) == sum(name.startswith(first) for name in names)


def test_a_class_may_be_called_train_or_test(image_folder):
    assert open_source(image_folder(["bus/a.png", "train/b.png", "car/c.png"])).class_names == ("bus", "car", "train")
    assert open_source(image_folder(["test1/a.png", "test2/b.png"])).class_names[2:4] == ("test1", "test2")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["a.png", "b.png"], "the images lie in no class folders"),
        (["x/a.png", "y/b.png", "c.png"], r"1 of 3 images lie outside the class folders \('c.png'\); move them"),
        (["x/a.png", "y/b.png", "y/z/c.png"], r"1 of 3 images lie deeper than the class folders \('y/z/c.png'\)"),
        (["x/1/a.png", "x/2/b.png"], "all images lie in one folder, .*if they lie in .*/x, give that"),
        (["x/a.png", "x/b.png"], "all images lie in one folder, and classes need two; if they lie in .*/x, give that"),
    ],
)
def test_folders_without_labels_say_why(image_folder, names, reason):
    root = image_folder(names)
    source = open_source(root)
    assert source.labels is None
    assert re.search(reason, source.no_labels)
    (root / "train.csv").write_text("a.png,1\n")
    assert open_source(root).no_labels.endswith("(the folder holds '.csv' files: --data may be such a list)")


def test_class_folders_of_numbers_are_those_of_a_list(image_folder):
    root = image_folder([f"{number}/a.png" for number in range(12)])
    (root / "list.csv").write_text("".join(f"{number}/a.png,{number}\n" for number in range(12)))
    folder, listed = open_source(root), open_source(root / "list.csv")
    assert folder.class_names == listed.class_names == tuple(map(str, range(12)))
    by_name = {folder.name(i): folder.labels[i] for i in range(12)}
    assert all(by_name[listed.name(i)] == listed.labels[i] for i in range(12))


def test_names_of_several_sources_are_unique(tmp_path, pixels, encode):
    for part in ("a", "b"):
        (tmp_path / part / "x").mkdir(parents=True)
        for name in ("x/1.png", "2.png"):
            (tmp_path / part / name).write_bytes(encode(pixels(0)))
        write_parquet(tmp_path / f"{part}/t.parquet", {"image": [b"x"]})
    folders = open_source(f"{tmp_path}/a,{tmp_path}/b")
    assert [folders.name(i) for i in range(4)] == ["a/2.png", "a/x/1.png", "b/2.png", "b/x/1.png"]
    tables = open_source(f"{tmp_path}/*/t.parquet")
    assert [tables.name(i) for i in range(2)] == ["a/t.parquet[0]", "b/t.parquet[0]"]
    files = open_source(f"{tmp_path}/*/x/*.png")
    assert [files.name(i) for i in range(2)] == ["a/x/1.png", "b/x/1.png"]
    assert files.class_names is None
    assert open_source(f"{tmp_path}/a/x/*.png").name(0) == "1.png"


@pytest.mark.parametrize("name", ["photos #2", "shots[2024]", "a,b", "x{1}", "trail ", "grün", "*"])
def test_folders_whose_names_have_a_meaning(tmp_path, name, encode, pixels):
    for kind in ("c0", "c1"):
        (tmp_path / name / kind).mkdir(parents=True)
        (tmp_path / name / kind / "1.png").write_bytes(encode(pixels(0)))
    assert len(open_source(tmp_path / name)) == 2
    assert open_source(f"{tmp_path / name}/c?/*.png").class_names == ("c0", "c1")
    assert len(open_source(f"{tmp_path / name}[1:]")) == 1


def test_accents_are_found_in_either_form(image_folder):
    root = image_folder([unicodedata.normalize("NFD", "Gänse/ü.png"), "x/a.png"])
    (root / "list.txt").write_text("Gänse/ü.png\n")
    assert open_source(root / "list.txt").read(0) == open_source(root).read(0)
    assert open_source(root).class_names == (unicodedata.normalize("NFC", "Gänse"), "x")
    assert len(open_source(root / "Gänse")) == 1


def test_descending_and_nested_braces(tmp_path, encode, pixels):
    for number in (8, 9, 10):
        (tmp_path / f"{number:02d}.png").write_bytes(encode(pixels(number)))
    names = [open_source(f"{tmp_path}/{{10..08}}.png").name(i) for i in range(3)]
    assert sorted(names) == ["08.png", "09.png", "10.png"]
    with pytest.raises(DataError, match="no such file"):
        open_source(f"{tmp_path}/{{a..b}}{{}}{{1..}}.png")


# parquet that is odd


def test_parquet_pictures_under_other_names_and_beside_the_table(tmp_path, encode, pixels):
    image = encode(pixels(0))
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a.png").write_bytes(image)
    (tmp_path / "secret.png").write_bytes(image)
    os.mkfifo(tmp_path / "files/pipe.png")
    for column, values in {
        "jpg": pa.array([image]), "Image": pa.array([image], pa.large_binary()),
        "view": pa.array([image], pa.binary_view()), "image": pa.array(["files/a.png"]),
        "img": pa.array([{"path": "files/a.png", "bytes": None}]),
    }.items():  # fmt: skip
        source = open_source(write_parquet(tmp_path / "files" / ".." / "t.parquet", {column: values, "mask": [b"m"]}))
        assert source.read(0) == image
    outside = ["files/../secret.png", str(tmp_path / "secret.png"), "files/pipe.png", None, ""]
    source = open_source(write_parquet(tmp_path / "t.parquet", {"image": pa.array(outside)}))
    for index in range(len(outside)):
        with pytest.raises(ValueError, match=r"outside the table's folder|no regular file|holds no image"):
            source.read(index)


def test_fingerprints_tell_tables_and_arrays_of_one_shape_apart(tmp_path):
    prints = set()
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
        pixels[0] = 0
        np.savez(tmp_path / "a.npz", images=pixels)
        write_parquet(tmp_path / "a.parquet", {"image": [row.tobytes() for row in pixels]})
        prints |= {open_source(tmp_path / name).fingerprint() for name in ("a.npz", "a.parquet")}
    assert len(prints) == 6


def test_two_stars_are_refused_as_they_would_leave_out_most(tmp_path, pixels, encode):
    for name in ("a.png", "x/b.png", "x/y/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encode(pixels(1)))
    with pytest.raises(DataError, match="a folder is read with all that lies below it: give the folder"):
        open_source(f"{tmp_path}/**/*.png")
    assert len(open_source(tmp_path)) == 3


def test_what_all_files_leave_out_alike_is_told_once(tmp_path, encode, pixels):
    for number in range(2):
        pq.write_table(pa.table({"image": [encode(pixels(number))], "path": ["a"]}), tmp_path / f"{number}.parquet")
    assert left_out(open_source(f"{tmp_path}/*.parquet")) == ["1 column of the table (first: path)"]


def test_files_left_out_of_two_folders_are_all_counted_even_where_their_names_are_the_same(tmp_path, encode, pixels):
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.png").write_bytes(encode(pixels(number)))
        (tmp_path / folder / "photo.raw").write_bytes(b"x")
    lost = open_source(f"{tmp_path}/a,{tmp_path}/b").facts()["left_out"]
    assert sum(each["count"] for each in lost) == 2


def test_one_thing_left_out_is_told_in_the_singular():
    assert str(LeftOut(1, "columns of the table", "path")) == "1 column of the table (first: path)"
    assert str(LeftOut(2, "columns of the table", "path")) == "2 columns of the table (first: path)"
    assert left_out_lines({"left_out": [{"count": 1, "what": "hidden files (of x files)", "first": "a"}]}) == [
        "left out: 1 hidden file (of x files) (first: a)"
    ]


def test_one_image_is_told_in_the_singular(tmp_path, image_folder, pixels, encode):
    root = image_folder(["a.png"])
    (tmp_path / "one.csv").write_text(f"path,label\n{root / 'a.png'},owl\n")
    np.save(tmp_path / "one.npy", pixels(0)[None])
    write_parquet(tmp_path / "one.parquet", {"image": [encode(pixels(0))]})
    with tarfile.open(tmp_path / "one.tar", "w") as shard:
        shard.add(root / "a.png", "a.png")
    given = [
        root,
        f"{root}[0:1]",
        [pixels(0)],
        *(tmp_path / f"one.{kind}" for kind in ("csv", "npy", "parquet", "tar")),
    ]
    for source in map(open_source, given):
        assert "(1 image" in source.description
        assert "1 images" not in source.description


@pytest.mark.parametrize("address", ["https://example.com/a.jpg", "s3://bucket/a.jpg"])
def test_web_addresses_and_base64_are_called_so(tmp_path, pixels, encode, address):
    (tmp_path / "a.png").write_bytes(encode(pixels(0)))
    coded = base64.b64encode(encode(pixels(0)) + bytes(1000)).decode()
    table = ImageSet(open_source(write_parquet(tmp_path / "a.parquet", {"image": ["a.png", address, coded]})))
    (tmp_path / "list.txt").write_text(f"a.png\n{address}\n")
    listed = ImageSet(open_source(tmp_path / "list.txt"))
    web = "is a web address; download the images first"
    text = "the row holds text too long for a path (base64?); store the bytes of the image"
    assert [reason for *_, reason in table.unreadable] == [web, text]
    assert [reason for *_, reason in listed.unreadable] == [web]
    with pytest.raises(DataError, match="download it first"):
        open_source(address)


def test_a_drive_that_is_not_there_holds_no_files(monkeypatch):
    monkeypatch.setattr(os.path, "isdir", lambda _: False)
    with pytest.raises(DataError, match="no such file"):
        open_source("/share/photos*/x.jpg")
