"""What pretrain and refine say they will cost beside what they cost: python benchmarks/estimates.py [NAME ...]

A process a configuration: the plan first, then the same run, whose time is that from the first to the last step of its
phases. Memory is the most that the process holds (Linux), Python and libraries included, and what its loader processes
have of their own, to the end of the run: what is told counts the comparison and the report of refine. The last columns
leave out what is told of Python, its libraries and images.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from time import monotonic
from typing import Any

import mim_refiner
from mim_refiner.commands.plan import MEASURING
from mim_refiner.core.device import pick_device
from mim_refiner.models.backbone import Backbone, create_vit

ASSETS = files("mim_refiner") / "assets"
DATA, MAE = str(ASSETS / "cifar10_train.parquet"), str(ASSETS / "mae")
TINY = ["warmup.epochs=1", "refinement.epochs=1", "hold_out=0", "knn_every=0", "log_every=1"]
CROPS = ["batch_size=8", "views.global_size=224", "views.local_size=96", "views.num_local=6", "heads.queue_size=1024"]
PRETRAIN = ["batch_size=32", "training.epochs=2", "knn_every=0", "log_every=1"]


def vit_tiny() -> Backbone:
    """ViT-Tiny/16 with random weights."""
    return Backbone.wrap(create_vit("vit_tiny_patch16_224", image_size=224))


def refine(*settings: str, images: int = 192, **options: Any) -> dict[str, Any]:
    return {"data": f"{DATA}[:{images}]", "model": MAE, "settings": [*TINY, *settings], **options}


def pretrain(*settings: str, images: int = 64) -> dict[str, Any]:
    return {"data": f"{DATA}[:{images}]", "arch": "vit_tiny_patch16_224", "settings": [*PRETRAIN, *settings]}


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "refine, tiny": refine(),
    "refine, bf16": refine("precision=bf16"),
    "refine, demo with view pool": refine(recipe="demo", images=384),
    "refine, micro-batches of 16": refine("micro_batch=16"),
    "refine, checkpointing": refine("checkpointing=true"),
    "refine, LoRA": refine("adapter=lora"),
    "refine, anchor": refine("anchor.weight=1"),
    "refine, images on the device": refine("images_on_device=on"),
    "refine, two workers": refine("workers=2"),
    "refine, ViT-Tiny/16 at 224 px": refine(*CROPS, images=24, model=vit_tiny),
    "refine, ViT-Tiny/16 at 224 px, anchor": refine(*CROPS, "anchor.weight=1", images=24, model=vit_tiny),
    "pretrain, ViT-Tiny/16 at 112 px": pretrain("image_size=112"),
    "pretrain, ViT-Tiny/16 at 224 px, micro-batches of 4": pretrain("image_size=224", "micro_batch=4", images=32),
    "pretrain, ViT-Tiny/16 at 112 px, two workers": pretrain("image_size=112", "workers=2"),
}


class Clock(mim_refiner.Reporter):
    """Seconds from the first to the last step of the phases of training."""

    def __init__(self) -> None:
        self.seconds, self.began, self.total, self.workers = 0.0, 0.0, 0, 0.0

    def phase(self, name: str, total: int) -> None:
        """Begin one of them."""
        if name in ("warmup", "refinement", "pretrain"):
            self.total, self.began = total, monotonic()

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Count its time at its last step."""
        self.workers = max(self.workers, sum(map(own_bytes, multiprocessing.active_children())))
        if self.total and step == self.total:
            self.seconds, self.total = self.seconds + monotonic() - self.began, 0


def memory(key: str) -> float:
    """Bytes of this process: VmRSS now, VmHWM at most since the mark was reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024.0 * int(line.split()[1])


def own_bytes(process: multiprocessing.process.BaseProcess) -> float:
    """What a loader process has of its own."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    return 1024.0 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def measure(name: str) -> dict[str, float]:
    """{"estimated_seconds", "seconds", "estimated_bytes", "bytes", ...} of a configuration, in this process."""
    options = {"device": "cpu", **CONFIGURATIONS[name]}
    verb: Any = mim_refiner.pretrain if "arch" in options else mim_refiner.refine
    options |= {"model": options["model"]()} if callable(options.get("model")) else {}
    pick_device("cpu")  # as the command line does, before anything is held
    started = memory("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        plan = verb(out=f"{folder}/run", plan=True, **options)["plan"]
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the plan held goes back to the system; libraries stay
        Path("/proc/self/clear_refs").write_text("5")
        clock = Clock()
        verb(out=f"{folder}/run", reporter=clock, **options)
        return {
            "estimated_seconds": 3600 * plan["hours"],
            "seconds": clock.seconds,
            "estimated_bytes": plan["bytes"]["peak"],
            "bytes": memory("VmHWM") + clock.workers,
            "process": plan["bytes"]["process"] - (0 if "arch" in options else MEASURING),
            "started": started,
            "workers": clock.workers,
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
    print("| configuration | time told / taken | memory told | taken | ratio | beyond Python told | taken | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in given.names or CONFIGURATIONS:
        done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True)
        if done.returncode:
            print(f"| {name} | failed: {done.stderr.strip().splitlines()[-1]} |")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        told, took = found["estimated_seconds"], found["seconds"]
        expected, held = (found[key] / 1e6 for key in ("estimated_bytes", "bytes"))
        own, grown = expected - found["process"] / 1e6, held - found["process"] / 1e6
        print(f"| {name} | {told:.0f} s / {took:.0f} s | {expected:.0f} MB | {held:.0f} MB | {expected / held:.2f} "
              f"| {own:.0f} MB | {grown:.0f} MB | {own / grown:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
