"""The measurements of gpu.py: each part takes its results file, the options and the device."""

from __future__ import annotations

import argparse
import gc
import json
import signal
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import step
import torch
from gpu_train import Command, training_data
from safetensors.torch import load_file
from torch import Tensor

from mim_refiner import refine
from mim_refiner.core.knn import knn_predict
from mim_refiner.core.neighbors import NeighborQueue
from mim_refiner.core.nna import multi_view_nna_loss
from mim_refiner.data.photometric import BatchPhotometric, seeded_generator
from mim_refiner.data.views import multi_crop_views
from mim_refiner.export.timm import export_timm
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.reporting import NullReporter
from mim_refiner.training.memory import measure_needs

if TYPE_CHECKING:
    from gpu import Results

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
FITS = 0.92  # of the memory that is free


def bench_of(size: str, options: argparse.Namespace, device: torch.device, precision: str = "bf16") -> step.Bench:
    size = "toy" if options.dry_run else size
    return step.Bench(step.parse(f"--size {size} --device {device.type} --batch 8 --precision {precision}".split()))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: torch.device, *, calls: int = 2, rounds: int = 3) -> dict[str, float]:
    """Seconds a call, the median of rounds of calls that may run ahead of the device, and the peak of memory."""
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
        self.traced: dict[tuple[int, bool], Any] = {}

    def needs(self, batch: int, checkpointing: bool = False) -> Any:
        """What the planner expects; its trace takes seconds, so it is kept."""
        key = batch, checkpointing
        if key not in self.traced:
            options = {"precision": self.bench.run.precision, "checkpointing": checkpointing}
            self.traced[key] = measure_needs(self.bench.refiner, self.shapes, batch, **options)
        return self.traced[key]

    def largest_plain(self) -> int:
        """The largest batch whose plain step the planner lets in."""
        low, high = self.batches[:2]
        first, second = self.needs(low).whole(), self.needs(high).whole()
        fits = low + int((FITS * self.free - first) / ((second - first) / (high - low)))
        return max(1, min(fits // 8 * 8, self.batches[2]))

    def measure(self, name: str, batch: int, micro_batch: int | None, expected: float, least: float = 8) -> None:
        """One line of the table; with too little memory, the batch in smaller steps until it fits."""
        if self.results.left < least:
            self.found[name] = {"skipped": "the box is over"}
        while self.results.left >= least:
            work = partial(self.bench.step, self.bench.random_views(batch), micro_batch)
            try:
                cost = timed(work, self.device, calls=1 if self.dry or batch > 512 else 2, rounds=2)
            except torch.OutOfMemoryError as error:
                self.found[name] = {"batch": batch, "micro_batch": micro_batch, "error": str(error)[:200]}
                if micro_batch is not None:
                    micro_batch = micro_batch * 3 // 4
                else:
                    batch = batch * 7 // 8
            else:
                self.found[name] = self.line(batch, micro_batch, cost, expected)
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
    steps = Steps(size, results, options, device)
    bench, (_, middle, large) = steps.bench, steps.batches
    plain = steps.largest_plain()
    results.put(largest_plain_batch=plain)
    steps.measure("plain, largest batch", plain, None, steps.needs(plain).whole())
    room = steps.needs(large)
    micro = room.largest_micro_batch(FITS * steps.free, large)
    micro = max(1, min(plain, micro, large // 2))
    steps.measure(f"cached, {large}", large, micro, room.cached(micro))
    room = steps.needs(middle)
    micro = max(1, min(plain, middle // 2, room.largest_micro_batch(FITS * steps.free, middle)))
    steps.measure(f"cached, {middle}", middle, micro, room.cached(micro))
    bench.refiner.backbone.model.set_grad_checkpointing(True)
    steps.measure(f"checkpointing, {middle}", middle, None, steps.needs(middle, checkpointing=True).whole())
    bench.refiner.backbone.model.set_grad_checkpointing(False)
    results.put(parts=parts_of(bench, min(plain, 32), device))
    bench.refiner.backbone.compile_blocks(**({"backend": "eager"} if options.dry_run else {}))
    started = time.monotonic()
    steps.measure("plain, largest batch, compiled", plain, None, steps.needs(plain).whole(), least=40)
    results.put(compile_seconds_with_steps=time.monotonic() - started, graphs=graphs())
    micro = max(1, min(plain, steps.needs(large).largest_micro_batch(FITS * steps.free, large), large // 2))
    steps.measure(f"cached, {large}, compiled", large, micro, steps.needs(large).cached(micro), least=40)
    results.put(graphs=graphs())


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
        cost = timed(partial(bench.step, bench.random_views(batch), None), device, calls=1 if options.dry_run else 5)
        job = replace(step.workload_of(bench.options, bench), batch=batch)
        share = job.model_operations() / cost["seconds"] / rate
        found[f"step, {batch}"] = {**cost, "images_per_s": batch / cost["seconds"], "share_of_matrix_rate": share}
        results.put(steps=found)
    del bench
    gc.collect()
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as name:
        data = training_data(options) or random_images(Path(name) / "train.npz", 256 if options.dry_run else 50_000)
        encoder = random_encoder(
            Path(name) / "encoder", "vit_w32_d3_h2_p8" if options.dry_run else "vit_w192_d12_h3_p4"
        )
        for batch in (64,) if options.dry_run else (256, 1024):
            settings = {
                "batch_size": batch,
                "log_every": 1 if options.dry_run else 20,
                "knn_every": 0,
                "warmup.epochs": 1,
            }
            run = Command("refine", Path(name) / str(batch), settings, data=data, model=encoder, device=device.type)
            found[f"refine with data, {batch}"] = run.speed(results.end, lines=2 if options.dry_run else 15)
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
    sizes = [("small", 256, None), ("small", 256, 64), ("vit_l", 64, None), ("vit_l", 128, 32)]
    for size, batch, micro in [("small", 8, None), ("vit_l", 8, 4)] if options.dry_run else sizes:
        bench = bench_of(size, options, device)
        views = bench.random_views(batch)
        name = f"{size}, batch {batch}" + (f", cached by {micro}" if micro else "")
        results.put(
            **{name: profile_of(lambda bench=bench, views=views, micro=micro: bench.step(views, micro), device)}
        )
        del bench, views
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


# --- check ----------------------------------------------------------------------------------------


class Checks:
    """Comparisons with their errors and tolerances; all of them are made, whatever one gives."""

    def __init__(self, results: Results) -> None:
        self.results, self.found = results, {}

    def near(self, name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
        """Largest difference relative to the largest value."""
        expected = expected.double().cpu()
        error = float((actual.detach().double().cpu() - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
        self.say(name, error <= tolerance, error=error, tolerance=tolerance)

    def say(self, name: str, passed: bool, **values: Any) -> None:
        self.found[name] = {"passed": bool(passed), **values}
        wrong = [name for name, value in self.found.items() if not value["passed"]]
        self.results.put(checks=self.found, failed=wrong, passed=len(self.found) - len(wrong))


def check(results: Results, options: argparse.Namespace, device: torch.device) -> None:
    torch.backends.cudnn.allow_tf32 = False
    checks = Checks(results)
    check_golden(checks, device)
    check_photometrics(checks, device)
    check_knn(checks, device)
    check_step(checks, options, device)
    check_resume(checks, device)
    if checks.results.values["failed"]:
        raise AssertionError(f"checks failed: {checks.results.values['failed']}")


def check_golden(checks: Checks, device: torch.device) -> None:
    """Losses, gradients, queue and k-NN that the published code gave."""
    for local in (0, 1, 4, 10):
        data = load_file(GOLDEN / "nna_loss" / f"global2_local{local}_f32.safetensors", device=str(device))
        keys = ("predicted", "projected_preswap", "projected_postswap")
        p, t, n = (data[key].transpose(0, 1).contiguous().requires_grad_() for key in keys)
        loss = multi_view_nna_loss(p, t, n, 0.2, view_pairing="reference").loss
        loss.backward()
        checks.near(f"golden loss, {local} local views", loss, data["T0.2/loss/total"], 1e-5)
        assert p.grad is not None
        checks.near(f"golden gradient, {local} local", p.grad.transpose(0, 1), data["T0.2/grad/predicted"], 1e-4)
    data = load_file(GOLDEN / "queue" / "queue_topk20.safetensors", device=str(device))
    queue = NeighborQueue(*data["init/x"].shape, top_k=20).to(device)
    names = {"entries": "x", "sample_ids": "idx", "age": "age", "pointer": "ptr"}
    queue.load_state_dict({ours: data[f"init/{theirs}"] for ours, theirs in names.items()})
    same = []
    for number in range(8):
        x, ids, choice = (data[f"step{number}/{key}"] for key in ("x", "idx", "choice"))
        same.append(bool(torch.equal(queue.lookup(x, ids, choice=choice).indices, data[f"step{number}/nn_qidx"])))
        queue.enqueue(x[:12], ids)
    checks.say("golden queue, eight look-ups", all(same), same=same)
    data = load_file(GOLDEN / "knn" / "knn.safetensors", device=str(device))
    key = next(key for key in data if key.startswith("pred/bn1_inplace0/k10_"))
    options = {"k": 10, "temperature": float(key.rsplit("tau", 1)[1])}
    predicted = knn_predict(data["train_x"], data["train_y"], data["test_x"], **options)
    checks.say("golden k-NN", bool(torch.equal(predicted.cpu(), data[key].cpu())))


def check_photometrics(checks: Checks, device: torch.device) -> None:
    """The same draws give the same pixels on the device, to a hundredth of a grey level."""
    images = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8, generator=seeded_generator(0))
    for number, spec in enumerate(multi_crop_views(32, 16, 4)):
        photometric = BatchPhotometric(spec, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0))
        here = photometric(images.clone(), seeded_generator(1))
        there = photometric(images.clone().to(device), seeded_generator(1))
        checks.near(f"photometrics of view {number}", there, here, 1e-4)


def check_knn(checks: Checks, device: torch.device) -> None:
    generator = seeded_generator(2)
    bank, labels = torch.randn(3000, 64, generator=generator), torch.randint(0, 10, (3000,), generator=generator)
    test = torch.randn(500, 64, generator=generator)
    here = knn_predict(bank, labels, test)
    there = knn_predict(bank.to(device), labels.to(device), test.to(device)).cpu()
    checks.say("k-NN of random features", float((here == there).float().mean()) >= 0.998)


def check_step(checks: Checks, options: argparse.Namespace, device: torch.device) -> None:
    """Loss and gradients of a step: the device against the CPU, cached against plain, bf16 against float32."""
    words = argparse.Namespace(dry_run=True)
    found = {}
    for name, where, precision, micro in (
        ("CPU", torch.device("cpu"), "fp32", None),
        ("plain", device, "fp32", None),
        ("cached", device, "fp32", 3),
        ("bf16", device, "bf16", None),
    ):
        bench = bench_of("toy", words, where, precision)
        views = [view.to(where) for view in bench.random_views(8, torch.device("cpu"))]
        loss = bench.gradients(bench.augment(views), micro)
        grads = [p.grad.flatten().float().cpu() for p in bench.refiner.parameters() if p.grad is not None]
        found[name] = loss.reshape(1).float().cpu(), torch.cat(grads)
    for name, other, loss_tolerance, tolerance in (
        ("plain", "CPU", 1e-5, 1e-3),
        ("cached", "plain", 1e-5, 1e-3),
        ("bf16", "CPU", 6e-2, 0.5),  # a neighbour may be another one
    ):
        checks.near(f"loss, {name} against {other}", found[name][0], found[other][0], loss_tolerance)
        checks.near(f"gradients, {name} against {other}", found[name][1], found[other][1], tolerance)


class Interrupts(NullReporter):
    """Ctrl-C after so many reported steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        self.after -= bool(metrics)
        if self.after == 0:
            signal.raise_signal(signal.SIGINT)


def check_resume(checks: Checks, device: torch.device) -> None:
    """A run stopped in the middle and resumed, on the device and from there on the CPU, beside one left alone."""
    settings = [
        "batch_size=16", "warmup.epochs=1", "refinement.epochs=2", "refinement.top_k=4", "heads.queue_size=64",
        "heads.out_dim=16", "heads.projector_hidden=32", "heads.predictor_hidden=32", "workers=0", "log_every=1",
        "precision=fp32", "guard.enabled=false",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = random_images(folder / "train.npz", 64)
        encoder = random_encoder(folder / "encoder", "vit_w32_d3_h2_p8")
        weights = {}
        for run, devices in (
            ("alone", [device.type]),
            ("resumed", [device.type, device.type]),
            ("resumed on the CPU", [device.type, "cpu"]),
        ):
            out = folder / run
            common = {"data": data, "model": encoder, "out": str(out), "settings": settings}
            if len(devices) > 1:
                with suppress(KeyboardInterrupt):
                    refine(device=devices[0], reporter=Interrupts(after=7), **common)
            refine(device=devices[-1], **common)
            log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            weights[run] = load_file(out / "export" / "model.safetensors"), [x["loss"] for x in log if "loss" in x]
        for run in ("resumed", "resumed on the CPU"):
            (there, losses), (here, expected) = weights[run], weights["alone"]
            checks.say(f"{run}: as many steps", len(losses) == len(expected), steps=len(losses))
            flat = [torch.cat([value.flatten().float() for value in state.values()]) for state in (there, here)]
            checks.near(f"{run}: weights", flat[0], flat[1], 1e-3)


PARTS: dict[str, Callable[..., None]] = {
    "check": check,
    "vit_l": lambda *given: vit("vit_l", *given),
    "vit_b": lambda *given: vit("vit_b", *given),
    "small": small,
    "profile": profile,
}
