"""Lists as people write them: any separator, with or without a header, columns in any order."""

from __future__ import annotations

import pytest

from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError

ROWS = [("a.png", "rose"), ("sub/b c.png", "daisy"), ("d,e.png", "rose"), ("#1.png", "tulip")]


@pytest.fixture
def folder(image_folder):
    return image_folder([name for name, _ in ROWS])


def opened(folder, text, name="list.csv"):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_source(folder / name)


def check(source, rows=ROWS):
    assert [source.name(index) for index in range(len(source))] == [name for name, _ in rows]
    assert [source.class_names[number] for number in source.labels] == [label for _, label in rows]
    assert all(source.read(index)[:4] == b"\x89PNG" for index in range(len(source)))


def lines(separator, rows, order=(0, 1)):
    def cell(text):
        return f'"{text}"' if separator in text else text

    return "\n".join(separator.join(cell(row[place]) for place in order) for row in rows) + "\n"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("header", [None, ("path", "label"), ("Filepath", "Label"), ("IMG_NAME", "label")])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["path first", "label first"])
def test_tables(folder, separator, header, order):
    rows = ([header] if header else []) + ROWS
    for name in ("list.csv", "list.tsv", "list.txt"):
        check(opened(folder, lines(separator, rows, order), name))


def test_marks_line_ends_and_codings(folder):
    text = lines(";", [("path", "label"), *ROWS])
    check(opened(folder, ("\ufeff" + text.replace("\n", "\r\n")).encode()))
    check(opened(folder, text.replace("\n", "\r")))
    check(opened(folder, text.encode("utf-16")))
    check(opened(folder, text.replace("sub/", "sub\\")), [(name.replace("\\", "/"), label) for name, label in ROWS])
    check(opened(folder, text.replace("\n", "\n\n")))
    check(opened(folder, text.replace(";", ";\t").replace("\n", ";\n")))


def test_blanks_between_path_and_label(folder):
    check(opened(folder, "a.png 3\nsub/b c.png 4\nd,e.png 3\n", "list.txt"),
          [("a.png", "3"), ("sub/b c.png", "4"), ("d,e.png", "3")])  # fmt: skip
    check(opened(folder, "label path\n3 a.png\n4 d,e.png\n", "list.txt"), [("a.png", "3"), ("d,e.png", "4")])


def test_names_alone_may_hold_anything(folder):
    source = opened(folder, "\n".join(name for name, _ in ROWS) + "\n# a comment\n", "list.txt")
    assert [source.name(index) for index in range(len(source))] == [name for name, _ in ROWS]
    assert source.no_labels == "the list has one column, of paths; add one for the labels"


def test_further_columns_need_a_header(folder):
    rows = [("", "image", "width", "label")] + [(str(n), name, "16", label) for n, (name, label) in enumerate(ROWS)]
    source = opened(folder, lines(",", rows, range(4)))
    check(source)
    assert [str(each) for each in source.left_out] == ["1 column of the list (first: width)"]
    bare = opened(folder, lines(",", rows[1:], range(4)))
    assert bare.no_labels == "the list has 4 columns and no header; add one that names path and label"
    assert bare.name(1) == "sub/b c.png"


def test_two_columns_of_images_are_told_apart_by_their_titles(folder):
    text = lines(",", [("mask", "image")] + [("a.png", name) for name, _ in ROWS], (0, 1))
    assert opened(folder, text).name(2) == "d,e.png"
    bare = opened(folder, "a.png,a.png\nd,e.png\n".replace("d,e", "sub/b c"))
    assert "row 2 has no label" in bare.no_labels
    bare = opened(folder, "a.png,a.png\nsub/b c.png,a.png\n")
    assert bare.no_labels == "the list has two columns of images and no labels; add a column 'label'"


@pytest.mark.parametrize("missing", ["", "nan"])
def test_rows_without_a_label_are_named(folder, missing):
    text = f"path,label\na.png,1\nsub/b c.png,{missing}\n"
    assert "row 3 has no label (1 of 2 have none)" in opened(folder, text).no_labels
    assert "row 2 has no label" in opened(folder, "a.png,1\nsub/b c.png\n").no_labels


def test_a_header_that_is_none_does_not_turn_numbers_into_names(folder):
    rows = [("a.png", "1"), ("sub/b c.png", "2"), ("d,e.png", "1")]
    source = opened(folder, lines(",", [("whatever", "label"), *rows]))
    assert source.classes.ids == (1, 2)
    odd = opened(folder, lines(",", [*rows, ("#1.png", "n/a")]))
    assert "row 4 has the label 'n/a', and 3 others have numbers" in odd.no_labels


def test_names_that_are_no_utf8_and_missing_files(tmp_path, folder):
    (folder / "gr\udcfc\udcdf.png").write_bytes((folder / "a.png").read_bytes())
    source = opened(folder, b"gr\xfc\xdf.png,caf\xe9\ngone.png,caf\xe9\n")
    assert source.name(0) == "gr\\xfc\\xdf.png"
    assert source.class_names == ("caf\\xe9",)
    assert source.read(0)[:4] == b"\x89PNG"
    with pytest.raises(FileNotFoundError):
        source.read(1)


@pytest.mark.parametrize(("text", "message"), [
    ("path,label\n,3\n" + "a.png,1\n" * 3, "row 2 has no path"),
    ("a.png,1\na.png,1\nd,e.png,1\n", r"row 3 has 3 columns, the others 2; put cells .* double quotes"),
    ("path,label\n", r"its rows name no images \(the first is 'path,label'\)"),
    ("http://host/x,1\nhttp://host/y,2\n", "its rows name no images"),
])  # fmt: skip
def test_lists_that_are_refused(folder, text, message):
    with pytest.raises(DataError, match=message):
        opened(folder, text)


def test_a_column_named_twice_is_said(folder):
    source = opened(folder, "path,label,Label\n" + "".join(f"{name},1,2\n" for name in ("a.png", "#1.png")))
    assert source.no_labels == "the header names 2 columns 'label'; keep one"
