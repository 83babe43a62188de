"""Throughput, MFU and peak memory of refinement steps: plain and cached, with and without data, part by part.

    python benchmarks/step.py                                   a small ViT, on this machine's CPU
    python benchmarks/step.py --size vit_l --batch 96 --micro-batch 32 --precision bf16    on a GPU

    torchrun --nproc-per-node 8 benchmarks/step.py ...          --batch is that of all processes together

Prints one JSON object on stdout, and a table on stderr (rank 0 does). Times are medians in seconds of the wall clock
and, on a CPU, of the CPU (what other processes take does not count in those). On a CPU the peak is that of the process
up to there.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from cost import EncoderShape, Workload

from mim_refiner.core.collectives import average_gradients, rank, world_size
from mim_refiner.core.device import pick_device, resolve_precision
from mim_refiner.core.ema import ExponentialMovingAverage
from mim_refiner.core.launch import join_processes
from mim_refiner.core.optim import adamw, parameter_groups
from mim_refiner.core.run import Run
from mim_refiner.data.photometric import BatchPhotometric, augment
from mim_refiner.data.views import crop_batch, draws, multi_crop_views
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.heads import HeadConfig
from mim_refiner.models.refiner import Refiner
from mim_refiner.reporting import Reporter
from mim_refiner.training.graphed import Graphed
from mim_refiner.training.refine import forward_backward, graphed

RATE_SECONDS = 0.3  # of measuring how fast the device runs a block
PAPER = "--image 224 --local 96 --locals 10 --projector 2048 --predictor 4096 --out-dim 256 --queue 65536"
SIZES = {
    "vit_l": f"--arch vit_large_patch16_224 {PAPER} --heads 8",
    "vit_b": f"--arch vit_base_patch16_224 {PAPER} --heads 4",
    "small": "--projector 512 --predictor 1024",
    "toy": "--arch vit_w32_d2_h2_p8 --locals 1 --heads 1 --projector 32 --predictor 32 --out-dim 16 --queue 64 "
    "--top-k 4",
}  # options of this script
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12}  # bf16 dense, makers' figures


class Bench:
    """The model, its optimizer, and random images of the size asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, join_processes(pick_device(options.device), Reporter())
        self.run = Run(self.device, resolve_precision(options.precision, self.device))
        torch.manual_seed(0)
        backbone = Backbone.wrap(create_vit(options.arch, image_size=options.image))
        if self.device.type == "cpu" and self.run.precision == "bf16":  # as commands do
            backbone.use_math_attention()
        depth = backbone.info.depth
        config = HeadConfig(options.projector, options.predictor, options.out_dim, options.queue)
        blocks = range(depth - options.heads, depth)
        self.refiner = Refiner(backbone, blocks, config, pooling="cls", frozen_blocks=options.frozen).to(self.device)
        self.refiner.unfreeze_encoder()
        self.refiner.set_top_k(options.top_k)
        if options.compile:
            for block in backbone.model.blocks:
                block.compile(dynamic=False)
        self.ema = ExponentialMovingAverage(backbone)
        groups = parameter_groups(self.refiner.named_parameters(), weight_decay=0.05)
        self.optimizer = adamw(groups, (0.9, 0.95))
        self.specs = multi_crop_views(options.image, options.local, options.locals)
        info = backbone.info
        self.photometrics = [
            BatchPhotometric(spec, info.mean, info.std) for spec in self.specs for _ in range(spec.count)
        ]
        side = int(options.image * 1.5)
        rng = np.random.default_rng(0)
        local = options.batch // world_size()
        self.pixels = [rng.integers(0, 255, (side, side, 3), dtype=np.uint8) for _ in range(local)]
        self.number = 0
        self.graph: Graphed | None = None

    def crops(self) -> list[torch.Tensor]:
        """uint8 views, cut on one core."""
        views = [spec for spec in self.specs for _ in range(spec.count)]
        count = len(self.pixels)
        return [crop_batch(self.pixels, spec, draws(0, 0, view, 0, count)) for view, spec in enumerate(views)]

    def random_views(self, batch: int, device: torch.device | None = None) -> list[torch.Tensor]:
        """uint8 views of ``batch`` images, on the device."""
        device = device or self.device
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(batch, 3, spec.size, spec.size) for spec in self.specs for _ in range(spec.count)]
        return [torch.randint(0, 256, s, dtype=torch.uint8, device=device, generator=generator) for s in shapes]

    def step(self, crops: list[torch.Tensor], micro_batch: int | None, kept_graphs: int = 0) -> None:
        """Everything but the cutting of crops."""
        self.gradients(self.augment(crops), micro_batch, kept_graphs)
        self.update()

    def graphed_step(self, crops: list[torch.Tensor]) -> None:
        """The same with forward and backward pass as a CUDA graph, which the first calls make."""
        self.number += 1
        generator = torch.Generator().manual_seed(self.number)
        self.graph = self.graph or graphed(self.refiner, self.run)
        self.optimizer.zero_grad(set_to_none=True)
        sample_ids = torch.arange(len(crops[0]), device=self.device)
        self.graph(self.augment(crops), sample_ids, self.refiner.draw_choices(sample_ids, generator))
        self.update()

    def augment(self, crops: list[torch.Tensor]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.number)
        return augment(crops, self.photometrics, generator, self.device)

    def gradients(self, views: list[torch.Tensor], micro_batch: int | None, kept_graphs: int = 0) -> torch.Tensor:
        """Forward and backward pass; returns the loss."""
        self.number += 1
        torch.manual_seed(self.number)
        self.optimizer.zero_grad(set_to_none=True)
        sample_ids = torch.arange(len(views[0]), device=self.device) + rank() * len(views[0])
        generator = torch.Generator().manual_seed(self.number)
        output = forward_backward(self.refiner, views, sample_ids, generator, self.run, micro_batch, kept_graphs)
        average_gradients(self.refiner.parameters())
        return output.loss.detach()

    def update(self) -> None:
        self.optimizer.step()
        self.ema.update(self.refiner.backbone, 0.9999)

    def timed(self, work: Callable[[], Any], repeats: int) -> dict[str, float]:
        """Medians over ``repeats`` after one round to warm up, and the peak of memory."""
        wall, cpu = [], []
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for _ in range(repeats + 1):
            start, start_cpu = time.perf_counter(), time.process_time()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - start_cpu)
        result = {"seconds": statistics.median(wall[1:]), "cpu_seconds": statistics.median(cpu[1:])}
        if self.device.type == "cuda":
            return result | {"peak_bytes": torch.cuda.max_memory_allocated(self.device)}
        return result | {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def workload_of(options: argparse.Namespace, bench: Bench) -> Workload:
    info = bench.refiner.backbone.info
    shape = EncoderShape(info.embed_dim, info.depth, info.num_heads, info.patch_size[0], image_size=options.image)
    views = [(options.image, 2), (options.local, options.locals)]
    widths = (options.projector, options.predictor, options.out_dim, options.queue)
    return Workload(shape, options.batch, bench.refiner.blocks, views, *widths, frozen_blocks=options.frozen)


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    crops = bench.crops()
    views = bench.augment(crops)
    parts = {
        "crops (CPU)": bench.crops,
        "photometric": lambda: bench.augment(crops),
        "gradients, cached": lambda: bench.gradients(views, options.micro_batch),
        "gradients, plain": lambda: bench.gradients(views, None),
        "optimizer and average": bench.update,
        "step, plain": lambda: (bench.gradients(views, None), bench.update()),
        "step, plain, with data": lambda: (bench.gradients(bench.augment(bench.crops()), None), bench.update()),
    }
    if options.only:
        parts = {name: work for name, work in parts.items() if any(word in name for word in options.only.split(";"))}
    job = workload_of(options, bench)
    name = (
        torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else f"CPU, {options.threads} threads"
    )
    peak = next((value for key, value in PEAK.items() if key in name), options.peak)
    result: dict[str, Any] = {
        "device": name,
        "processes": world_size(),
        "torch": torch.__version__,
        "precision": bench.run.precision,
        "options": vars(options),
    }
    result["operations"] = {
        "model": job.model_operations(),
        "cached": sum(replace(job, micro_batch=1).operations().values()),
    }
    # what the cost model expects of a plain step from the speed of one block; on a CPU in CPU seconds of one thread
    clock = time.perf_counter if bench.device.type == "cuda" else time.process_time
    rate = measured_rate(bench.refiner, job, bench.run, clock)
    result["expected_seconds"] = job.model_operations() / rate / world_size()
    result["parts"] = {}
    for part, work in parts.items():
        measured = bench.timed(work, options.repeats)
        measured["images_per_s"] = options.batch / measured["seconds"]
        if part.startswith("step") and peak:
            measured["mfu"] = job.model_operations() / measured["seconds"] / peak / world_size()
        result["parts"][part] = measured
        if rank() == 0:
            words = ", ".join(f"{key} {value:.4g}" for key, value in measured.items())
            print(f"{part}: {words}", file=sys.stderr, flush=True)
    return result


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=SIZES, help="options of a size; those given beside it come after")
    add("--arch", default="vit_w192_d12_h3_p4")
    add("--image", type=int, default=32)
    add("--local", type=int, default=16)
    add("--locals", type=int, default=4)
    add("--heads", type=int, default=4, help="on the last blocks")
    add("--batch", type=int, default=64)
    add("--micro-batch", type=int, default=16)
    add("--frozen", type=int, default=0, help="first blocks that stay as they are")
    add("--projector", type=int, default=1024)
    add("--predictor", type=int, default=2048)
    add("--out-dim", type=int, default=128)
    add("--queue", type=int, default=16_384)
    add("--top-k", type=int, default=20)
    add("--precision", default="fp32", help="auto, fp32, bf16 or fast")
    add("--device", default="auto")
    add("--threads", type=int, default=1)
    add("--repeats", type=int, default=3)
    add("--compile", action="store_true", help="torch.compile of the blocks")
    add("--only", default="", help="parts whose names contain one of these words, separated by semicolons")
    add(
        "--peak",
        type=float,
        default=0.0,
        help="operations a second that count as 100 %% MFU, for devices not known here",
    )
    size = parser.parse_args(words).size
    return parser.parse_args([*SIZES[size].split(), *words] if size else words)


def measured_rate(refiner: Refiner, job: Workload, run: Run, clock: Callable[[], float] = time.perf_counter) -> float:
    """Operations a second of the last block, forward and backward, on a few views of the first size."""
    block = refiner.backbone.model.blocks[-1]
    modes = {parameter: parameter.requires_grad for parameter in block.parameters()}
    tokens = job.encoder.tokens(job.view_sizes[0][0])
    x = torch.randn(max(1, min(32, 4096 // tokens)), tokens, job.encoder.dim, device=run.device, requires_grad=True)
    for parameter in modes:
        parameter.requires_grad_(True)
    done, seconds = 0, 0.0
    while seconds < RATE_SECONDS:
        started = clock()
        with run.autocast():
            output = block(x)
        output.sum().backward()
        if run.device.type != "cpu":
            torch.accelerator.synchronize()
        if done or seconds:  # the first round warms up
            seconds += clock() - started
        done += 1
        seconds = max(seconds, 1e-9)
    for parameter, mode in modes.items():
        parameter.requires_grad_(mode)
        parameter.grad = None
    return 3 * len(x) * job.encoder.block_operations(tokens) * (done - 1) / seconds


def main() -> None:
    result = run(parse(sys.argv[1:]))
    if rank() == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
