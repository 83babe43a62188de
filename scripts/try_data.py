"""The cases of data as people have it: the commands a user would type, and what must come of each.

Right is: the same numbers as for the sound layout of the same pictures, or one true line with exit code 2; and every
picture that is not read is counted and named.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import runpy
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq

from mim_refiner.cli.app import main
from mim_refiner.data.name_lists import without_listed
from mim_refiner.data.sources import open_source

EVALUATE = "evaluate --model {encoder} --protocols knn --pooling cls --cache off --device cpu"
DENSE = (
    "evaluate --model {encoder} --suite dense --cache off --device cpu --set segmentation.epochs=2 "
    "--set segmentation.stride=1 --set segmentation.short_side=32"
)
SMALL = "--set decoder_dim=16 --set decoder_depth=1 --set knn_every=0"
PRETRAIN = f"pretrain --arch vit_w32_d2_h2_p8 --set image_size=32 --set training.epochs=1 --set batch_size=16 {SMALL}"


@dataclass(frozen=True)
class Trial:
    """One command line, run in the folder of the case; ``{out}`` is a fresh path.

    ``code``: the exit code. ``says``: patterns that stderr holds; with code 2 it is one error line, which holds all.
    ``same_as``: another command line that must give the same results. ``holds``: {key: value} of the JSON result, keys
    joined by dots.
    """

    command: str
    code: int = 0
    says: tuple[str, ...] = ()
    same_as: str = ""
    holds: Mapping[str, Any] | None = None


def measured(data: str, *says: str, like: str = "", **holds: Any) -> Trial:
    """k-NN on ``data`` ("train --test test") gives the numbers that the sound layout ``like`` gives."""
    facts = {key.replace("__", "."): value for key, value in holds.items()}
    return Trial(f"{EVALUATE} --data {data}", 0, says, f"{EVALUATE} --data {like}" if like else "", facts)


def refused(data: str, *says: str, verb: str = EVALUATE) -> Trial:
    """A command on ``data`` ends in one line that holds all of ``says``."""
    return Trial(f"{verb} --data {data}", 2, says)


def masked(kind: str, *says: str, like: str = "") -> Trial:
    """Segmentation on images of ``kind`` gives what that on ``like`` gives, or ends in a line that holds ``says``."""

    def command(kind: str) -> str:
        images = "image" if kind == "same-names" else "images"
        folder = "same" if kind == "same-names" else kind
        return f"{DENSE} --data {folder}/train/{images}[:8] --test {folder}/test/{images}[:6]"

    return Trial(command(kind), 2 if says else 0, says, command(like) if like else "")


def looked(data: str, *says: str, **holds: Any) -> Trial:
    """``doctor`` looks at ``data``."""
    return Trial(f"doctor --data {data}", 0, says, "", {key.replace("__", "."): value for key, value in holds.items()})


def trained(data: str, *says: str) -> Trial:
    """``pretrain`` runs to its end on ``data``."""
    return Trial(f"{PRETRAIN} --data {data} --out {{out}}", 0, says)


ODD_FOLDERS = (
    "photos #2",
    "shots[2024]",
    "a,b",
    "x{{1}}",
    "~old",
    "trail ",
    "photos #2/c*/*.jpg",
    "shots[2024]/c*/*.jpg",
)
SOUND_LISTS = ("semicolon.csv", "tab.tsv", "tab.csv", "quoted.csv", "pandas_index.csv", "spaces.csv", "utf16.csv")

CASES: dict[str, list[Trial]] = {
    "01": [measured("train/list.csv --test test/list.csv", like="good/list.csv --test test/list.csv"),
           looked("train/list.csv", classes__classes=20, images=100, to_exclude=0)],
    "03": [*(refused(f"train/{name}.csv --test test/{name}.csv", f"column '{name}' is not read", "rename it to 'label'")
             for name in ("class", "target", "labels")),
           looked("train/class.csv", "column 'class' is not read as labels")],
    "04": [*(measured(name, like="comma.csv") for name in SOUND_LISTS),
           refused("nan.csv", "row 8 has no label", "fill it in"), measured("floats.csv", data__train__classes=5)],
    "05": [measured("label_first.csv", like="id_first.csv", data__train__classes=5)],
    "07": [refused("flat", "holds the splits train, val", "#train"), refused("nested", "holds the splits train, val"),
           refused("flat", "holds the splits train, val", verb="doctor"),
           measured("nested#train --test nested#val", like="nested/train --test nested/val", data__train__classes=5)],
    "08": [refused("stray", "no labels", r"1 of \d+ images", "outside the class folders", "preview.png"),
           refused("sub", "no labels", r"1 of \d+ images", "deeper", "extra/0003.jpg"),
           looked("stray", "no labels", "preview.png")],
    "09": [*(measured(f"{name}.parquet", like="hf_struct.parquet", data__train__classes=5)
             for name in ("dictionary", "dictionary_int", "string_view", "hf_path_only", "fixed", "img", "binary_view",
                          "string_path", "Image_upper")),
           refused("jpg.parquet", "column 'cls' is not read as labels; rename it to 'label'")],
    "11": [measured("'train-*.parquet'", data__train__classes=5, data__train__images=108),
           measured("extra", "left out .*1 column .*note"), refused("half", "1 of 2 parts have none"),
           looked("half", "no labels: 1 of 2 parts")],
    "12": [refused("null.parquet", "row 7 has no label"), refused("float_nan.parquet", "row 7 has no label"),
           measured("float.parquet", like="uint64.parquet"), measured("bool.parquet", data__train__classes=2),
           refused("onehot.parquet", "lists"), measured("gaps.parquet", like="uint64.parquet"),
           measured("huge.parquet", like="uint64.parquet"), refused("minus1.parquet", "row 7", "-1"),
           refused("allminus1.parquet", "every label is -1"), refused("beyond.parquet", "label 3", "3 class names"),
           measured("nullim.parquet", "1 of 60 images .*cannot be read", data__train__unreadable__count=1),
           measured("intstrings.parquet", like="uint64.parquet"), refused("unicode.parquet", "row 48 has no label")],
    "13": [measured("unsorted.tar", like="sorted.tar", data__train__classes=10),
           refused("folders.tar", "no labels", r"\.cls or \.json"), looked("unsorted.tar", classes__classes=10)],
    "14": [measured(f"{name}.tar", like="none.tar", data__train__images=120) for name in ("half", "all")],
    "16": [measured("names.npz", like="bytes.npz"), measured("bool.npz", data__train__classes=2),
           measured("n1.npz", like="bytes.npz"), refused("nan.npz", "row 3 has no label"),
           refused("half.npz", "row 0 has the label 0.5", "fraction"), refused("onehot.npz", r"\(120, 10\)"),
           refused("nolabels.npz", "no array 'labels' or 'y'"), refused("target.npz", "'targets' is not read"),
           *(refused(f"{name}.npz", name) for name in ("object", "keras", "positional", "broken", "cut", "medmnist"))],
    "17": [*(refused(kind, "float values; save it as uint8 or uint16") for kind in ("f01", "f255")),
           refused("i32", "32-bit signed values"), measured("u8", data__train__unreadable__count=0)],
    "19": [measured("phone", r"left out of folder .*40 \.heic", data__train__images=160),
           refused("noext", "none of its files is an image", "200 without"),
           looked("phone", r"40 \.heic", classes__classes=10)],
    "20": [measured(kind, data__train__unreadable__count=0) for kind in ("strip", "line")],
    "21": [looked("one")],
    "22": [Trial(f"{DENSE} --data train/images --test test/images", 2, ("masks hold only 0 and 255; 255 is ignored",)),
           Trial(f"{DENSE} --data train01/images --test test01/images")],
    "23": [*(masked(kind, like="plain") for kind in ("palette", "b16", "rgbgrey", "suffix", "same-names")),
           *(masked(kind) for kind in ("halfsize", "onebit", "newclass")),
           masked("rgb", "0000.png", "colours"), masked("jpeg", "0000.png", "JPEG"), masked("missing", "0006.png"),
           masked("allignored", "masks hold only 255"), masked("rotated", "180x240", "240x180")],
    "27": [masked("maskdouble", like="same"), masked("maskhalf")],
    "28": [*(measured(f"train{ten}.parquet --test test{ten}.parquet", data__train__classes=5) for ten in ("", "10")),
           Trial(f"{EVALUATE} --data train10.parquet --test test10.parquet --protocols linear --set linear.epochs=2 "
                 "--set linear.last=1", same_as=f"{EVALUATE} --data train.parquet --test test.parquet "
                 "--protocols linear --set linear.epochs=2 --set linear.last=1"),
           looked("train10.parquet", classes__classes=5), trained("train10.parquet")],
    "30": [looked(".", to_exclude=1),
           Trial("embed --model {encoder} --data . --out {out}.parquet", 0, ("1 of 100 .*cannot be read .*no row",)),
           Trial("doctor --data . --out {out}", 0), measured(".", "1 of 100 images"), trained(".", "skipped 1")],
    "32": [measured(".", "1 folder cannot be opened .*c2", data__train__classes=4)],
    "46": [measured("x.parquet", data__train__images=60, data__train__classes=5),
           measured("empty.parquet", "1 parquet file without rows", like="x.parquet"),
           measured("hive", data__train__classes=5, data__train__images=60)],
    "47": [
        *(measured(f"'{name}'", data__train__images=120, data__train__classes=10) for name in ODD_FOLDERS),
        *(measured(f"'{name}[:40]'", data__train__images=40, data__train__classes=4) for name in ODD_FOLDERS[1:3]),
        refused("'shots[2024]/c0'", "no labels"),
    ],
    "53": [measured("train --test test", data__test__classes=5),
           measured("list.csv", data__train__unreadable__count=0)],
    "55": [refused("a --test a", "the test images are the training images"),
           refused("a --test copy", "the test images are the training images")],
    "58": [measured(". --out {out}", data__train__classes=5)],
    "59": [*(trained(f"{name}.parquet", f"no labels: .*{why}") for name, why in
             (("null", "row 1 has no label"), ("multi", "lists"), ("stl", "-1"))),
           trained("float.parquet"), trained("labelled.parquet,unlabelled.parquet", "no labels: 1 of 2 parts"),
           Trial("embed --model {encoder} --data stl.parquet --out {out}.npy", 0, ("no labels: .*-1",)),
           looked("null.parquet", "no labels: row 1 has no label")],
    "62": [refused("train --test test", "class 'c4' does not occur")],
    "63": [measured(". --out {out}", "3 of 97 images .*cannot be read", data__train__unreadable__count=3),
           Trial("analyze --model {encoder} --data . --out {out} --parts verdict --cache off", 0,
                 ("3 of 97 images .*cannot be read",), holds={"data.train.unreadable.count": 3})],
}  # fmt: skip


_read_once = functools.lru_cache(4)(pq.read_table)  # most cases are made of the same images


def check(cases: Path, names: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Make every case in a temporary folder and try it; yields (case, what, fault or "")."""
    with (
        tempfile.TemporaryDirectory(prefix="encoder-") as made,
        mock.patch.dict(os.environ, {"MIM_REFINER_CACHE": f"{made}/cache"}),
    ):
        encoder = _small_encoder(Path(made))
        for folder in sorted(path.parent for path in cases.glob("*/make.py")):
            if not names or folder.name.startswith(tuple(names)):
                yield from _tried(folder, encoder)


