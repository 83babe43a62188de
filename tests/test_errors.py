"""Every message that the package raises on purpose says what to do, and near misses are named."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

import pytest

from mim_refiner import errors
from mim_refiner.errors import MimRefinerError, did_you_mean, install, nearest_path

PACKAGE = Path(errors.__file__).parent
ERRORS = {
    name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, MimRefinerError)
}

# Texts composed elsewhere and checked there: the worker's error, and the reasons that store.py words.
PASSED_ON = {
    "view '{self.name}': {'; '.join(problems)}",
    "{batch}",  # the words of a loader process that failed
    "{problem}",
    "{cause.text}",
    # texts that end in advice where they are made
    "{contents.source}: is {what}",
    "{source}: {heads_question(converted.arguments)}",
    "{path}: {_what_it_is(path)}",
    "{report.problem}",
    "--eval-data: {bank.description}: {error}",
}

# What to do: an instruction after a semicolon, or the allowed values. Words that an instruction begins with.
VERBS = (
    "add|ask|average|call|change|check|choose|close|continue|convert|copy|correct|cut|delete|did you mean|download|get|"
    "end|evaluate|fill|finish|free|give|install|keep|leave|load|lower|make|mend|merge|move|name|normalise|open|pass|"
    "permute|pick|pip|put|quote|"
    "raise|remove|rename|repair|report|rerun|run|save|say|see|set|shorten|show|shrink|stay|start|"
    "store|take|try|unpack|update|use|"
    "widen|write"
)
ADVICE = re.compile(
    rf"[;:(,] ?(?:\{{\w+\}})?(?:(?:or|and|first|then|please|to) )*(?:{VERBS})\b"  # "...; give a folder with images"
    r"|\b(?:must|needs?|has to|at least|at most|out of range)\b"  # "k must be between 1 and 10, got 12"
    r"|\{[^}]*(?:advice|hint|did_you_mean|nearest_path|close|remedy|choose)[^}]*\}"  # a computed suggestion
)


def text_of(node: ast.expr, constants: Mapping[str, str] = MappingProxyType({})) -> str:
    """The text of a message; what is filled in stands in braces, but for the texts that the module itself names."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, constants) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left, constants) + text_of(node.right, constants)
    name = ast.unparse(node.value if isinstance(node, ast.FormattedValue) else node)
    return constants.get(name, "{" + name + "}")


def named_texts(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name, text) of the constants of a module."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield ast.unparse(node.targets[0]), node.value.value


@functools.cache
def messages() -> list[tuple[str, str]]:
    """(where, text) of every error of ours that the package builds."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        constants = dict(named_texts(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ERRORS and node.args:
                found.append((f"{path.relative_to(PACKAGE)}:{node.lineno}", text_of(node.args[0], constants)))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "errors_as":
                problem, remedy = (text_of(part, constants) for part in node.args[1:3])
                found.append((f"{path.relative_to(PACKAGE)}:{node.lineno}", f"{problem}; {remedy}"))
            for remedy in remedies(node):
                found.append((f"{path.relative_to(PACKAGE)}:{node.lineno}", f"; {text_of(remedy, constants)}"))
    return found


def remedies(node: ast.AST) -> Iterator[ast.expr]:
    """What a statement calls ``remedy``, for a message built after it; and what ``reading`` is told to advise."""
    if isinstance(node, ast.Assign):
        target, value = node.targets[0], node.value
        several = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
        pairs = zip(target.elts, value.elts, strict=False) if several else [(target, value)]
        texts = [text for name, text in pairs if ast.unparse(name) == "remedy"]
        yield from (
            arm for text in texts for arm in ([text.body, text.orelse] if isinstance(text, ast.IfExp) else [text])
        )
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "reading" and len(node.args) > 1:
        yield node.args[1]


def test_every_message_says_what_to_do():
    found = messages()
    assert len(found) > 100
    silent = [f"{where}: {text}" for where, text in found if text not in PASSED_ON and not ADVICE.search(text)]
    assert silent == []
    assert {text for _, text in found} >= PASSED_ON  # no entry without its message


def test_every_message_is_one_line_and_no_shout():
    bad = [f"{where}: {text}" for where, text in messages() if "\n" in text or text.rstrip().endswith("!")]
    assert bad == []


def test_a_message_without_advice_is_caught():
    assert not ADVICE.search("photos: the folder is empty")
    assert ADVICE.search("photos: the folder is empty; give one with images")


def test_near_misses_are_named():
    assert did_you_mean("refin", ["refine", "report"]) == "; did you mean 'refine'?"
    assert did_you_mean("xyz", ["refine"]) == ""


def test_mistyped_paths_are_named(tmp_path, monkeypatch):
    (tmp_path / "photos" / "train").mkdir(parents=True)
    (tmp_path / "mae.pth").touch()
    assert nearest_path(f"{tmp_path}/mae.pht") == f"; did you mean '{tmp_path}/mae.pth'?"
    assert nearest_path(f"{tmp_path}/fotos/train") == f"; did you mean '{tmp_path}/photos/train'?"
    assert nearest_path(f"{tmp_path}/photos/trian/") == f"; did you mean '{tmp_path}/photos/train'?"
    assert nearest_path(f"{tmp_path}/nothing/like/it") == ""
    monkeypatch.chdir(tmp_path)
    assert nearest_path("photo") == "; did you mean 'photos'?"
    assert nearest_path("") == ""


@pytest.mark.parametrize("kind", ["data", "model"])
def test_sources_name_the_nearest_path(kind, tmp_path):
    from mim_refiner.checkpoints.load import load_backbone
    from mim_refiner.data.sources import open_source

    (tmp_path / "photos").mkdir()
    with pytest.raises(MimRefinerError, match=r"no such file or folder; did you mean '.*photos'\?"):
        (open_source if kind == "data" else load_backbone)(f"{tmp_path}/potos")


@pytest.mark.parametrize(
    ("found", "begins"), [(object(), f"{sys.executable} -m pip install "), (None, "uv pip install --python ")]
)
def test_extras_are_installed_by_what_is_there(monkeypatch: pytest.MonkeyPatch, found: object, begins: str) -> None:
    monkeypatch.setattr(errors.PathFinder, "find_spec", lambda name: found)
    assert install("onnx").startswith(begins)
    assert sys.executable in install("onnx")
    assert install("onnx").endswith("'mim-refiner[onnx]'")


@pytest.mark.skipif(find_spec("setuptools") is None, reason="needs setuptools")
def test_a_look_for_pip_leaves_distutils_to_setuptools() -> None:
    """A look through importlib.util.find_spec turns it off, and torch's compiler fails in an assertion."""
    code = (
        "from mim_refiner.errors import install; install('onnx'); import setuptools, distutils.core; "
        "assert '_distutils' in distutils.core.__file__"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
