"""What the verbs say of the data: classes matched by name, and everything that is left out."""

from __future__ import annotations

import csv
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mim_refiner.report.page import write_report


@pytest.fixture
def knn(mae, cli):
    """k-NN of the tiny encoder on given data."""

    def run(*words, cache="off"):
        fixed = ["--protocols", "knn", "--pooling", "cls", "--device", "cpu", "--cache", cache, "--set", "knn_k=3"]
        return cli.call("evaluate", "--model", mae.export, *fixed, *words, "--json")

    return run


def listed(shapes, path, label, part=slice(None)):
    rows = [(str(file), label(file.parent.name)) for file in sorted(shapes.glob("*/*.png"))][part]
    path.write_text("path,label\n" + "".join(f"{name},{text}\n" for name, text in rows))
    return path


def values(outcome):
    assert outcome.code == 0, outcome.err
    return [row["value"] for row in outcome.json["results"]]


def test_ids_names_and_folders_give_the_same_numbers(knn, shapes, tmp_path):
    ids = {"circle": 8427189000, "square": 9703, "triangle": 2435099}
    rows = (slice(0, None, 2), slice(1, None, 2))
    wanted = values(knn("--data", f"{shapes}[::2]", "--test", f"{shapes}[1::2]"))
    for number, label in enumerate((ids.get, str, lambda name: f"{len(name):03d}")):
        train, test = (listed(shapes, tmp_path / f"{number}-{part.start}.csv", label, part) for part in rows)
        if number < 2:
            assert values(knn("--data", train, "--test", test)) == wanted
        assert knn("--data", train, "--test", test).json["data"]["test"]["classes"] == 3 - (number == 2)


def test_test_classes_are_known_by_name_whatever_part_is_there(knn, shapes, tmp_path):
    test = tmp_path / "test"
    shutil.copytree(shapes / "triangle", test / "triangle")
    shutil.copytree(shapes / "square", test / "square")
    for image in [*test.glob("*/*-0*.png")]:
        image.unlink()
    outcome = knn("--data", listed(shapes, tmp_path / "train.csv", str), "--test", test)
    same = knn("--data", shapes, "--test", listed(test, tmp_path / "test.csv", str))
    assert values(outcome) == values(same)
    facts = outcome.json["data"]["test"]
    assert (facts["classes"], facts["images"]) == (2, 12)
    assert (facts["also_in_train"]["count"], facts["also_in_train"]["compared"]) == (12, 12)
    assert "12 of 12 test images compared are among the training images" in outcome.err


def test_an_unknown_test_class_is_refused_before_any_feature(knn, shapes, tmp_path):
    test = shutil.copytree(shapes, tmp_path / "test")
    (test / "circle").rename(test / "ring")
    outcome = knn("--data", f"{shapes}[::2]", "--test", test)
    assert outcome.code == 2
    assert "class 'ring' does not occur in" in outcome.err
    assert "(it has 'circle', 'square', 'triangle')" in outcome.err
    assert "features of" not in outcome.err
    numbers = listed(shapes, tmp_path / "n.csv", lambda name: str(len(name)))
    assert "classes '6', '8' do not occur" in knn("--data", shapes, "--test", numbers).err


