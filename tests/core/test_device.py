"""What the C allocator is told."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from mim_refiner.core.device import keep_freed_memory, pick_device, resolve_precision
from mim_refiner.core.launch import _own_device
from mim_refiner.core.processes import Place
from mim_refiner.errors import InputError


def test_freed_memory_is_kept_up_to_what_an_int_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *option: told.append(option)))
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    keep_freed_memory()
    assert told == [(-3, 2**30), (-1, 2**31 - 1)]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine with two GPUs; the devices that were made torch's own."""
    chosen: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    return chosen


def test_a_gpu_may_be_picked_by_number(gpus: list[torch.device]) -> None:
    assert [str(pick_device(name)) for name in ("auto", "cuda", "cuda:0", "cuda:1", "cpu")] == [
        "cuda", "cuda", "cuda:0", "cuda:1", "cpu"
    ]  # fmt: skip
    assert list(map(str, gpus)) == ["cuda:0", "cuda:1"]
    with pytest.raises(InputError, match=r"--device cuda:2: torch sees 2 GPU\(s\) here; use one of cuda:0 to cuda:1"):
        pick_device("cuda:2")


def test_several_processes_have_a_gpu_each(gpus: list[torch.device]) -> None:
    assert str(_own_device(torch.device("cuda"), Place(1, 2, 1))) == "cuda:1"
    with pytest.raises(InputError, match="use --device cuda"):
        _own_device(torch.device("cuda:1"), Place(1, 2, 1))


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7", "mps"])
def test_a_device_that_is_not_there_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(InputError, match=f"--device {name}: torch sees no .*; use --device cpu"):
        pick_device(name)


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:-1", "cuda:1.5", "cuda:1:2", "CUDA", "cuda:\u0661"])
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="unknown device; use auto, cpu, cuda, cuda:1"):
        pick_device(name)


def test_an_apple_gpu_is_taken_and_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert {resolve_precision(name, pick_device("mps")) for name in ("auto", "fast", "fp32")} == {"fp32"}
