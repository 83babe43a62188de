"""Programs beside the package ask it for names that it has: no test runs them all."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = [path for folder in ("benchmarks", "examples", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_the_names_that_a_program_imports_are_there(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mim_refiner"):
            module = importlib.import_module(node.module)
            for name in (each.name for each in node.names):
                if not hasattr(module, name):
                    importlib.import_module(f"{node.module}.{name}")
