"""Fixtures for all tests: one thread, fixed seeds, and where the reference vectors lie."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy, scikit-learn and torch load their thread pools
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("MIM_REFINER_CACHE", "off")  # tests of the cache name a folder of their own

import random
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
