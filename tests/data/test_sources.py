from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_refiner.data.decode import decode_rgb
from mim_refiner.data.source_parquet import ParquetSource
from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError


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
    np.testing.assert_array_equal(decode_rgb(source.read(2)), pixels(0))


@pytest.mark.parametrize(
    "names",
    [["a.png", "b.png"], ["x/1/a.png", "x/2/b.png"], ["a.png", "x/b.png"], ["only/a.png", "only/b.png"]],
    ids=["flat", "deeper", "mixed", "one sub-folder"],
)
def test_other_folder_layouts_have_no_labels(image_folder, names):
    source = open_source(image_folder(names))
    assert len(source) == 2
    assert source.labels is None
    assert source.class_names is None


def test_hidden_and_foreign_files_are_ignored(image_folder):
    root = image_folder(["a.png", ".b.png", ".cache/c.png", "d.JPG"])
    (root / "notes.txt").write_text("no image")
    assert [open_source(root).name(i) for i in range(2)] == ["a.png", "d.JPG"]
    assert len(open_source(root)) == 2


def test_fingerprint_knows_content_but_not_place(image_folder, tmp_path):
    root = image_folder(["x/a.png", "y/b.png"])
    before = open_source(root).fingerprint()
    moved = root.rename(tmp_path / "moved")
    assert open_source(moved).fingerprint() == before
    (moved / "y/b.png").rename(moved / "x/b.png")
    assert open_source(moved).fingerprint() != before


# lists


def test_text_list(image_folder):
    root = image_folder(["a.png", "sub/b.png"])
    (root / "list.txt").write_text("# comment\nsub/b.png\n\na.png\n")
    source = open_source(root / "list.txt")
    assert [source.name(i) for i in range(len(source))] == ["sub/b.png", "a.png"]
    assert source.labels is None
    assert decode_rgb(source.read(0)).shape == (12, 16, 3)


@pytest.mark.parametrize("header", ["", "path,label\n"])
def test_csv_list_with_names_as_labels(image_folder, header):
    root = image_folder(["a.png", "b.png"])
    (root / "list.csv").write_text(header + "a.png,zebra\nb.png,ant\n")
    source = open_source(root / "list.csv")
    assert source.class_names == ("ant", "zebra")
    assert source.labels.tolist() == [1, 0]


def test_csv_list_with_integers_and_further_columns(image_folder):
    root = image_folder(["a.png", "b.png"])
    (root / "list.csv").write_text("path,size,label\na.png,7,4\nb.png,7,2\n")
    source = open_source(root / "list.csv")
    assert source.labels.tolist() == [4, 2]
    assert source.class_names is None


def test_text_list_with_tab_labels(image_folder):
    root = image_folder(["a b.png"])
    (root / "list.txt").write_text("a b.png\t3\n")
    assert open_source(root / "list.txt").labels.tolist() == [3]


# parquet


def test_parquet_bytes_labels_class_names(tmp_path, pixels, encode):
    columns = {"image": [encode(pixels(i)) for i in range(5)], "label": [0, 1, 0, 1, 1]}
    path = write_parquet(tmp_path / "a.parquet", columns, {"class_names": json.dumps(["x", "y"])}, row_group_size=2)
    source = open_source(path)
    assert source.class_names == ("x", "y")
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0, 1, 0, 1, 1]
    for i in (4, 0, 2):
        np.testing.assert_array_equal(decode_rgb(source.read(i)), pixels(i))


def test_large_parquet_reads_by_row_group(tmp_path, pixels, encode):
    columns = {"image": [encode(pixels(i)) for i in range(20)]}
    source = ParquetSource(Path(write_parquet(tmp_path / "a.parquet", columns, row_group_size=2)), whole_file_bytes=0)
    for i in (19, 0, 7, 8, 3, 12, 19):
        np.testing.assert_array_equal(decode_rgb(source.read(i)), pixels(i))
    assert len(source._groups) <= 4
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(decode_rgb(copy.read(11)), pixels(11))


