"""The part ``check`` of gpu.py: golden vectors, photometrics, k-NN, a step and a resumed run, beside the CPU."""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gpu_parts import bench_of, random_encoder, random_images
from gpu_train import TOY
from safetensors.torch import load_file
from torch import Tensor

from mim_refiner import refine
from mim_refiner.core.knn import knn_predict
from mim_refiner.core.neighbors import NeighborQueue
from mim_refiner.core.nna import multi_view_nna_loss
from mim_refiner.data.photometric import BatchPhotometric, seeded_generator
from mim_refiner.data.views import multi_crop_views
from mim_refiner.reporting import Reporter

if TYPE_CHECKING:
    from gpu import Results

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"


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


class Interrupts(Reporter):
    """Ctrl-C after so many reported steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def progress(self, step: int, metrics: Mapping[str, float]) -> None:
        self.after -= bool(metrics)
        if self.after == 0:
            signal.raise_signal(signal.SIGINT)


def check_resume(checks: Checks, device: torch.device) -> None:
    """A run stopped in the middle and resumed, on the device and from there on the CPU, beside one left alone."""
    settings = [
        "batch_size=16", "warmup.epochs=1", "refinement.epochs=2", "log_every=1", "precision=fp32",
        *(f"{key}={value}" for key, value in TOY.items()),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = random_images(folder / "train.npz", 32)
        encoder = random_encoder(folder / "encoder", "vit_w32_d2_h2_p8")
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
                    refine(device=devices[0], reporter=Interrupts(after=4), **common)
            refine(device=devices[-1], **common)
            log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            weights[run] = load_file(out / "export" / "model.safetensors"), [x["loss"] for x in log if "loss" in x]
        for run in ("resumed", "resumed on the CPU"):
            (there, losses), (here, expected) = weights[run], weights["alone"]
            checks.say(f"{run}: as many steps", len(losses) == len(expected), steps=len(losses))
            flat = [torch.cat([value.flatten().float() for value in state.values()]) for state in (there, here)]
            checks.near(f"{run}: weights", flat[0], flat[1], 1e-3)
