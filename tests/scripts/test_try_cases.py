"""The cases taken from public bug reports end as they should."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["checkpoints", "data"])
def test_cases(shared_dir: Path, part: str) -> None:
    if not (shared_dir / "cases" / part).is_dir():
        pytest.skip(f"needs {shared_dir / 'cases' / part}")
    environment = os.environ | {"MIM_REFINER_SHARED": str(shared_dir), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "try_cases.py"), part]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    faults = [line for line in done.stdout.splitlines() if line.startswith("FAULT")]
    assert (faults, done.returncode) == ([], 0), done.stderr[-2000:]
    assert "as they should be" in done.stdout
