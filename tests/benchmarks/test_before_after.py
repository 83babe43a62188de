"""``benchmarks/before_after.py --dry-run``: this checkout beside itself, at toy size."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import before_after  # type: ignore[import-not-found]

    return before_after  # type: ignore[no-any-return]


def test_a_side_answers_with_seconds_and_only_in_its_own_checkout(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done: list[dict[str, Any]] = []
    monkeypatch.setattr(script, "Work", lambda options: SimpleNamespace(parts={"knn": lambda: done.append(options)}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("knn\nknn\n"))
    script.serve(str(ROOT), {"batch": 3})
    assert done == [{"batch": 3}] * 2
    assert all(float(line) >= 0 for line in capfd.readouterr().out.splitlines())
    (tmp_path / "src").mkdir()
    side = script.Side(tmp_path, script.TOY)
    with pytest.raises(SystemExit, match="ended; its error is above"):
        side.ask("knn")
    side.process.communicate()
    published = script.Side(tmp_path, script.TOY, published=True)
    with pytest.raises(SystemExit, match="ended; its error is above"):
        published.ask("knn")
    published.process.communicate()
    said = capfd.readouterr().err
    assert f"{tmp_path} is no checkout of the published code" in said
    assert f"is not of {tmp_path}" in said


def test_every_part_is_measured_in_turn_and_written_at_once(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, asked, written = script.Work(script.TOY | {"precision": "fp32"}), [], []
    file = tmp_path / "result.json"

    class Here:
        """A side in this process: the older one takes twice as long."""

        def __init__(self, root: Path, options: dict[str, Any], published: bool = False) -> None:
            self.old = root != ROOT
            assert options["batch"] == script.TOY["batch"]

        def ask(self, part: str) -> float:
            work.parts[part]()
            asked.append((part, self.old))
            written.append(list(json.loads(file.read_text())["parts"]) if file.exists() else [])
            return 2.0 if self.old else 1.0

        def close(self) -> None: ...

    monkeypatch.setattr(script, "Side", Here)
    script.main(["elsewhere", "--dry-run", "--rounds", "2", "--json", str(file)])
    result = json.loads(file.read_text())
    assert list(result["parts"]) == list(script.PARTS)
    assert set(work.parts) == set(script.PARTS)
    assert [old for part, old in asked if part == "knn"] == [False, True, True, False, False, True]
    assert written[-1] == list(script.PARTS)[:-1]
    for found in result["parts"].values():
        assert found["ratio"] == 2.0
        assert found["quartiles"] == [2.0, 2.0]
    assert {"model", "flags", "settings", "capability", "torch"} == set(result["machine"])
    assert "| knn | 2.000 | 1.000 | 2.00 | 2.00 to 2.00 |" in capsys.readouterr().out
    assert sys.path[0] == str(ROOT / "benchmarks")
