"""The documentation builds without warnings, and its pages fetch nothing from elsewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages; skipped where the extra ``docs`` is not installed."""
    pytest.importorskip("material", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    import subprocess

    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_is_built(site):
    for page in (ROOT / "docs").rglob("*.md"):
        relative = page.relative_to(ROOT / "docs").with_suffix("")
        built = site / relative.parent if relative.name == "index" else site / relative
        assert (built / "index.html").is_file(), relative


def test_nothing_is_fetched(site):
    fetching = re.compile(r"""(?:<(?:script|img|iframe|source)[^>]*\ssrc|<link[^>]*\shref)=["']?(?:https?:)?//""")
    found = [str(page.relative_to(site)) for page in site.rglob("*.html") if fetching.search(page.read_text())]
    assert found == []


def test_marks_of_the_tests_are_not_shown(site):
    shown = [
        str(page.relative_to(site))
        for page in site.rglob("*.html")
        if re.search("bash no-run|extra=", page.read_text())
    ]
    assert shown == []


def test_the_reference_has_signatures(site):
    text = (site / "api" / "index.html").read_text()
    for name in ("load_backbone", "nna_loss", "NeighborQueue", "refine", "doctor"):
        assert f'.{name}"' in text, name  # its anchor
    assert "temperature" in text


def test_every_verb_has_a_table_of_its_parameters(site):
    import inspect

    import mim_refiner

    text = (site / "api" / "index.html").read_text()
    verbs = re.findall(r"<!-- parameters of (\w+) -->", (ROOT / "docs" / "api.md").read_text())
    assert verbs == ["refine", "pretrain", "evaluate", "analyze", "embed", "export", "doctor", "report"]
    tables = [part.split("</table>")[0] for part in text.split("<th>parameter</th>")[1:]]
    assert len(tables) == len(verbs)
    for verb, table in zip(verbs, tables, strict=True):
        rows = [re.findall(r"<td>(.*?)</td>", row, re.DOTALL) for row in table.split("<tr>")[1:]]
        named = [row[0] for row in rows if row]
        assert named == [f"<code>{name}</code>" for name in inspect.signature(getattr(mim_refiner, verb)).parameters]
        assert all(row[3] for row in rows if row), verb  # says what it is


def test_the_page_of_the_command_line_has_every_verb_and_option():
    sys.path.insert(0, str(ROOT / "scripts"))
    from mkdocs_hooks import COMMAND_LINE, command_line

    sys.path.pop(0)
    from mim_refiner.cli.app import parser

    assert COMMAND_LINE in (ROOT / "docs" / "cli.md").read_text()
    text = command_line()
    for name, command in parser().commands.items():
        section = text.split(f"## {name}\n")[1].split("\n## ")[0]
        assert f"mim-refiner {name}" in section
        for option in command.params:
            assert f"`{(option.opts[0] if option.param_type_name == 'option' else option.metavar)}" in section
    assert "| `--model SRC` | Encoder: checkpoint file, timm folder or timm model name. | needed |" in text