@pytest.fixture
def untidy(shapes, tmp_path):
    """The shapes with a damaged image, one of another ending, and a pipe's worth of notes."""
    root = shutil.copytree(shapes, tmp_path / "untidy")
    (root / "square" / "square-00.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    (root / "square" / "IMG_1.heic").write_bytes(b"x")
    (root / "circle" / ".hidden.png").write_bytes(b"x")
    return root


SAID = ("1 file with other endings (1 .heic) (first: square/IMG_1.heic)",
        "1 hidden file (with a dot before the name) (first: circle/.hidden.png)")  # fmt: skip


def test_evaluate_says_and_records_what_is_left_out(knn, untidy, tmp_path):
    for _ in range(2):  # computed, then from the cache
        outcome = knn("--data", untidy, "--out", tmp_path / "out", cache=tmp_path / "cache")
        folder = outcome.json["data"]["train"]["source"]
        assert all(f"left out of {folder}: {text}" in outcome.err for text in SAID)
        assert "1 of 48 images of" in outcome.err
        assert "square/square-00.png" in outcome.err
        facts = outcome.json["data"]["train"]
        assert facts["unreadable"]["count"] == 1
        assert [each["count"] for each in facts["left_out"]] == [1, 1]
        for path in (tmp_path / "out" / "evaluation").glob("*.json"):
            assert json.loads(path.read_text())["data"]["train"] == facts
    page = write_report([tmp_path / "out"]).read_text()
    assert all(text in page for text in SAID)
    assert "left out: 1 image that cannot be read (square/square-00.png" in page


def test_every_verb_says_what_is_left_out(untidy, mae, cli, tmp_path):
    calls = {
        "pretrain": cli.pretrain(untidy, tmp_path / "mae"),
        "refine": cli.refine(untidy, mae.export, tmp_path / "refined"),
        "embed": ["embed", "--model", mae.export, "--data", untidy, "--out", tmp_path / "f.npy", "--device", "cpu"],
        "analyze": ["analyze", "--model", mae.export, "--data", untidy, "--out", tmp_path / "a", "--parts", "atlas",
                    "--device", "cpu", "--cache", "off"],
        "doctor": ["doctor", "--data", untidy],
    }  # fmt: skip
    for verb, words in calls.items():
        outcome = cli.call(*words)
        assert outcome.code == 0, outcome.err
        assert all(text in outcome.err for text in SAID), verb
    assert all(text in outcome.out for text in SAID)  # doctor's, the last
    for run in ("mae", "refined"):
        facts = json.loads((tmp_path / run / "summary.json").read_text())["data"]["train"]
        assert [each["what"].split()[0] for each in facts["left_out"]] == ["hidden", "files"]
        assert (tmp_path / run / "skipped_images.txt").read_text().startswith("16\tsquare/square-00.png\t")
    assert SAID[0] in write_report([tmp_path / "refined"]).read_text()
    assert SAID[0] in write_report([tmp_path / "a"]).read_text()
    assert json.loads((tmp_path / "f.npy.manifest.json").read_text())["data_facts"]["left_out"]
    skipped = str(tmp_path / "refined/skipped_images.txt")
    again = [*cli.refine(untidy, mae.export, tmp_path / "again"), "--exclude", skipped]
    assert "47 images" in cli.call(*again, "--plan").err


def test_labels_are_never_needed_to_train_embed_or_look(cli, mae, unlabelled, tmp_path):
    images = [path.read_bytes() for path in sorted(unlabelled.glob("*.png"))]
    odd = pa.array([None if number % 2 else number for number in range(len(images))])
    pq.write_table(pa.table({"image": images, "label": odd}), tmp_path / "odd.parquet")
    reason = "no labels: row 1 has no label (24 of 48 have none); fill it in"
    for words in (
        cli.pretrain(tmp_path / "odd.parquet", tmp_path / "mae"),
        ["embed", "--model", mae.export, "--data", tmp_path / "odd.parquet", "--out", tmp_path / "f.npy"],
        ["doctor", "--data", tmp_path / "odd.parquet"],
    ):
        outcome = cli.call(*words)
        assert outcome.code == 0, outcome.err
        assert reason in outcome.err
    outcome = cli.call("evaluate", "--model", mae.export, "--data", tmp_path / "odd.parquet", "--protocols", "knn")
    assert outcome.code == 2
    assert "needs them: row 1 has no label" in outcome.err
    given = [*cli.refine(unlabelled, mae.export, tmp_path / "r"), "--eval-data", str(tmp_path / "odd.parquet")]
    assert "has no labels (row 1 has no label" in cli.call(*given).err


def test_paths_that_are_no_utf8(cli, mae, shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "caf\udce9")
    (root / "circle" / "circle-00.png").rename(root / "circle" / "gr\udcfc\n.png")
    done = cli.start("doctor", "--data", root)
    out, err = done.communicate()
    assert done.returncode == 0, err
    assert "caf\\xe9 (48 images, 3 class folders)" in out
    outcome = cli.call("embed", "--model", mae.export, "--data", root, "--out", tmp_path / "f.parquet")
    assert outcome.code == 0, outcome.err
    assert "circle/gr\\xfc\\n.png" in pq.read_table(tmp_path / "f.parquet").column("name").to_pylist()
    run = shutil.copytree(mae.path, tmp_path / "run\udce9")
    assert "run\\udce9" in write_report([run]).read_text()


def test_embedded_labels_are_the_numbers_of_the_data(cli, mae, shapes, tmp_path):
    ids = {"circle": 8427189000, "square": 9703, "triangle": 17}
    data = listed(shapes, tmp_path / "ids.csv", ids.get)
    for ending in ("parquet", "npy"):
        words = ["--model", mae.export, "--data", data, "--out", tmp_path / f"f.{ending}", "--device", "cpu"]
        assert cli.call("embed", *words).code == 0
    table = pq.read_table(tmp_path / "f.parquet")
    wanted = [ids[name.split("/")[-2]] for name in table.column("name").to_pylist()]
    assert table.column("label").to_pylist() == wanted
    classes = [{"label": number, "name": str(number)} for number in sorted(ids.values())]
    assert json.loads(table.schema.metadata[b"classes"]) == classes
    assert json.loads((tmp_path / "f.npy.manifest.json").read_text())["classes"] == classes
    with (tmp_path / "f.npy.rows.csv").open(newline="") as file:
        assert [int(row["label"]) for row in csv.DictReader(file)] == wanted
    assert cli.call("embed", "--model", mae.export, "--data", shapes, "--out", tmp_path / "n.parquet").code == 0
    named = json.loads(pq.read_schema(tmp_path / "n.parquet").metadata[b"classes"])
    assert named == [{"label": number, "name": name} for number, name in enumerate(("circle", "square", "triangle"))]


def test_a_list_of_data_sets_is_looked_at_before_any_feature(cli, mae, shapes, tmp_path):
    test = shutil.copytree(shapes, tmp_path / "test")
    (test / "circle").rename(test / "ring")
    for line, reason in ((f"a,{shapes},{test}", "class 'ring' does not occur"), ("a,nowhere", "no such file")):
        (tmp_path / "sets.csv").write_text(f"{line}\n")
        outcome = cli.call("evaluate", "--model", mae.export, "--data", shapes, "--protocols", "knn", "--transfer",
                           tmp_path / "sets.csv", "--cache", "off")  # fmt: skip
        assert (outcome.code, "features of" in outcome.err) == (2, False)
        assert reason in outcome.err


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\0\0", b'a,"' + b"x" * 200_000, b"", b"only\n"])
def test_damaged_lists_of_data_sets(cli, mae, shapes, tmp_path, content):
    (tmp_path / "sets.csv").write_bytes(content)
    outcome = cli.call("evaluate", "--model", mae.export, "--data", shapes, "--protocols", "knn", "--transfer",
                       tmp_path / "sets.csv", "--cache", "off")  # fmt: skip
    assert outcome.code == 2
    assert "sets.csv" in outcome.err.splitlines()[-1]
