"""Device, precision, and the C allocator's settings."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mim_refiner.errors import InputError
from mim_refiner.reporting import resident_bytes

FIRST_STEPS = 1.4e8  # bytes: kernels and buffers, decoders, traces, gaps of the heap (measured: docs/scale.md)


def pick_device(name: str) -> torch.device:
    """``auto`` takes the (first) GPU of CUDA when there is one. Raises InputError for unknown or absent devices."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", name):
        raise InputError(f"--device {name[:60]!r}: unknown device; use auto, cpu, cuda, cuda:1 (any number) or mps")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: torch sees no Apple GPU here; use --device cpu, or auto")
    if name.startswith("cuda") and not count:
        raise InputError(
            f"--device {name}: torch sees no GPU here; use --device cpu, or install a driver and a CUDA build of torch"
        )
    device = torch.device(name if name != "auto" else "cuda" if count else "cpu")
    if (device.index or 0) >= max(1, count):
        raise InputError(f"--device {name}: torch sees {count} GPU(s) here; use one of cuda:0 to cuda:{count - 1}")
    if device.index is not None:
        torch.cuda.set_device(device)  # of what asks for no device
    if device.type == "cpu":
        keep_freed_memory()
        process_bytes()
    return device


@cache
def process_bytes() -> int:
    """What Python and its libraries take of the host in this process, in tenths of a GB: what is resident when a device
    is first picked, and what the first steps load. 0 where the system does not tell.
    """
    held = resident_bytes()
    return round((held + FIRST_STEPS) / 1e8) * 10**8 if held else 0


def keep_freed_memory() -> None:
    """Tell glibc to reuse large freed blocks: activations come and go each step, page faults cost up to 15 %."""
    if sys.platform.startswith("linux") and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
        except (OSError, AttributeError):  # another C library
            return


def resolve_precision(precision: str, device: torch.device) -> Literal["fp32", "bf16"]:
    """``auto``: bf16 on a GPU, fp32 on a CPU; ``fast``: bf16 also on CPUs that multiply it in hardware."""
    if precision == "fast":
        # AVX512-BF16 or AMX: products in bf16 run about twice as fast as in fp32
        probes = (getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("avx512_bf16", "amx_tile"))
        if device.type == "cpu" and any(probe() for probe in probes):
            return "bf16"
    on_gpu = device.type == "cuda" and precision in ("auto", "fast")
    return "bf16" if precision == "bf16" or on_gpu else "fp32"


def free_memory(device: torch.device) -> float:
    """Bytes free on the GPU, or on the host (in the process's control group, where it has one); inf if nobody knows."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = math.inf
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = float(lines["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        group = Path("/sys/fs/cgroup")
        free = min(free, float((group / "memory.max").read_text()) - float((group / "memory.current").read_text()))
    return max(free, 0.0)


def in_float64(x: Tensor) -> Tensor:
    """``x`` in float64; on the host where its device has none (an Apple GPU)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def hashed(x: Tensor) -> Tensor:
    """32 bits of every int64, well mixed (two rounds of multiply and shift); the same on every device."""
    x = x & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x46CA68B5)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def eagerly() -> AbstractContextManager[Any]:
    """Compiled modules run as they are inside: sizes that come once, as in evaluation, are not worth a graph each."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled; the import takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
