"""Labels as people write them: one dense numbering with names or ids, or a reason for having none."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_refiner.data.labels import LabelProblem, Labels, printable
from mim_refiner.data.source_parquet import labels_of_column
from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError


def dense(values: Sequence[object]) -> tuple[list[int], list[object]]:
    """Slow reference: numbers by first looking at all different values in order."""
    order = sorted(set(values))
    return [order.index(value) for value in values], order


@pytest.mark.parametrize("factor", [1, 1000, 10**9, 10**30])
def test_ids_of_any_size_are_numbered_densely(factor):
    ids = [3 * factor, 0, 7 * factor, 3 * factor]
    labels = Labels.of_texts(map(str, ids))
    assert (labels.numbers.tolist(), list(labels.ids)) == dense(ids)
    assert labels.names == tuple(map(str, sorted(set(ids))))
    if factor < 10**18:
        again = Labels.of_numbers(np.array(ids))
        assert again.numbers.tolist() == labels.numbers.tolist()
        assert again.ids == labels.ids


def test_numbers_written_as_text_are_sorted_as_numbers():
    labels = Labels.of_texts(["10", "9", "2"], folders=True)
    assert labels.names == ("2", "9", "10")
    assert not labels.named
    zeros = Labels.of_texts(["010", "009", "002"])
    assert (zeros.names, zeros.ids) == (("002", "009", "010"), (2, 9, 10))
    assert Labels.of_texts(["3.0", "1.0"]).ids == (1, 3)


@pytest.mark.parametrize("text", ["1_000", "٣", "+5", "0x10", "1e3", "²", "12345678901234567890" * 3])
def test_only_plain_decimals_are_numbers(text):
    labels = Labels.of_texts([text, text, "cat", "dog"])
    assert labels.ids is None
    assert set(labels.names) == {text, "cat", "dog"}


def test_two_spellings_of_one_number_are_two_folders_and_no_labels_of_a_list():
    labels = Labels.of_texts(["07", "7", "07"], folders=True)
    assert labels.names == ("07", "7")
    assert labels.numbers.tolist() == [0, 1, 0]
    assert labels.ids is None
    assert Labels.of_texts(["7.0", "7", "8"]).ids == (7, 8)
    for texts in (["07", "7", "07"], ["7.0", "007", "8"]):
        with pytest.raises(LabelProblem, match="one number in two spellings; write it one way"):
            Labels.of_texts(texts)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (["1", "", "2"], "row 1 has no label .1 of 3 have none"),
        (["a", "nan", "NaN"], "row 1 has no label .2 of 3 have none"),
        (["a", "b", "NULL"], "row 2 has no label .1 of 3 have none"),
        (["1", "2", "label"], "row 2 has the label 'label', and 2 others have numbers"),
        (["1", "-1", "2"], "row 1 has the label -1, which is negative; -1 marks an image without a label"),
        (["-1", "-1"], "every label is -1"),
        (["1", "2.5"], "row 1 has the label 2.5, which is a fraction"),
        (["x" * 600, "a"], "row 0 has a label of more than 500 characters"),
    ],
)  # fmt: skip
def test_text_that_is_no_label(values, reason):
    with pytest.raises(LabelProblem, match=reason):
        Labels.of_texts(values)


def test_names_with_a_few_numbers_among_them_are_names():
    assert Labels.of_texts(["7up", "1984", "cola"]).names == ("1984", "7up", "cola")
    assert Labels.of_texts(["1", "2", "3", "other"], folders=True).names == ("1", "2", "3", "other")


def test_names_are_composed_and_printable():
    name = "Gänseblümchen"
    forms = [unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
    labels = Labels.of_texts([*forms, "caf\udce9", " a\tb "])
    assert labels.names == tuple(sorted([unicodedata.normalize("NFC", name), "caf\\xe9", "a\\tb"]))
    assert labels.numbers[0] == labels.numbers[1]
    assert printable("a\nb\x85\ud800\udcff") == "a\\nb\\x85\\ud800\\xff"


COLUMNS = {
    "int8": pa.array([3, 1, 3], pa.int8()), "uint64": pa.array([3, 1, 3], pa.uint64()),
    "float": pa.array([3.0, 1.0, 3.0]), "half": pa.array(np.array([3, 1, 3], np.float16)),
    "decimal": pa.array([Decimal(3), Decimal(1), Decimal(3)]),
    "string": pa.array(["3", "1", "3"]), "large_string": pa.array(["3", "1", "3"], pa.large_string()),
    "view": pa.array(["3", "1", "3"], pa.string_view()), "bytes": pa.array([b"3", b"1", b"3"]),
    "dictionary": pa.array(["3", "1", "3"]).dictionary_encode(),
    "categories of numbers": pa.array([3, 1, 3]).dictionary_encode(),
}  # fmt: skip


@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_of_a_table(kind):
    labels = labels_of_column(pa.chunked_array([COLUMNS[kind]]))
    assert labels.numbers.tolist() == [1, 0, 1]
    assert labels.ids == (1, 3)


def test_booleans_and_big_unsigned_numbers():
    flags = labels_of_column(pa.chunked_array([pa.array([True, False])]))
    assert (flags.names, flags.ids) == (("False", "True"), (0, 1))
    assert matched(Labels.of_texts(["True"]), flags) == matched(Labels.of_texts(["1"]), flags) == ([1], [])
    assert labels_of_column(pa.chunked_array([pa.array([2**64 - 1, 0], pa.uint64())])).ids == (0, 2**64 - 1)
    assert labels_of_column(pa.chunked_array([pa.array([1e300, 0.0])])).numbers.tolist() == [1, 0]
    ids = [Decimal(10**19 + number) for number in (2, 0, 1)]  # floats would make one class of them
    assert labels_of_column(pa.chunked_array([pa.array(ids)])).numbers.tolist() == [2, 0, 1]
    named = labels_of_column(pa.chunked_array([pa.array([Decimal(1), Decimal(0)])]), ["ant", "bee"])
    assert (named.names, named.numbers.tolist()) == (("ant", "bee"), [1, 0])


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (pa.array([1, None, 2]), "row 1 has no label .1 of 3"),
        (pa.array(["a", None]).dictionary_encode(), "row 1 has no label"),
        (pa.array([1.0, float("nan")]), "row 1 has no label"),
        (pa.array([1.0, float("inf")]), "row 1 has no label"),
        (pa.array([1.0, 0.5]), "row 1 has the label 0.5, which is a fraction"),
        (pa.array([1, -7]), "row 1 has the label -7, which is negative; write"),
        (pa.array([[1, 2], [3]]), "holds lists, several labels an image"),
        (pa.array([{"id": 1}, {"id": 2}]), "is struct<id: int64>; store one"),
        (pa.array([0, 1]).cast(pa.timestamp("s")), "is timestamp"),
        (pa.nulls(2), "row 0 has no label .2 of 2"),
    ],
)  # fmt: skip
def test_columns_that_are_no_labels(values, reason):
    with pytest.raises(LabelProblem, match=reason):
        labels_of_column(pa.chunked_array([values]))


def test_given_names_count_only_where_they_occur():
    labels = Labels.of_numbers(np.array([2, 0, 2]), ["cat", "dog", "fox", "owl"])
    assert (labels.names, labels.ids, labels.absent) == (("cat", "fox"), (0, 2), 2)
    assert labels.numbers.tolist() == [1, 0, 1]
    with pytest.raises(LabelProblem, match="label 4, but there are only 4 class names"):
        Labels.of_numbers(np.array([4]), ["cat", "dog", "fox", "owl"])
    with pytest.raises(LabelProblem, match="'cat' is given to two numbers"):
        Labels.of_numbers(np.array([0]), ["cat", "cat"])


def test_a_part_is_numbered_anew():
    labels = Labels.of_texts(["a", "b", "c", "b"]).take(slice(1, None, 2))
    assert (labels.names, labels.numbers.tolist()) == (("b",), [0, 0])


def joined(*parts: Sequence[str]) -> Labels:
    return Labels.join([Labels.of_texts(part) for part in parts])


def test_parts_are_joined_by_name_or_by_number():
    labels = joined(["rose", "daisy"], ["tulip", "rose"])
    assert labels.names == ("daisy", "rose", "tulip")
    assert labels.numbers.tolist() == [1, 0, 2, 1]
    assert joined(["10", "9"], ["007", "9"]).ids == (7, 9, 10)
    with_names = Labels.of_numbers(np.array([1, 0]), ["cat", "dog"])
    both = Labels.join([with_names, Labels.of_numbers(np.array([1, 5]))])
    assert (both.names, both.numbers.tolist()) == (("cat", "dog", "5"), [1, 0, 1, 2])
    swapped = Labels.join([with_names, Labels.of_numbers(np.array([0, 1]), ["dog", "cat"])])
    assert swapped.numbers.tolist()[2:] == [swapped.names.index("dog"), swapped.names.index("cat")]
    with pytest.raises(LabelProblem, match="some parts name their classes, others number them"):
        joined(["rose"], ["3"])


def matched(test: Labels, train: Labels) -> tuple[list[int], list[str]]:
    numbers, unknown = test.numbers_in(train)
    return numbers.tolist(), unknown


def test_test_classes_are_matched_by_what_they_are_called():
    folders = Labels.of_texts([str(number) for number in range(20)], folders=True)
    assert matched(Labels.of_numbers(np.array([19, 3])), folders) == ([3, 19], [])
    assert matched(Labels.of_texts(["019", "003"]), folders) == ([3, 19], [])
    train = Labels.of_numbers(np.arange(3), ["cat", "dog", "fox"])
    assert matched(Labels.of_numbers(np.arange(2), ["fox", "cat"]), train) == ([2, 0], [])  # names before numbers
    assert matched(Labels.of_texts(["fox", "cat"]), train) == ([0, 2], [])
    assert matched(Labels.of_numbers(np.array([2])), train) == ([2], [])
    assert matched(Labels.of_texts(["owl", "dog"]), train) == ([1, -1], ["owl"])
    assert matched(Labels.of_texts(["0", "1"]), Labels.of_texts(["cat", "dog"])) == ([-1, -1], ["0", "1"])
    mixed = Labels.of_texts(["0", "1", "other"], folders=True)
    assert matched(Labels.of_numbers(np.array([1])), mixed) == ([1], [])


def write(path: Path, **columns: object) -> Path:
    metadata = columns.pop("metadata", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    return path


def test_hugging_face_names_belong_to_their_column(tmp_path):
    features = {"Label": {"names": ["no", "yes"], "_type": "ClassLabel"}, "other": {"names": ["x"]}}
    meta = {"huggingface": json.dumps({"info": {"features": features}})}
    assert open_source(write(tmp_path / "a.parquet", image=[b"x"], Label=[1], metadata=meta)).class_names == ("yes",)
    odd = {"huggingface": "[" * 100_000, "class_names": "{}"}
    assert open_source(write(tmp_path / "b.parquet", image=[b"x"], label=[1], metadata=odd)).class_names == ("1",)


@pytest.mark.parametrize("name", ["labels", "class", "target", "fine_label", "Category", "y"])
def test_candidates_are_named(tmp_path, name):
    reason = f"column '{name}' is not read as labels; rename it to 'label'"
    assert reason in open_source(write(tmp_path / "a.parquet", image=[b"x"], **{name: [1]})).no_labels
    (tmp_path / "a.csv").write_text(f"path,{name}\na.png,1\n")
    assert reason.lower() in open_source(tmp_path / "a.csv").no_labels.lower()
    np.savez(tmp_path / "a.npz", images=np.zeros((1, 4, 4), np.uint8), **{name + "s": np.zeros(1)})
    assert open_source(tmp_path / "a.npz").labels is None


def test_parts_with_and_without_labels(tmp_path):
    write(tmp_path / "a.parquet", image=[b"x", b"y"], label=["rose", "daisy"])
    write(tmp_path / "b.parquet", image=[b"x"], label=["tulip"])
    write(tmp_path / "c.parquet", image=[b"x"])
    source = open_source(f"{tmp_path}/a.parquet,{tmp_path}/b.parquet")
    assert source.class_names == ("daisy", "rose", "tulip")
    assert source.labels.tolist() == [1, 0, 2]
    partly = open_source(tmp_path)
    assert partly.labels is None
    assert partly.no_labels.startswith("1 of 3 parts have none (first: parquet ")
    write(tmp_path / "b.parquet", image=[b"x"], label=[3])
    assert "others number them" in open_source(f"{tmp_path}/a.parquet,{tmp_path}/b.parquet").no_labels


def test_partition_folders_and_empty_parts(tmp_path):
    for number, value in enumerate(["rose", "salt%20%26%20pepper", "__HIVE_DEFAULT_PARTITION__"]):
        write(tmp_path / f"split=a/label={value}/part-0.parquet", image=[b"%d" % number])
    write(tmp_path / "split=a/label=rose/part-1.parquet", image=pa.array([], pa.binary()))
    whole = open_source(tmp_path)
    assert "row 0 has no label" in whole.no_labels
    assert "1 parquet file without rows (first: part-1.parquet)" in map(str, whole.left_out)
    assert whole.name(0) == "split=a/label=__HIVE_DEFAULT_PARTITION__/part-0.parquet[0]"
    source = open_source(f"{tmp_path}/split=a[1:]")
    assert source.name(0) == "label=rose/part-0.parquet[0]"
    for path in tmp_path.glob("*/label=__*/*"):
        path.unlink()
    assert open_source(tmp_path).class_names == ("rose", "salt & pepper")
    (tmp_path / "split=a").rename(tmp_path / "class=a")
    for number, path in enumerate(tmp_path.glob("*/label=*")):
        path.rename(path.with_name(f"date={number}"))
    assert "folders class=... are not read as labels; rename them to label=" in open_source(tmp_path).no_labels
    for path in tmp_path.glob("*/*/part-0.parquet"):
        path.unlink()
    with pytest.raises(DataError, match="have no rows"):
        open_source(tmp_path)


def test_array_labels(tmp_path):
    images = np.zeros((3, 4, 4), np.uint8)

    def reason(labels: object) -> str:
        np.savez(tmp_path / "a.npz", images=images, labels=labels)
        source = open_source(tmp_path / "a.npz")
        return source.no_labels if source.labels is None else ",".join(source.class_names)

    assert reason(np.array(["b", "a", "b"])) == "a,b"
    assert reason(np.array([b"2", b"1", b"10"])) == "1,2,10"
    assert reason(np.array([[4], [2], [4]], np.uint8)) == "2,4"
    assert reason(np.array([True, False, True])) == "False,True"
    assert reason(np.array([1.0, 2.0, 1.0], np.float32)) == "1,2"
    assert "row 1 has no label" in reason(np.array([0, np.nan, 1]))
    assert "0.5, which is a fraction" in reason(np.array([0.5, 1, 1]))
    assert "3 images but 2 labels" in reason(np.zeros(2, int))
    assert "labels of shape (3, 3)" in reason(np.eye(3))
    assert "complex128" in reason(np.zeros(3, complex))
    assert "-3, which is negative" in reason(np.array([0, -3, 1]))