def _small_encoder(folder: Path) -> str:
    """A tiny encoder that has learnt next to nothing: cases compare layouts, not encoders."""
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), dtype=np.uint8)
    (folder / "case").mkdir()
    np.savez(folder / "case" / "noise.npz", images=images)
    code, result, err = _run(f"{PRETRAIN} --data noise.npz --out {{out}}", folder, 0, "")
    if code:
        raise RuntimeError(err)
    return str(result["export"])


def _tried(folder: Path, encoder: str) -> Iterator[tuple[str, str, str]]:
    number = folder.name[:2]
    with tempfile.TemporaryDirectory(prefix="case-", ignore_cleanup_errors=True) as scratch:
        if number in CASES or number == "24":
            _make(folder / "make.py", Path(scratch) / "case")
        results: dict[str, Any] = {}
        for place, trial in enumerate(CASES.get(number, ())):
            if number == "32" and os.geteuid() == 0:
                yield folder.name, f"skipped, as root may read every folder: {trial.command}", ""
                continue
            yield folder.name, trial.command, _fault(trial, Path(scratch), place, results, encoder)
        if number == "24":
            yield folder.name, "doctor's list drops what it lists", _excluded(Path(scratch))
        for path in Path(scratch).rglob("*"):
            if path.is_dir():
                path.chmod(0o700)


