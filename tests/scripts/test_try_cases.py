"""The cases taken from public bug reports end as they should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["checkpoints", "data"])
def test_cases(shared_dir: Path, part: str, forked_file: Callable[..., Any]) -> None:
    if not (shared_dir / "cases" / part).is_dir():
        pytest.skip(f"needs {shared_dir / 'cases' / part}")
    environment = {"MIM_REFINER_SHARED": str(shared_dir), "HF_HUB_OFFLINE": "1"}
    ((code, said, errors),) = forked_file(ROOT / "scripts" / "try_cases.py", [part], **environment)
    faults = [line for line in said.splitlines() if line.startswith("FAULT")]
    assert (faults, code) == ([], 0), errors[-2000:]
    assert "as they should be" in said
