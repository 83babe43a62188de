"""The part ``train`` of gpu.py: autoencoders and their refinements by the package's own commands, inside a time box.

Run folders lie in --work and a command that is stopped leaves a checkpoint, so the same call goes on where it stood.
The number of epochs is settled at the start of each stage by the speed that the machine shows: all that is asked for,
or what the box holds; the schedule is then whole. Commands for several decoders run at the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from mim_refiner.files import write_json

if TYPE_CHECKING:
    from gpu import Results

SHARES = {"mae": 0.5, "refined": 0.87, "evaluation": 1.0}  # of the box: when a stage is to be over
AFTER = {"mae": 3.0, "refined": 15.0}  # seconds for what follows the last step: comparison, export, report
TOY = {
    "workers": 0, "heads.queue_size": 64, "heads.projector_hidden": 32, "heads.predictor_hidden": 32,
    "heads.out_dim": 16, "refinement.top_k": 4, "views.num_local": 1, "guard.enabled": "false",
}  # refine's settings of a dry run  # fmt: skip
PIECE_BYTES = 15e6  # of a file of weights


def training_data(options: argparse.Namespace) -> str | None:
    """The kept pieces of training data as a --data source, if there are any."""
    pieces = options.work / "data"
    return f"{pieces}/train-*.parquet" if any(pieces.glob("train-*.parquet")) else None


class Command:
    """A run of ``mim-refiner VERB`` in a process of its own, with a run folder."""

    def __init__(self, verb: str, out: Path, settings: dict[str, Any], *flags: str, **options: Any) -> None:
        self.out = out
        words = [word for key, value in options.items() for word in ("--" + key.replace("_", "-"), str(value))]
        words += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        self.words = [sys.executable, "-m", "mim_refiner", verb, "--out", str(out), "--quiet", *words, *flags]
        self.interrupted = False
        self.log = out.with_name(f"{out.name}.log")
        out.parent.mkdir(parents=True, exist_ok=True)
        source = str(Path(__file__).resolve().parent.parent / "src")
        paths = {"PYTHONPATH": os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.words, stdout=log, stderr=log, env=os.environ | paths)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def check(self) -> None:
        """Raise RuntimeError with the end of its words if it failed."""
        # what was stopped, or killed as it did not end in time, goes on from a checkpoint
        ways = (130, -signal.SIGINT, -signal.SIGKILL) if self.interrupted else ()
        if self.process.poll() not in (None, 0, *ways):
            words = self.log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{' '.join(self.words[3:])}: exit code {self.process.poll()}\n{words}")

    def metrics(self) -> list[dict[str, Any]]:
        file = self.out / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def speed(self, end: float, lines: int) -> dict[str, Any]:
        """Images a second of the phase after the warm-up: median of its lines but the first, once there are so many."""
        found: dict[str, Any] = {}
        while self.running and time.monotonic() < end:
            log = self.metrics()
            rates = [line["images_per_s"] for line in log if line["phase"] == log[-1]["phase"]][1:]
            if rates:
                found = {"phase": log[-1]["phase"], "lines": len(rates), "images_per_s": statistics.median(rates)}
            if len(rates) >= lines and log[-1]["phase"] != "warmup":
                break
            time.sleep(0.2)
        self.check()
        return found

    def interrupt(self) -> None:
        """Ctrl-C, once: the run writes a checkpoint and ends."""
        if self.running and not self.interrupted:
            self.interrupted = True
            self.process.send_signal(signal.SIGINT)

    def stop(self) -> None:
        """Interrupt, and wait for the end."""
        self.interrupt()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Training:
    """The stages for all decoders; ``plan`` holds the epochs of every run that was begun, and which ones are done."""

    def __init__(self, results: Results, options: argparse.Namespace, device: torch.device) -> None:
        self.results, self.options, self.device = results, options, device.type
        self.decoders = options.decoders.split(",")
        self.started = time.monotonic()
        self.seconds = results.left
        data = training_data(options)
        self.test = options.work / "data" / "test-0.parquet"
        if data is None:
            raise SystemExit(f"train: no train-*.parquet in {options.work / 'data'}; bring the pieces with --keep")
        self.data = data
        self.images = sum(pq.read_metadata(file).num_rows for file in (options.work / "data").glob("train-*.parquet"))
        self.plan_file = options.work / "plan.json"
        self.plan: dict[str, int] = json.loads(self.plan_file.read_text()) if self.plan_file.exists() else {}

    def pretrain(self, key: str, epochs: int, *flags: str) -> Command:
        depth, width = key.split("x")
        settings = self.common(epochs, "training") | {"decoder_depth": depth, "decoder_dim": width}
        settings |= {
            "decoder_heads": max(1, int(width) // 64),
            "training.base_lr": 1e-3,
            "training.warmup_epochs": min(20, epochs / 4),
        }
        settings |= dict(item.split("=", 1) for item in self.options.mae_set)
        common = {"data": self.data, "arch": self.options.arch, "recipe": "tiny_mae", "device": self.device}
        return Command("pretrain", self.options.work / f"mae-{key}", settings, *flags, **common)

    def refine(self, key: str, epochs: int, *flags: str) -> Command:
        settings = self.common(epochs, "refinement") | {"refinement.base_lr": 1e-3, "knn_every": 0}
        settings |= dict(item.split("=", 1) for item in self.options.refine_set)
        common = {"data": self.data, "model": self.encoder("mae", key), "recipe": "tiny", "device": self.device}
        return Command("refine", self.options.work / f"refined-{key}", settings, *flags, **common)

    def evaluate(self, key: str, epochs: int, *flags: str) -> Command:
        common = {"model": self.encoder("mae", key), "compare": self.encoder("refined", key), "data": self.data}
        common |= {"test": self.test, "protocols": "knn,linear", "blocks": "all", "device": self.device}
        return Command("evaluate", self.options.work / f"evaluation-{key}", {}, *flags, **common)

    def common(self, epochs: int, phase: str) -> dict[str, Any]:
        return {f"{phase}.epochs": epochs, "batch_size": self.options.batch, "log_every": 20, "knn_every": 0}

    def encoder(self, stage: str, key: str) -> Path:
        given = self.options.start
        return given / f"mae-{key}" if given and stage == "mae" else self.options.work / f"{stage}-{key}" / "export"

    def stage(self, name: str, make: Callable[..., Command], asked: int) -> bool:
        """Run the commands of one stage until all are done (True) or its share of the box is over (False)."""
        end = self.started + SHARES[name] * self.seconds
        todo = [key for key in self.decoders if f"{name}-{key} done" not in self.plan]
        runs = {key: make(key, self.plan.get(f"{name}-{key}", asked)) for key in todo}
        try:
            for key, run in runs.items():
                if asked and f"{name}-{key}" not in self.plan:
                    runs[key] = self.settled(name, key, run, make, asked, end)
            while any(run.running for run in runs.values()) and time.monotonic() < end:
                time.sleep(0.2)
        finally:
            for run in runs.values():
                run.interrupt()
            for run in runs.values():
                run.stop()
        for key, run in runs.items():
            run.check()
            if run.process.returncode == 0:
                self.note(f"{name}-{key} done", True)
        return all(run.process.returncode == 0 for run in runs.values())

    def note(self, key: str, value: int) -> None:
        self.plan[key] = value
        write_json(self.plan_file, self.plan)

    def settled(
        self, name: str, key: str, run: Command, make: Callable[..., Command], asked: int, end: float
    ) -> Command:
        """Fix the number of epochs by the speed that shows; fewer than asked for begin anew."""
        rate = run.speed(end, lines=10).get("images_per_s")
        fits = asked
        if rate and run.running:
            done = run.metrics()[-1]["epoch"]
            fits = int(done + (0.9 * (end - time.monotonic()) - AFTER[name]) * rate / self.images)
        epochs = max(1, min(asked, fits))
        self.note(f"{name}-{key}", epochs)
        if epochs < asked:
            run.stop()
            run = make(key, epochs, "--overwrite")
        return run

    def tell(self, name: str) -> None:
        """Put the curves of a stage into the results, and its weights beside them."""
        for key in self.decoders:
            log = self.options.work / f"{name}-{key}" / "metrics.jsonl"
            lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
            thinned = lines[:: max(1, len(lines) // 60)] + lines[-1:]
            kept = ("phase", "epoch", "loss", "lr", "images_per_s")
            curve = [{word: line[word] for word in kept if word in line} for line in thinned]
            self.results.put(**{f"{name}-{key}": {"epochs": self.plan.get(f"{name}-{key}"), "curve": curve}})
            with suppress(FileNotFoundError):
                config = write_weights(self.encoder(name, key), self.options.out, f"{name}-{key}")
                self.results.put(**{f"config {name}-{key}": config})


def train(results: Results, options: argparse.Namespace, device: torch.device) -> None:
    if options.dry_run:
        toy_data(options)
    training = Training(results, options, device)
    results.put(images=training.images, decoders=training.decoders)
    stages: list[tuple[str, Callable[..., Command], int]] = [("refined", training.refine, options.refine_epochs)]
    if options.start is None:
        stages.insert(0, ("mae", training.pretrain, options.mae_epochs))
    for name, make, asked in stages:
        done = training.stage(name, make, asked)
        training.tell(name)
        if not done:
            results.put(unfinished=f"{name}: run the same call again, it goes on")
            return
    if training.test.exists():
        done = training.stage("evaluation", training.evaluate, 0)
        for key in training.decoders:
            results.put(**{f"evaluation-{key}": scores(options.work / f"evaluation-{key}")})
        results.put(unfinished="" if done else "evaluation: run the same call again")


def scores(folder: Path) -> list[dict[str, Any]]:
    """Metric, block, pooling and value of every result of ``evaluate``."""
    found = [json.loads(file.read_text()) for file in sorted(folder.rglob("*.json"))]
    kept = ("metric", "block", "pooling", "value", "ci95")
    return [
        {"file": file.stem} | {word: record[word] for word in kept if word in record}
        for file, record in zip(sorted(folder.rglob("*.json")), found, strict=True)
        if isinstance(record, dict) and "metric" in record
    ]


def write_weights(export: Path, out: Path, name: str) -> dict[str, Any]:
    """The weights of a timm folder in bf16, in files small enough to be sent; returns its config."""
    state = {key: value.to(torch.bfloat16) for key, value in load_file(export / "model.safetensors").items()}
    parts: list[dict[str, torch.Tensor]] = [{}]
    for key, value in state.items():
        if parts[-1] and sum(x.nbytes for x in parts[-1].values()) + value.nbytes > PIECE_BYTES:
            parts.append({})
        parts[-1][key] = value
    for number, part in enumerate(parts):
        save_file(part, out / f"{name}.{number}.safetensors")
    return json.loads((export / "config.json").read_text())


def unpack(results: Path, target: Path) -> None:
    """Make timm folders of the weights that ``train`` left in ``results``."""
    record = json.loads((results / "train.json").read_text())
    for name in sorted({file.name.split(".")[0] for file in results.glob("*.safetensors")}):
        folder = target / name
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            key: value
            for file in sorted(results.glob(f"{name}.*.safetensors"))
            for key, value in load_file(file).items()
        }
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(record[f"config {name}"], indent=2))
        print(folder)


def toy_data(options: argparse.Namespace) -> None:
    """Pieces cut from the images that the package embeds, and settings that end in seconds."""
    assets, folder = Path(__file__).resolve().parent.parent / "src" / "mim_refiner" / "assets", options.work / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for source, name, rows in (("train", "train-0", 32), ("train", "train-1", 32), ("test", "test-0", 32)):
        if not (folder / f"{name}.parquet").exists():
            table = pq.read_table(assets / f"cifar10_{source}.parquet")
            pq.write_table(table.slice(32 * int(name[-1]), rows), folder / f"{name}.parquet")
    options.arch, options.batch = "vit_w32_d2_h2_p8", 16
    options.mae_epochs, options.refine_epochs = min(2, options.mae_epochs), 1
    options.decoders = {"1x64,4x192": "1x16,2x32"}.get(options.decoders, options.decoders)
    options.mae_set = [*options.mae_set, "log_every=1", "workers=0"]
    options.refine_set = [*options.refine_set, "log_every=1", *(f"{key}={value}" for key, value in TOY.items())]
