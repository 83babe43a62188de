"""The cases of data taken from public bug reports, where they lie beside the repository."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CASES = Path(os.environ.get("MIM_REFINER_SHARED", ROOT.parent / "shared")) / "cases" / "data"


@pytest.mark.skipif(not CASES.is_dir(), reason=f"the cases are not here ({CASES})")
def test_every_case_of_data_ends_as_it_should(monkeypatch, tmp_path):
    monkeypatch.setenv("MIM_REFINER_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.setitem(sys.modules, "common", None)  # put back: the cases bring a module of this name
    from try_data import check

    faults = [f"{case}: {what}: {fault}" for case, what, fault in check(CASES, ()) if fault]
    assert not faults, "\n".join(faults)
