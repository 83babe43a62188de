"""Fixtures for all tests: one thread, fixed seeds, and where the reference vectors lie."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy, scikit-learn and torch load their thread pools
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("MIM_REFINER_CACHE", "off")  # tests of the cache name a folder of their own

import json
import random
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

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


class Forked:
    """Processes that run together, forks of one that has everything imported; of one process also its Popen methods."""

    def __init__(self, server: subprocess.Popen[bytes], folder: Path, processes: Sequence[dict[str, Any]]) -> None:
        assert server.stdin is not None
        folder.mkdir(exist_ok=True)
        self._server, self._folder, self._codes = server, folder, None
        server.stdin.write(json.dumps({"folder": str(folder), "processes": processes}).encode() + b"\n")
        self.pid, *_ = self.pids = self._answer()

    def _answer(self) -> list[Any]:
        line = self._server.stdout.readline()  # type: ignore[union-attr]
        assert line, "the fork server has ended"
        return json.loads(line)

    def wait(self) -> list[int | None]:
        """Exit codes by rank."""
        self._codes = self._codes or self._answer()
        return self._codes

    def said(self, rank: int = 0) -> tuple[str, str]:
        """Stdout and stderr of one of them."""
        out, err = ((self._folder / f"{rank}.{stream}").read_text(errors="replace") for stream in ("out", "err"))
        return out, err

    def poll(self) -> int | None:
        return self.wait()[0] if self._codes or select.select([self._server.stdout], [], [], 0)[0] else None

    def communicate(self) -> tuple[str, str]:
        self.wait()
        return self.said()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def returncode(self) -> int | None:
        return self.wait()[0]


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Forked]]:
    """``forked(code, count, folder, **environment)``: Python code in ``count`` processes; "{rank}" in it is theirs."""
    servers: list[subprocess.Popen[bytes]] = []

    def start(code: str, count: int = 1, folder: Path | None = None, **environment: object) -> Forked:
        if not servers:
            command = [sys.executable, str(_TESTS / "fork_server.py")]
            first = {"PYTHONPATH": os.pathsep.join(sys.path), "TORCH_CPP_LOG_LEVEL": "FATAL"}  # read as torch is loaded
            servers.append(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env={**os.environ, **first}
                )
            )
        given = {**os.environ, "TERM": "dumb", "MIM_REFINER_DEBUG": "", "GLOO_SOCKET_IFNAME": "lo"}
        given |= {name: str(value) for name, value in environment.items()}
        processes = [{"code": code.replace("{rank}", str(rank)), "environment": given} for rank in range(count)]
        return Forked(servers[0], folder or tmp_path_factory.mktemp("said"), processes)

    yield start
    for server in servers:
        server.kill()
        server.communicate()


@pytest.fixture(scope="session")
def forked_file(forked: Callable[..., Forked]) -> Callable[..., list[tuple[int | None, str, str]]]:
    """``forked_file(script, words, count, **environment)``: (code, stdout, stderr) of each of ``count`` processes."""

    def run(script: Path, words: Sequence[object], count: int = 1, **environment: object) -> Any:
        code = f"import runpy, sys\nsys.argv = {[str(script), *map(str, words)]!r}\n"
        code += f"sys.path.insert(0, {str(script.parent)!r})\nrunpy.run_path(sys.argv[0], run_name='__main__')"
        started = forked(code, count, **environment)
        return [(code, *started.said(rank)) for rank, code in enumerate(started.wait())]

    return run


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
