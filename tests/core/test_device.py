"""What the C allocator is told."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from mim_refiner.core.device import keep_freed_memory


def test_freed_memory_is_kept_up_to_what_an_int_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *option: told.append(option)))
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    keep_freed_memory()
    assert told == [(-3, 2**30), (-1, 2**31 - 1)]
