"""Fixtures for all tests: one thread, fixed seeds, and where the reference vectors lie."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy, scikit-learn and torch load their thread pools
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("MIM_REFINER_CACHE", "off")  # tests of the cache name a folder of their own

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

_TESTS = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    """One thread and the same seeds for every test: results do not depend on the order of tests or on the machine."""
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of the golden vectors that travel with the repository (see its README)."""
    return _TESTS / "golden"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with the full golden vectors and data sets; the test is skipped where it does not exist.

    Path: environment variable MIM_REFINER_SHARED, else ``shared`` beside the repository.
    """
    path = Path(os.environ.get("MIM_REFINER_SHARED", _TESTS.parent.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"needs the shared folder with golden vectors and data; {path} does not exist")
    return path


@pytest.fixture(scope="session")
def fuzz_rounds() -> int:
    """How many damaged inputs of each kind the fuzzers try: few in ``make test``, many in ``make fuzz``."""
    return int(os.environ.get("MIM_REFINER_FUZZ", "40"))


@pytest.fixture(scope="session")
def damaged() -> Callable[[bytes, np.random.Generator], bytes]:
    """Cut off, zeroed, with bytes or numbers changed, with a part doubled or left out: as disks and foes do it."""
    numbers = [b"null", b"[]", b"-1", b"1e999", b'"x"', b"9" * 5000, b"[" * 5000, b"\0"]

    def damage(content: bytes, generator: np.random.Generator) -> bytes:
        size, changed, way = len(content), bytearray(content), int(generator.integers(0, 6))
        start, stop = sorted(generator.integers(0, size + 1, 2).tolist())
        digits = [at for at, byte in enumerate(content) if byte in b"0123456789"]
        if way == 0:
            return content[:start]
        if way == 1:
            changed[start : start + 40] = bytes(len(changed[start : start + 40]))
        elif way == 2:
            for position in generator.integers(0, size, 4):
                changed[position] = int(generator.integers(0, 256))
        elif way == 3:
            return content[:start] + content[stop:]
        elif way == 4:
            return content[:stop] + content[start:]
        elif digits:
            at = int(generator.choice(digits))
            changed[at : at + 1] = numbers[int(generator.integers(0, len(numbers)))]
        return bytes(changed)

    return damage
