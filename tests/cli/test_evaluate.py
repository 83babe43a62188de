"""``evaluate`` through the command line: suites, several models, transfer lists, shifted sets, the cache."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from mim_refiner.evaluation.results import CONTRACT_FIELDS

FAST = ("linear.epochs=2", "linear.batch_size=8", "cluster_seeds=2", "low_shot.splits=2", "knn_k=3")


@pytest.fixture
def words(mae, shapes, cli):
    """The start of a command line, and the settings that make it quick."""
    settings = [word for setting in FAST for word in ("--set", setting)]
    return ["evaluate", "--model", mae.export, "--data", shapes, "--device", "cpu", *settings]


def test_a_suite_of_three_models_writes_numbers_and_tables(words, mae, refined, shapes, cli, tmp_path):
    other = shutil.copytree(mae.export, tmp_path / "copy")
    out = tmp_path / "out"
    extra = [
        "--compare",
        refined.path,
        "--compare",
        other,
        "--test",
        f"{shapes}[::2]",
        "--suite",
        "quick",
        "--out",
        out,
    ]
    outcome = cli.call(*words, *extra, "--json")
    assert outcome.code == 0, outcome.err
    summary = outcome.json
    metrics = {row["metric"] for row in summary["results"]}
    assert {"knn_top1", "linear_top1", "low_shot_1_top1", "cluster_accuracy", "silhouette", "rank"} <= metrics
    assert {row["model"] for row in summary["results"]} == {str(mae.export), str(refined.path), str(other)}
    same = [row for row in summary["change"] if row["model"] == str(other)]
    assert same
    assert all(row["difference"] == 0 and row["verdict"] == "no clear change" for row in same)
    assert summary["verdict"]["reason"].startswith("k-NN accuracy of block 2 (cls) ")
    assert summary["verdict"]["others"][str(other)]["verdict"] == "no clear change"
    recorded = json.loads((out / "evaluation" / "comparison.json").read_text())
    assert recorded["results"] == summary["results"]
    assert recorded["verdict"] == summary["verdict"]
    assert set(summary["seconds"][str(other)]) == {"features", "knn", "linear", "low_shot", "clustering", "rank"}
    for name in ("", "compare-", "compare2-"):
        record = json.loads((out / "evaluation" / f"{name}low_shot_1_top1-block02-cls.json").read_text())
        assert tuple(record) == CONTRACT_FIELDS
    table = (out / "results.md").read_text()
    assert table.count("\n") == len({(r["metric"], r["block"], r["pooling"]) for r in summary["results"]}) + 2
    assert "(+0.0)" in table
    assert (out / "results.tex").read_text().startswith("\\begin{tabular}")


def test_the_cache_is_used_by_the_second_run_and_shown(words, cli, tmp_path):
    extra = ["--protocols", "knn", "--cache", tmp_path / "cache", "--cache-size", "10MB", "--json"]
    first, second = (cli.call(*words, *extra) for _ in range(2))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    cache = first.json["feature_cache"]
    assert (cache["hits"], cache["misses"]) == (0, 6)  # three blocks (for the concatenation), two poolings
    assert second.json["feature_cache"]["hits"] == 6
    assert first.json["results"] == second.json["results"]
    off = cli.call(*words, "--protocols", "knn", "--cache", "off", "--json")
    assert off.json["results"] == first.json["results"]
    assert "feature_cache" not in off.json


def test_a_list_of_data_sets_gives_one_table(words, shapes, cli, tmp_path):
    sets = tmp_path / "sets.csv"
    sets.write_text(f"name,train,test\nall,{shapes},{shapes}[::3]\nhalf,{shapes}[::2]\n")
    outcome = cli.call(
        *words,
        "--protocols",
        "knn",
        "--pooling",
        "cls",
        "--set",
        "knn_last=0",
        "--transfer",
        sets,
        "--out",
        tmp_path,
        "--json",
    )
    assert outcome.code == 0, outcome.err
    rows = outcome.json["transfer"]
    assert [row["set"] for row in rows] == ["all", "half", "mean"]
    assert rows[2]["value"] == pytest.approx(np.mean([row["value"] for row in rows[:2]]))
    assert (tmp_path / "evaluation" / "transfer-half-knn_top1-block02-cls.json").exists()
    assert "| mean |" in (tmp_path / "transfer.md").read_text()


def test_shifted_sets_are_scored_beside_the_corruptions(words, shapes, cli, tmp_path):
    for kind in ("noise", "blur"):
        for severity in (1, 2):
            shutil.copytree(shapes, tmp_path / "c" / kind / str(severity))
    extra = ["--set", "robustness.kinds=contrast", "--set", "robustness.severities=[3]", "--pooling", "mean"]
    extra += ["--shifted", f"c={tmp_path / 'c'}", "--shifted", f"plain={shapes}", "--protocols", "robustness", "--json"]
    outcome = cli.call(*words, *extra)
    assert outcome.code == 0, outcome.err
    values = {row["metric"]: row["value"] for row in outcome.json["results"]}
    assert {"robustness_knn_top1", "robustness_linear_top1", "shift_c-noise-1_knn_top1"} <= set(values)
    assert values["shift_c-blur-2_linear_top1"] == values["shift_plain_linear_top1"]  # the same images


def test_published_lists_say_which_labels_are_used(words, shapes, cli, tmp_path):
    """Low-shot lists with as many images a class are splits of one number; a name that is not there is said."""
    classes = sorted(path.name for path in shapes.iterdir())
    lists = {"one/1imgs_class.txt": (["00.png"], []), "two/1imgs_class.txt": (["05"], ["lost_1.JPEG"]),
             "10percent.txt": (["01", "02", "03"], [])}  # fmt: skip
    for name, (endings, lost) in lists.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join([f"{each}-{ending}" for each in classes for ending in endings] + lost))
    one, two, ten = (str(tmp_path / name) for name in lists)
    extra = [
        "--test",
        f"{shapes}[::2]",
        "--protocols",
        "low_shot,finetune",
        "--pooling",
        "cls",
        "--out",
        tmp_path / "out",
    ]
    changes = [f"low_shot.split_files={one}, {two},{ten}", f"finetune.split_files={one},{ten}", "finetune.recipe=vit_h",
               "finetune.epochs=1"]  # fmt: skip
    outcome = cli.call(*words, *extra, *[word for change in changes for word in ("--set", change)], "--json")
    assert outcome.code == 0, outcome.err
    assert "two/1imgs_class.txt: 4 names, 3 found; 1 not found (first: lost_1.JPEG)" in outcome.err
    found = {row["metric"]: row["value"] for row in outcome.json["results"]}
    assert set(found) == {"low_shot_1_top1", "low_shot_3_top1", "finetune_1imgs-class_top1", "finetune_10percent_top1"}
    files = {
        path.name.partition("-block")[0]: json.loads(path.read_text()) for path in (tmp_path / "out").rglob("*.json")
    }
    low = files["low_shot_1_top1"]["settings"]
    assert (low["splits"], len(low["accuracy_by_split"]), len(low["split_files"])) == (2, 2, 2)
    tuned = files["finetune_10percent_top1"]["settings"]
    assert (tuned["train_images"], tuned["share"]) == (3 * len(classes), 9 / 48)
    assert (tuned["row"], tuned["drop_path"], tuned["epochs"]) == ("vit_h 10 %", 0.2, 1)  # what is set stays
    assert tuned["list"].endswith("10percent.txt: 9 names, 9 found")


@pytest.mark.parametrize(
    ("extra", "words_"),
    [
        (["--suite", "dense"], "no masks"),
        (["--protocols", "segmentation"], "no masks"),
        (["--protocols", "knnn"], "did you mean 'knn'"),
        (["--shifted", "nowhere"], "NAME=SRC"),
        (["--transfer", "missing.csv"], "missing.csv"),
        (["--cache-size", "many"], "like 5GB"),
        (["--set", "low_shot.shot=1"], "did you mean 'low_shot.shots'"),
        (["--protocols", "low_shot", "--set", "low_shot.split_files=a.txt"], "give --test"),
        (["--protocols", "finetune", "--set", "finetune.split_files=x/a.txt,x/a.txt"], "two lists are called x/a.txt"),
        (
            ["--protocols", "finetune", "--test", "{data}[::2]", "--set", "finetune.split_files=a.txt"],
            "a.txt: cannot be read",
        ),
        (["--protocols", "finetune", "--set", "finetune.recipe=published"], "nothing is published for an encoder of"),
        (["--protocols", "finetune", "--set", "finetune.recipe=vit_m"], "did you mean 'vit_"),
    ],
)
def test_bad_requests_are_one_line(words, shapes, cli, extra, words_):
    extra = [word.format(data=shapes) for word in extra]
    chosen = [] if "--protocols" in extra or "--suite" in extra else ["--protocols", "knn"]
    outcome = cli.call(*words, *chosen, *extra)
    assert outcome.code == 2
    assert words_ in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
