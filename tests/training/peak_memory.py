"""python peak_memory.py ARCH IMAGE LOCAL BATCH MICRO_BATCH PRECISION [--kept N] [--checkpointing selective]

Expected and measured peak of steps, as JSON.

MICRO_BATCH 0: the plain step. Measured is the growth of the resident memory, read from Linux, over that of the same
process with all libraries loaded and one small step taken.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path

import torch

from mim_refiner.core.device import keep_freed_memory
from mim_refiner.core.ema import ExponentialMovingAverage
from mim_refiner.core.optim import adamw, parameter_groups
from mim_refiner.core.run import Run
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.heads import HeadConfig
from mim_refiner.models.refiner import Refiner
from mim_refiner.training.memory import measure_needs
from mim_refiner.training.refine import forward_backward

LOCALS = 4


def status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def make(arch: str, image: int, queue: int, precision: str) -> Refiner:
    torch.manual_seed(0)
    backbone = Backbone.wrap(create_vit(arch, image_size=image))
    if precision == "bf16":  # as commands do
        backbone.use_math_attention()
    depth = backbone.info.depth
    blocks = range(depth - max(1, depth // 3), depth)
    refiner = Refiner(backbone, blocks, HeadConfig(512, 1024, 128, queue), pooling="cls")
    refiner.unfreeze_encoder()
    return refiner


def train(
    refiner: Refiner, image: int, local: int, batch: int, micro_batch: int | None, precision: str, kept: int = 0
) -> float:
    """Two steps; returns the CPU seconds of the second."""
    ema = ExponentialMovingAverage(refiner.backbone)
    optimizer = adamw(parameter_groups(refiner.named_parameters(), weight_decay=0.05), (0.9, 0.95))
    for _ in range(2):
        started = time.process_time()
        views = [torch.randn(batch, 3, size, size) for size in (image, image, *[local] * LOCALS)]
        optimizer.zero_grad(set_to_none=True)
        forward_backward(refiner, views, torch.arange(batch), None, Run(precision=precision), micro_batch, kept)
        optimizer.step()
        ema.update(refiner.backbone, 0.999)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs=6)
    parser.add_argument("--kept", type=int, default=0)
    parser.add_argument("--checkpointing", default=False)
    options = parser.parse_args()
    arch, image, local, batch, micro_batch, precision = (int(w) if w.isdigit() else w for w in options.words)
    torch.set_num_threads(1)
    keep_freed_memory()
    shapes, way = [(image, 2), (local, LOCALS)], {"precision": precision, "checkpointing": options.checkpointing}
    needs = measure_needs(make(arch, image, 8192, precision), shapes, batch, **way)
    expected = needs.cached(micro_batch, options.kept) if micro_batch else needs.whole()
    train(make("vit_w32_d2_h2_p8", 16, 64, precision), 16, 8, 4, None, precision)
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    refiner = make(arch, image, 8192, precision)
    refiner.backbone.set_checkpointing(options.checkpointing)
    seconds = train(refiner, image, local, batch, micro_batch or None, precision, options.kept)
    measured = status("VmHWM") - before
    print(json.dumps({"expected": expected, "measured": measured, "cpu_s": seconds, **vars(needs)}))


if __name__ == "__main__":
    main()