def test_parquet_hugging_face_struct(tmp_path, pixels, encode):
    (tmp_path / "beside.png").write_bytes(encode(pixels(1)))
    rows = [{"bytes": encode(pixels(0)), "path": None}, {"bytes": None, "path": "beside.png"}]
    features = {"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}}
    path = write_parquet(tmp_path / "a.parquet", {"img": rows, "label": [1, 0]}, {"huggingface": json.dumps(features)})
    source = open_source(path)
    assert source.class_names == ("no", "yes")
    for i in range(2):
        np.testing.assert_array_equal(decode_rgb(source.read(i)), pixels(i))


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
        np.testing.assert_array_equal(decode_rgb(source.read(3)), pixels(11))
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
    np.testing.assert_array_equal(decode_rgb(gray.read(1)), np.repeat(images[1, :, :, :1], 3, axis=2))


# slices


@pytest.mark.parametrize("text", ["[:3]", "[2:]", "[1:9:3]", "[-2:]", "[::2]"])
def test_slice(tmp_path, text):
    np.savez(tmp_path / "a.npz", images=np.arange(8, dtype=np.uint8)[:, None, None].repeat(2, 1), labels=np.arange(8))
    source = open_source(f"{tmp_path / 'a.npz'}{text}")
    expected = eval(f"list(range(8)){text}")
    assert source.labels.tolist() == expected
    assert [int(source.read(i)[0, 0]) for i in range(len(source))] == expected
    assert source.name(0) == f"a.npz[{expected[0]}]"
    assert source.fingerprint() != open_source(tmp_path / "a.npz").fingerprint()


# bad input: every message is one line that names the place and the remedy


def _bad_sources(root: Path) -> dict[str, tuple[str, str]]:
    (root / "empty").mkdir()
    (root / "words").mkdir()
    (root / "words/readme.md").write_text("x")
    (root / "a.zip").write_bytes(b"x")
    (root / "bad.parquet").write_bytes(b"PAR1 but no more")
    (root / "bad.npz").write_bytes(b"PK and no more")
    (root / "bad.npy").write_bytes(b"no array")
    (root / "none.txt").write_text("# nothing\n")
    (root / "ragged.csv").write_text("a.png,1\nb.png\n")
    (root / "gap.csv").write_text("path,label\na.png,1\nb.png\n")
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    write_parquet(root / "columns.parquet", {"picture": [b"x"], "label": [0]})
    write_parquet(root / "typed.parquet", {"image": [1.5]})
    write_parquet(root / "rows.parquet", {"image": pa.array([], pa.binary())})
    write_parquet(root / "nolabel.parquet", {"image": [b"x", b"y"], "label": [0, None]})
    write_parquet(root / "labels.parquet", {"image": [b"x"], "label": [5]}, {"class_names": '["a"]'})
    write_parquet(root / "other.parquet", {"image": [b"x"], "label": [0]}, {"class_names": '["b"]'})
    write_parquet(root / "good.parquet", {"image": [b"x"]})
    np.save(root / "float.npy", np.zeros((2, 4, 4, 3), dtype=np.float32))
    np.save(root / "planes.npy", np.zeros((2, 3, 8, 8), dtype=np.uint8))
    np.save(root / "zero.npy", np.zeros((0, 8, 8), dtype=np.uint8))
    np.save(root / "objects.npy", np.array([{}], dtype=object))
    np.savez(root / "keys.npz", pictures=np.zeros((2, 4, 4), dtype=np.uint8))
    np.savez(root / "short.npz", images=np.zeros((2, 4, 4), dtype=np.uint8), labels=np.zeros(3, dtype=int))
    np.savez(root / "minus.npz", images=np.zeros((2, 4, 4), dtype=np.uint8), labels=np.array([0, -3]))
    return {
        "nowhere": ("no such file", "check the path"),
        "nowhere-*.parquet": ("no such file", "did you mean"),
        "empty": ("the folder is empty", "give a folder"),
        "words": ("none of its 1 files is an image", "give a folder"),
        "a.zip": ("unknown kind of data", "give a folder, .txt"),
        "bad.parquet": ("not a readable parquet", "download"),
        "bad.npz": ("cannot be read", "save it again"),
        "bad.npy": ("cannot be read", "save it again"),
        "objects.npy": ("cannot be read", "save it again"),
        "none.txt": ("names no image", "one path per line"),
        "ragged.csv": ("columns", "give every line"),
        "gap.csv": ("row 3 has no label", "fill it in"),
        "binary.txt": ("cannot read the list", "UTF-8"),
        "columns.parquet": ("found picture, label", "rename"),
        "typed.parquet": ("is double", "store encoded"),
        "rows.parquet": ("no rows", "give one"),
        "nolabel.parquet": ("1 rows have no label", "fill them in"),
        "labels.parquet": ("label 5 but only 1 class names", "correct"),
        "float.npy": ("float32", "convert them to uint8"),
        "planes.npy": (r"\(2, 3, 8, 8\)", r"\[N, H, W, C\]"),
        "zero.npy": ("holds no image", "save at least one"),
        "keys.npz": ("found pictures", "save it under"),
        "short.npz": (r"labels of shape \(3,\)", "one label an image"),
        "minus.npz": ("label -3 in row 1", "use 0, 1, 2"),
        "good.parquet[5:]": ("selects none of 1 images", "widen"),
        "good.parquet[::0]": ("step", "use 1 or more"),
    }


def test_bad_sources(tmp_path):
    for name, (problem, remedy) in _bad_sources(tmp_path).items():
        with pytest.raises(DataError, match=problem) as caught:
            open_source(tmp_path / name)
        caught.match(remedy)
        caught.match(name.split("[")[0].replace("*", r"\*"))
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no data source given"):
        open_source(" ")


def test_parts_that_do_not_fit_together(tmp_path):
    _bad_sources(tmp_path)
    with pytest.raises(DataError, match=r"1 of 2 parts have labels.*name parts of one kind"):
        open_source(f"{tmp_path / 'other.parquet'},{tmp_path / 'good.parquet'}")
    np.savez(tmp_path / "labelled.npz", images=np.zeros((2, 4, 4), dtype=np.uint8), labels=np.zeros(2, dtype=int))
    with pytest.raises(DataError, match=r"different class names; name one data set"):
        open_source(f"{tmp_path / 'other.parquet'},{tmp_path / 'labelled.npz'}")
