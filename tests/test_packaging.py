"""What travels with the package, and the files around it that name its parts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from mim_refiner import __version__

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements() -> list[Requirement]:
    """All of them, extras too, without our own extras named by others."""
    listed = [*PROJECT["project"]["dependencies"]]
    for extra in PROJECT["project"]["optional-dependencies"].values():
        listed += extra
    return [Requirement(text) for text in listed if not text.startswith("mim-refiner[")]


def test_every_dependency_has_a_lower_bound_and_no_upper_one():
    for requirement in requirements():
        operators = [specifier.operator for specifier in requirement.specifier]
        assert operators == [">="], requirement


def test_the_pinned_set_is_within_the_ranges():
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    for requirement in requirements():
        version = pinned.get(requirement.name.lower().replace("_", "-"))
        assert version is None or requirement.specifier.contains(version, prereleases=True), (requirement, version)


def test_what_the_package_reads_is_packed():
    """Everything that is no Python file lies where the wheel takes it along."""
    package = ROOT / "src" / "mim_refiner"
    found = {path.relative_to(package).parts[0] for path in package.rglob("*") if path.suffix not in (".py", ".pyc")
             and path.is_file()}  # fmt: skip
    assert found == {"assets", "export", "py.typed", "report"}
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["src/mim_refiner"]


def test_the_source_distribution_names_files_that_exist():
    for name in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        assert (ROOT / name).exists(), name


def test_both_ways_to_start():
    done = subprocess.run([sys.executable, "-m", "mim_refiner", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, __version__)
    [script] = [point for point in entry_points(group="console_scripts") if point.name == "mim-refiner"]
    assert script.value == "mim_refiner.cli.app:main"


@pytest.mark.parametrize(
    ("typed", "expected"), [("mim-refiner ref", "refine"), ("mim-refiner refine --eval-t", "--eval-test")]
)
def test_the_shell_completes(typed, expected):
    words = typed.split()
    environment = {
        **os.environ,
        "_MIM_REFINER_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(words) - 1),
    }
    code = "import sys; sys.argv = ['mim-refiner']; from mim_refiner.cli.app import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert expected in done.stdout.split(), done.stderr


def test_the_citation_has_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] == PROJECT["project"]["license"]


def test_the_image_is_made_of_files_that_reach_the_builder():
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and line[0] != "#"]
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in lines:
        if line.startswith("COPY "):
            sources = line.split()[1:-1]
            assert set(sources) <= kept, line
            assert all((ROOT / source).exists() for source in sources), line
    words = [line.split()[0] for line in lines]
    assert words[0] == "FROM"
    assert "ADD" not in words
    assert words.index("USER") < words.index("ENTRYPOINT")  # not as root
    assert "RUN useradd --uid 1000 --create-home refiner" in lines
    assert "USER 1000" in lines


def test_the_workflow_runs_the_gate_on_every_python():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    gate = workflow["jobs"]["gate"]
    assert {"run": ".ci/run"} in gate["steps"]
    wanted = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["project"]["classifiers"]))
    assert gate["strategy"]["matrix"]["python"] == wanted
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            for target in re.findall(r"make ([a-z-]+)", step.get("run", "")):
                assert target in targets


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