def _fault(trial: Trial, scratch: Path, number: int, results: dict[str, Any], encoder: str) -> str:
    code, result, err = _run(trial.command, scratch, number, encoder)
    if code != trial.code:
        return f"exit code {code}: {err[-300:]}"
    if "site-packages" in err:
        return f"a library's warning reaches the user: {err[-300:]}"
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    if code == 2 and (len(lines) != 1 or err.splitlines()[-1] != lines[0]):
        return f"no single error line at the end: {err[-300:]}"
    missing = [pattern for pattern in trial.says if not re.search(pattern, lines[0] if code == 2 else err)]
    if missing:
        return f"'{missing[0]}' is not said: {err[-400:]}"
    for key, value in (trial.holds or {}).items():
        found = result
        for part in key.split("."):
            found = found[part]
        if found != value:
            return f"{key} is {found}, not {value}"
    if trial.same_as:
        if trial.same_as not in results:
            results[trial.same_as] = _run(trial.same_as, scratch, 1000 + number, encoder)
        _, wanted, other = results[trial.same_as]
        if not wanted or result["results"] != wanted["results"]:
            return f"other numbers than of the sound layout: {_values(result)}, {_values(wanted)} {other[-200:]}"
    return ""


def _run(command: str, scratch: Path, number: int, encoder: str) -> tuple[int, dict[str, Any], str]:
    """(exit code, JSON result, stderr) of a command line in the folder of the case."""
    words = shlex.split(command.format(out=scratch / f"out-{number}", encoder=encoder))
    out, err, before = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(scratch / "case")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([*words, "--json"])
    finally:
        os.chdir(before)
    return code, json.loads(out.getvalue() or "{}"), err.getvalue()


