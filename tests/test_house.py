"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "mim_refiner"

MAX_FILE_LINES = 400  # most files have 100-300
MAX_FUNCTION_LINES = 80  # readable without scrolling
HEART = ("training", "models", "core")  # and there:
MAX_HEART_LINES, MAX_HEART_PARAMETERS = 60, 8  # beside self
MAX_REPOSITORY_FILE = 20_000_000  # bytes

# Folders of the machine that runs this, and of the one it was written on. The latter's separators are put on here, so
# that this file does not match itself.
HERE = [str(ROOT), *([f"{Path.home()}/"] if len(str(Path.home())) > 1 else [])]
PRIVATE_PATH = re.compile("|".join(re.escape(path) for path in (*HERE, *(f"/{name}/" for name in ("work", "root")))))
TEXT = {".py", ".md", ".toml", ".txt", ".sh", ".yaml", ".yml", ".json", ".html", ".cfg", ""}


def repository_files() -> list[Path]:
    """Every file that git tracks or would track."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout")
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_no_file_names_a_folder_of_one_machine():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in repository_files()
        if path.suffix in TEXT
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if PRIVATE_PATH.search(line)
    ]
    assert found == []


def test_no_large_file():
    large = [str(path.relative_to(ROOT)) for path in repository_files() if path.stat().st_size > MAX_REPOSITORY_FILE]
    assert large == []


def test_files_are_short():
    lengths = {path.relative_to(PACKAGE): len(path.read_text().splitlines()) for path in python_files()}
    assert {str(path): lines for path, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_functions_are_short():
    found = {}
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    found[f"{path.relative_to(PACKAGE)}:{node.name}"] = lines
    assert found == {}


def test_functions_of_the_heart_are_shorter_and_take_few_parameters():
    found = {}
    for path in (path for folder in HEART for path in sorted((PACKAGE / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines, given = (node.end_lineno or node.lineno) - node.lineno + 1, node.args
                names = [item.arg for item in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
                count = len(names) - (names[:1] in (["self"], ["cls"])) + bool(given.vararg) + bool(given.kwarg)
                if lines > MAX_HEART_LINES or count > MAX_HEART_PARAMETERS:
                    found[f"{path.relative_to(PACKAGE)}:{node.name}"] = (lines, count)
    assert found == {}


def test_every_module_says_what_it_is_for():
    silent = [
        str(path.relative_to(PACKAGE))
        for path in python_files()
        if path.read_text().strip() and ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert silent == []


def test_no_pickle_is_loaded_with_code():
    """``torch.load`` stands with ``weights_only=True`` and says where to; nothing loads pickles by another way."""
    unsafe = []
    told = "\n".join(path.read_text() for folder in ("src", "docs", "examples") for path in (ROOT / folder).rglob("*.*")
                     if path.suffix in (".j2", ".md", ".py"))  # fmt: skip
    calls = re.findall(r"torch\.load\((?!weights_only)(?:[^()]|\([^()]*\))*\)", told)
    unsafe += [call for call in calls if "cpu" not in call]  # else tensors go back to the device they were saved on
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "torch.load" and keywords.get("weights_only") != "True":
                unsafe.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {called}")
            if called in ("pickle.load", "pickle.loads", "yaml.load", "joblib.load", "eval", "exec"):
                unsafe.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {called}")
            if keywords.get("allow_pickle") == "True":
                unsafe.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {called}(allow_pickle=True)")
    assert unsafe == []


def test_layers():
    """The import-linter contract of pyproject.toml holds."""
    pytest.importorskip("importlinter")
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_constraints_are_plain_pins():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._]+", line) for line in lines)
    assert any(line.startswith("torch==") for line in lines)
    assert not any(line.startswith("mim-refiner") for line in lines)


def test_every_dependency_is_pinned():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["dev"], *extras["hf"], *extras["onnx"], *extras["tensorboard"]]
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    names = {re.split(r"[<>=!~ \[]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    assert names - pinned == {project["name"]}  # dev takes in the extras
