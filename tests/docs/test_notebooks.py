"""The notebooks of the documentation run from top to bottom."""

from __future__ import annotations

import ast
import contextlib
import io
import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "docs" / "notebooks").glob("*.ipynb"))


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["loss", "refine", "which_block"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook: Path, tmp_path: Path):
    """Cells are plain Python, so one namespace in this process is all the kernel that they need."""
    import matplotlib.pyplot as plt

    names: dict[str, object] = {}
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()):
        for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
            if cell["cell_type"] == "code":
                tree = ast.parse("".join(cell["source"]))
                exec(compile(tree, f"{notebook.name}, cell {number}", "exec"), names)
    plt.close("all")
