"""What pretrain and refine say they will cost beside what they cost: python benchmarks/estimates.py [NAME ...]

A process a configuration: the plan first, then the same training, whose time runs from the first to the last step of
its phases and whose memory is the most that the process holds above what it held before (Linux).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from time import monotonic
from typing import Any

import mim_refiner

ASSETS = files("mim_refiner") / "assets"
DATA, MAE = str(ASSETS / "cifar10_train.parquet"), str(ASSETS / "mae")
TINY = ["warmup.epochs=1", "refinement.epochs=1", "hold_out=0", "knn_every=0", "log_every=1"]
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "refine, tiny": {"data": f"{DATA}[:384]", "settings": TINY},
    "refine, demo with view pool": {"data": f"{DATA}[:384]", "recipe": "demo", "settings": TINY},
    "refine, micro-batches of 32": {"data": f"{DATA}[:256]", "settings": [*TINY, "micro_batch=32"]},
    "refine, checkpointing": {"data": f"{DATA}[:256]", "settings": [*TINY, "checkpointing=true"]},
    "refine, LoRA": {"data": f"{DATA}[:256]", "settings": [*TINY, "adapter=lora"]},
    "refine, anchor": {"data": f"{DATA}[:256]", "settings": [*TINY, "anchor.weight=1"]},
    "pretrain, vit_tiny at 112 px": {
        "data": f"{DATA}[:128]", "arch": "vit_tiny_patch16_224",
        "settings": ["image_size=112", "batch_size=64", "training.epochs=2", "knn_every=0", "log_every=1"],
    },
}  # fmt: skip


class Trained(Exception):  # noqa: N818 - no error
    """The last step is done: what follows is no training."""


class Clock(mim_refiner.Reporter):
    """Seconds from the beginning to the end of the phases of training, of which there are ``count``."""

    def __init__(self, count: int) -> None:
        self.count, self.seconds, self.began, self.total = count, 0.0, 0.0, 0

    def phase(self, name: str, total: int) -> None:
        """Begin one of them."""
        if name in ("warmup", "refinement", "pretrain"):
            self.total, self.began = total, monotonic()

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Count its time at its last step."""
        if self.total and step == self.total:
            self.seconds, self.total, self.count = self.seconds + monotonic() - self.began, 0, self.count - 1
            if not self.count:
                raise Trained


def memory(key: str) -> float:
    """Bytes of this process: VmRSS now, VmHWM at most since the mark was reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024.0 * int(line.split()[1])


def measure(name: str) -> dict[str, float]:
    """{"estimated_seconds", "seconds", "estimated_bytes", "bytes"} of a configuration, in this process."""
    options = {"device": "cpu", **CONFIGURATIONS[name]}
    verb: Any = mim_refiner.pretrain if "arch" in options else mim_refiner.refine
    options |= {} if "arch" in options else {"model": MAE}
    with tempfile.TemporaryDirectory() as folder:
        plan = verb(out=f"{folder}/run", plan=True, **options)["plan"]
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the plan held goes back to the system; libraries stay
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        clock = Clock(len(plan["phases"]))
        with contextlib.suppress(Trained):
            verb(out=f"{folder}/run", reporter=clock, **options)
        return {
            "estimated_seconds": 3600 * plan["hours"],
            "seconds": clock.seconds,
            "estimated_bytes": plan["bytes"]["peak"],
            "bytes": memory("VmHWM") - before,
        }


def main() -> None:
    """Print a row a configuration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--one", help="measure in this process and print JSON")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one)))
        return
    print("| configuration | time told | time taken | ratio | memory told | memory taken | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in given.names or CONFIGURATIONS:
        done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True)
        if done.returncode:
            print(f"| {name} | failed: {done.stderr.strip().splitlines()[-1]} |")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        told, took = found["estimated_seconds"], found["seconds"]
        expected, held = (found[key] / 1e6 for key in ("estimated_bytes", "bytes"))
        print(f"| {name} | {told:.0f} s | {took:.0f} s | {told / took:.2f} | {expected:.0f} MB | {held:.0f} MB "
              f"| {expected / held:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