def _values(result: Mapping[str, Any]) -> list[float]:
    return [row["value"] for row in result.get("results", ())]


def _excluded(scratch: Path) -> str:
    """Case 24: the source without doctor's list holds all but the images that the list names."""
    code, result, err = _run("doctor --data . --out {out}", scratch, 0, "")
    listed = {row["index"] for row in result.get("findings", ()) if row["exclude"]}
    if code or not listed:
        return f"exit code {code}, {len(listed)} listed: {err[-200:]}"
    source = open_source(scratch / "case")
    kept = without_listed(source, scratch / "out-0" / "exclude.txt")
    dropped = set(range(len(source))) - set(np.asarray(kept.indices).tolist())
    return "" if dropped == listed else f"drops {sorted(dropped)} where {sorted(listed)} are listed"


def _make(script: Path, target: Path) -> None:
    arguments = sys.argv
    sys.argv = [str(script), str(target)]
    sys.path.insert(0, str(script.parents[1]))
    sys.modules.pop("common", None)  # each part of the cases has its own
    try:
        quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with quiet[0], quiet[1], mock.patch.object(pq, "read_table", _read_once):
            try:
                runpy.run_path(str(script), run_name="__main__")
            except IndexError:  # five names of classes for pictures of ten
                by_class = sys.modules["common"].by_class
                by_class.__defaults__, kept = (5, 0), by_class.__defaults__
                runpy.run_path(str(script), run_name="__main__")
                by_class.__defaults__ = kept
    finally:
        sys.argv = arguments
        sys.path.remove(str(script.parents[1]))
