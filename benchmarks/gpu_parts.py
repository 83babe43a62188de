"""The measurements of gpu.py: each part takes its results file, the options and the device."""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import step
import torch
from gpu_train import TOY, Command, training_data

from mim_refiner.export.timm import export_timm
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.training.memory import measure_needs

if TYPE_CHECKING:
    from gpu import Results

FITS = 0.92  # of the memory that is free
LEAST = 8.0  # seconds for a line of the table


def bench_of(size: str, options: argparse.Namespace, device: torch.device, precision: str = "bf16") -> step.Bench:
    size = "toy" if options.dry_run else size
    return step.Bench(step.parse(f"--size {size} --device {device.type} --batch 8 --precision {precision}".split()))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: torch.device, *, calls: int = 2, rounds: int = 3) -> dict[str, float]:
    """Seconds a call, the median of rounds of calls that may run ahead of the device, and the peak of memory."""
    calls, rounds = (calls, rounds) if device.type == "cuda" else (1, 1)  # a dry run
    work()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        seconds.append((time.perf_counter() - started) / calls)
    found = {"seconds": statistics.median(seconds)}
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        found["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return found


def matrix_rate(device: torch.device, side: int) -> float:
    """Operations a second of a square bf16 product of random matrices: the card's own ceiling."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / timed(lambda: a @ b, device, calls=10)["seconds"]


# --- vit_l, vit_b --------------------------------------------------------------------------------


class Steps:
    """Steps of one encoder at several batches, beside what the planner expects of them."""

    def __init__(self, size: str, results: Results, options: argparse.Namespace, device: torch.device) -> None:
        self.results, self.device, self.dry = results, device, options.dry_run
        self.rate = matrix_rate(device, 128 if self.dry else 8192)
        results.put(matrix_operations_per_s=self.rate)
        self.bench = bench_of(size, options, device)
        self.batches = (4, 8, 16) if self.dry else (64, 256, 1024)  # two of them trace the planner's line
        self.shapes = [(self.bench.options.image, 2), (self.bench.options.local, self.bench.options.locals)]
        # the planner counts the weights, which lie there already
        self.free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved() if device.type == "cuda" else 4e9
        self.found: dict[str, Any] = {}
        self.traced: dict[tuple[int, bool | str], Any] = {}

    def needs(self, batch: int, checkpointing: bool | str = False) -> Any:
        """What the planner expects; its trace takes seconds, so it is kept."""
        key = batch, checkpointing
        if key not in self.traced:
            options = {"precision": self.bench.run.precision, "checkpointing": checkpointing}
            self.traced[key] = measure_needs(self.bench.refiner, self.shapes, batch, **options)
        return self.traced[key]

    def largest_plain(self) -> tuple[int, float]:
        """The largest batch whose plain step the planner lets in, and the peak it expects of that."""
        low, high = self.batches[:2]
        first, second = self.needs(low).whole(), self.needs(high).whole()
        image = (second - first) / (high - low)
        fits = low + int((FITS * self.free - first) / image)
        batch = max(1, min(fits // 8 * 8, self.batches[2]))
        return batch, first + (batch - low) * image

    def measure(
        self, name: str, batch: int, micro_batch: int | None, expected: float, least: float = LEAST, kept: int = 0
    ) -> None:
        """One line of the table; with too little memory, the batch in smaller steps until it fits."""
        if self.results.left < least:
            self.found[name] = {"skipped": "the box is over"}
        while self.results.left >= least:
            work = partial(self.bench.step, self.bench.random_views(batch), micro_batch, kept)
            try:
                cost = timed(work, self.device, calls=1 if batch > 512 else 2, rounds=2)
            except torch.OutOfMemoryError as error:
                self.found[name] = {"batch": batch, "micro_batch": micro_batch, "error": str(error)[:200]}
                if kept:
                    kept = kept * 3 // 4
                elif micro_batch is not None:
                    micro_batch = micro_batch * 3 // 4
                else:
                    batch = batch * 7 // 8
            else:
                self.found[name] = self.line(batch, micro_batch, cost, expected) | {"kept_graphs": kept}
                break
            finally:
                del work
                self.bench.optimizer.zero_grad(set_to_none=True)
                gc.collect()
                torch.cuda.empty_cache()
            if not batch or micro_batch == 0:
                break
        self.results.put(steps=self.found)

    def line(self, batch: int, micro_batch: int | None, cost: dict[str, float], expected: float) -> dict[str, Any]:
        job = replace(step.workload_of(self.bench.options, self.bench), batch=batch, micro_batch=micro_batch)
        done = job.model_operations() / cost["seconds"]
        line = {"batch": batch, "micro_batch": micro_batch, **cost, "images_per_s": batch / cost["seconds"]}
        line |= {"operations_per_s": done, "share_of_matrix_rate": done / self.rate, "planned_bytes": expected}
        if "peak_bytes" in cost:
            line["planned_over_measured"] = expected / cost["peak_bytes"]
        return line


def vit(size: str, results: Results, options: argparse.Namespace, device: torch.device) -> None:
    """The goals first, then what compiling gains, then the other ways to a large batch: a box may end anywhere."""
    steps = Steps(size, results, options, device)
    bench, (_, middle, large) = steps.bench, steps.batches
    plain, whole = steps.largest_plain()
    results.put(largest_plain_batch=plain)
    steps.measure("plain, largest batch", plain, None, whole)
    room = steps.needs(large)
    micro = max(1, min(plain, room.largest_micro_batch(FITS * steps.free), large // 2))
    # as the planner picks it: smaller micro-batches, and the graphs of as many as fit
    quarter = max(1, micro // 4)
    kept = room.most_graphs(quarter, FITS * steps.free)
    steps.measure(f"cached, {large}, graphs kept", large, quarter, room.cached(quarter, kept), kept=kept)
    steps.measure(f"cached, {large}", large, micro, room.cached(micro))
    part = max(1, min(plain, middle // 2, steps.needs(middle).largest_micro_batch(FITS * steps.free)))
    steps.measure(f"cached, {middle}", middle, part, steps.needs(middle).cached(part))
    results.put(parts=parts_of(bench, min(plain, 32), device))
    bench.refiner.backbone.compile_blocks(**({"backend": "eager"} if options.dry_run else {}))
    started = time.monotonic()
    steps.measure("plain, largest batch, compiled", plain, None, whole, least=30)
    results.put(compile_seconds_with_steps=time.monotonic() - started, graphs=graphs())
    steps.measure(f"cached, {large}, compiled", large, micro, room.cached(micro), least=30)
    results.put(graphs=graphs())
    with torch.compiler.set_stance("force_eager"):
        for name, kind in (("selective", "selective"), ("checkpointing", True)):
            if steps.results.left >= LEAST:  # its trace takes seconds
                expected = steps.needs(middle, checkpointing=kind).whole()
                bench.refiner.backbone.set_checkpointing(kind)
                steps.measure(f"{name}, {middle}", middle, None, expected)
    bench.refiner.backbone.set_checkpointing(False)


def parts_of(bench: step.Bench, batch: int, device: torch.device) -> dict[str, Any]:
    """Seconds of the parts of a plain step."""
    crops = bench.random_views(batch)
    views = bench.augment(crops)
    works = {
        "photometrics": lambda: bench.augment(crops),
        "gradients": lambda: bench.gradients(views, None),
        "optimizer and average": bench.update,
    }
    return {"batch": batch} | {name: timed(work, device)["seconds"] for name, work in works.items()}


def graphs() -> dict[str, Any]:
    """What the compiler did: graphs made, and reasons to fall back to eager (there should be none)."""
    from torch._dynamo.utils import counters

    return {"made": counters["stats"].get("unique_graphs", 0), "fallbacks": dict(counters.get("unimplemented", {}))}


# --- small, with its data -------------------------------------------------------------------------


def small(results: Results, options: argparse.Namespace, device: torch.device) -> None:
    rate = matrix_rate(device, 128 if options.dry_run else 8192)
    results.put(matrix_operations_per_s=rate)
    bench, found = bench_of("small", options, device), {}
    for batch in (8,) if options.dry_run else (256, 1024):
        cost = timed(partial(bench.step, bench.random_views(batch), None), device, calls=5)
        job = replace(step.workload_of(bench.options, bench), batch=batch)
        share = job.model_operations() / cost["seconds"] / rate
        found[f"step, {batch}"] = {**cost, "images_per_s": batch / cost["seconds"], "share_of_matrix_rate": share}
        if device.type == "cuda":
            cost = timed(partial(bench.graphed_step, bench.random_views(batch)), device, calls=5)
            found[f"step as a graph, {batch}"] = {**cost, "images_per_s": batch / cost["seconds"]}
        else:
            found[f"step as a graph, {batch}"] = {"skipped": "a CUDA graph needs a GPU"}
        bench.graph = None
        results.put(steps=found)
    del bench
    gc.collect()
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as name:
        data = training_data(options) or random_images(Path(name) / "train.npz", 64 if options.dry_run else 50_000)
        encoder = random_encoder(
            Path(name) / "encoder", "vit_w32_d2_h2_p8" if options.dry_run else "vit_w192_d12_h3_p4"
        )
        pairs = [(batch, graphs) for batch in (1024, 256) for graphs in ("on", "off")]  # the fastest first
        for batch, graphs in [(16, "off")] if options.dry_run else pairs:
            settings = {
                "cuda_graphs": graphs,
                "batch_size": batch,
                "log_every": 1 if options.dry_run else 20,
                "knn_every": 0,
                "warmup.epochs": 1,
            }
            settings |= TOY if options.dry_run else {}
            folder = Path(name) / f"{batch}-{graphs}"
            run = Command("refine", folder, settings, data=data, model=encoder, device=device.type)
            named = f"refine with data, {batch}" + (", as a graph" if graphs == "on" else "")
            found[named] = run.speed(results.end, lines=2 if options.dry_run else 15)
            run.stop()
            results.put(steps=found)


def random_images(path: Path, count: int) -> str:
    """Blocky random images of 32 px, without labels."""
    coarse = np.random.default_rng(0).integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)
    np.savez(path, images=coarse.repeat(4, axis=1).repeat(4, axis=2))
    return str(path)


def random_encoder(folder: Path, arch: str) -> str:
    torch.manual_seed(0)
    export_timm(Backbone.wrap(create_vit(arch, image_size=32)), folder, card={})
    return str(folder)


# --- profile --------------------------------------------------------------------------------------

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")


def profile(results: Results, options: argparse.Namespace, device: torch.device) -> None:
    small, large = [(256, None), (256, 64)], [(64, None), (128, 32)]
    cases = {"vit_l": [(8, 4)]} if options.dry_run else {"small": small, "vit_l": large}
    for size, batches in cases.items():
        bench = bench_of(size, options, device)
        for batch, micro in batches:
            name = f"{size}, batch {batch}" + (f", cached by {micro}" if micro else "")
            work = partial(bench.step, bench.random_views(batch), micro)
            results.put(**{name: profile_of(work, device)})
        del bench, work
        gc.collect()
        torch.cuda.empty_cache()


def profile_of(work: Callable[[], Any], device: torch.device, steps: int = 2) -> dict[str, Any]:
    """Of one step: seconds, launches, copies and host waits, where the host waits, the dearest kernels."""
    alone = timed(work, device)
    cuda = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(steps):
            work()
        synchronize(device)
    events = profiler.key_averages()
    counts = {event.key: event.count / steps for event in events}
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    dearest = sorted(events, key=lambda event: getattr(event, own), reverse=True)[:25]
    busy = sum(getattr(event, own) for event in events) / steps / 1e6
    return {
        **alone,
        "busy_seconds": busy,  # of the device
        "launches": sum(counts.get(key, 0) for key in LAUNCHES),
        "host_waits": {key: counts[key] for key in WAITS if key in counts},
        "copies": {key: count for key, count in counts.items() if "memcpy" in key.lower()},
        "operators": sum(count for key, count in counts.items() if key.startswith("aten::")),
        "waits_at": waits_of(work, device),
        "dearest": [
            {"name": event.key[:120], "count": event.count / steps, "ms": getattr(event, own) / steps / 1e3}
            for event in dearest
        ],
    }


def waits_of(work: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """{file:line: how often a step waits there for the device}, by torch's synchronisation warnings."""
    if device.type != "cuda":
        return {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = (f"{Path(item.filename).name}:{item.lineno}" for item in caught if "synchroniz" in str(item.message))
    return dict(Counter(places).most_common())


PARTS: dict[str, Callable[..., None]] = {
    "vit_l": lambda *given: vit("vit_l", *given),
    "vit_b": lambda *given: vit("vit_b", *given),
    "small": small,
    "profile": profile,
}
