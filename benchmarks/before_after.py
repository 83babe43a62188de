"""Two checkouts side by side on one machine: CPU seconds of the same work, old and new in turn, and their ratios.

    git worktree add /tmp/before 0b6524c
    python benchmarks/before_after.py /tmp/before --json before_after.json          one thread each, float32
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python ...                     as on a CPU without bf16
    python benchmarks/before_after.py /tmp/before --precision bf16 --parts step,warm-up
    python benchmarks/before_after.py /tmp/published --published --parts step,warm-up   see published.py

Each side is a process that imports its own checkout's package and its own benchmarks/step.py, and answers one request
at a time, so the two never run at once. Every round asks both, now one first, now the other; the ratio is the median
over rounds of old / new, with the lower and upper quartile. After each part the results so far are in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

FULL = {"arch": "vit_w192_d12_h3_p4", "image": 32, "local": 16, "locals": 4, "heads": 4, "batch": 64, "micro_batch": 16,
        "projector": 1024, "predictor": 2048, "out_dim": 128, "queue": 16_384, "top_k": 20, "photographs": 16,
        "bank": 50_000, "tests": 4096, "dim": 768}  # fmt: skip
TOY = FULL | {"arch": "vit_w32_d4_h2_p8", "locals": 2, "heads": 2, "batch": 8, "micro_batch": 4, "projector": 32,
              "predictor": 32, "out_dim": 16, "queue": 64, "top_k": 4, "photographs": 2, "bank": 400, "tests": 50,
              "dim": 16}  # fmt: skip
PARTS = ("step", "cached", "half-frozen", "half-frozen-pooled", "warm-up", "warm-up-pooled", "photometrics", "crops",
         "photographs", "knn")  # fmt: skip
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16")
CHOSEN = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")


class Work:
    """What a side can be asked for, made by the checkout that is imported."""

    def __init__(self, options: dict[str, Any]) -> None:
        from step import Bench  # of the checkout

        torch.set_num_threads(1)
        if os.environ.get("ONEDNN_MAX_CPU_ISA", "").startswith("AVX2"):  # the probes ask the CPU, not the setting
            for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
                setattr(torch.cpu, probe, lambda: False)
        self.options = options
        extra = {"device": "cpu", "compile": False, "frozen": 0, "threads": 1}
        self.bench = Bench(argparse.Namespace(**options, **extra))
        self.crops = self.bench.crops()
        self.views = self.bench.augment(self.crops)
        self.pools: dict[int, list[torch.Tensor]] = {}
        self.parts: dict[str, Callable[[], Any]] = {
            "step": lambda: self.step(),
            "cached": lambda: self.step(micro_batch=options["micro_batch"]),
            "half-frozen": lambda: self.step(frozen=self.bench.refiner.backbone.info.depth // 2),
            "half-frozen-pooled": lambda: self.step(frozen=self.bench.refiner.backbone.info.depth // 2, pooled=True),
            "warm-up": lambda: self.step(warmup=True),
            "warm-up-pooled": lambda: self.step(warmup=True, pooled=True),
            "photometrics": lambda: self.bench.augment(self.crops),
            "crops": self.bench.crops,
            "photographs": self.photographs(),
            "knn": self.knn(),
        }

    def step(self, micro_batch: int | None = None, frozen: int = 0, warmup: bool = False, pooled: bool = False) -> None:
        """A step on augmented views; ``pooled``: on what a pool keeps of them, where the checkout has one."""
        refiner = self.bench.refiner
        refiner.frozen_blocks = frozen
        (refiner.freeze_encoder if warmup else refiner.unfreeze_encoder)()
        views = self.views
        if pooled and hasattr(refiner, "frozen_features"):
            if frozen not in self.pools:
                self.pools[frozen] = refiner.frozen_features(views)
            views = self.pools[frozen]
        self.bench.gradients(views, micro_batch)
        self.bench.update()

    def photographs(self) -> Callable[[], None]:
        """Twelve views of photographs, cut, coloured and blurred."""
        from mim_refiner.data.views import multi_crop_views

        bench = self.bench
        mine = {"specs": bench.specs, "photometrics": bench.photometrics, "pixels": bench.pixels}
        specs = multi_crop_views(224, 96, 10)
        kind, first = type(bench.photometrics[0]), bench.photometrics[0]
        theirs = {
            "specs": specs,
            "photometrics": [kind(spec, first.mean, first.std) for spec in specs for _ in range(spec.count)],
            "pixels": [photograph()] * self.options["photographs"],
        }

        def work() -> None:
            bench.__dict__ |= theirs
            bench.augment(bench.crops())
            bench.__dict__ |= mine

        return work

    def knn(self) -> Callable[[], Any]:
        from knn import features

        from mim_refiner.core.knn import knn_predict

        bank, labels = features(self.options["bank"], self.options["dim"], 0)
        tests, _ = features(self.options["tests"], self.options["dim"], 1)
        return lambda: knn_predict(bank, labels, tests)


def photograph() -> NDArray[np.uint8]:
    """[375, 500, 3]; smooth, as photographs are."""
    image = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(255 * image, (375, 500), mode="bicubic")[0].clamp(0, 255).byte()
    return pixels.permute(1, 2, 0).contiguous().numpy()


def serve(root: str, options: dict[str, Any]) -> None:
    """Answer names of parts on standard input with CPU seconds."""
    import mim_refiner

    assert Path(mim_refiner.__file__).is_relative_to(root), f"{mim_refiner.__file__} is not of {root}"
    work = Work(options)
    for line in sys.stdin:
        start = time.process_time()
        work.parts[line.strip()]()
        print(time.process_time() - start, flush=True)


class Side:
    """A process with one checkout, of this repository or of the published code."""

    def __init__(self, root: Path, options: dict[str, Any], published: bool = False) -> None:
        here, place = Path(__file__), root.resolve()
        # of the published side this folder's inputs, and nothing else of this repository
        folders = [here.parent] if published else [place / "src", place / "benchmarks"]
        path = os.pathsep.join(map(str, folders))
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        script = here.with_name("published.py") if published else here
        command = [sys.executable, "-P", script, str(place), "--serve", json.dumps(options)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, part: str) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(part + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the side of {self.process.args} ended; its error is above")
        return float(answer)

    def close(self) -> None:
        self.process.communicate()


def measure(sides: list[Side], part: str, rounds: int) -> dict[str, Any]:
    """CPU seconds of old and new, ``rounds`` times in turn after one round to warm up."""
    taken: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        order = sides if number % 2 else sides[::-1]
        asked = {side: side.ask(part) for side in order}
        taken.append((asked[sides[0]], asked[sides[1]]))
    ratios = sorted(old / new for old, new in taken[1:])
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "old": statistics.median(old for old, _ in taken[1:]),
        "new": statistics.median(new for _, new in taken[1:]),
        "ratio": statistics.median(ratios),
        "quartiles": [low, high],
        "rounds": taken[1:],
    }


def machine() -> dict[str, Any]:
    """Model and instruction sets of the CPU, and the settings that hold torch to fewer."""
    info = Path("/proc/cpuinfo")
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.exists() else {}
    lines = {key.strip(): value.strip() for key, value in lines.items()}
    return {
        "model": lines.get("model name", "?"),
        "flags": [flag for flag in FLAGS if flag in lines.get("flags", "").split()],
        "settings": {key: os.environ[key] for key in CHOSEN if key in os.environ},
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("before", type=Path, help="folder of the older checkout")
    add("--published", action="store_true", help="it is one of the published code (published.py)")
    add("--after", type=Path, default=Path(__file__).parents[1], help="folder of the newer one; this checkout")
    add("--parts", default=",".join(PARTS))
    add("--rounds", type=int, default=9)
    add("--precision", default="fp32", choices=("fp32", "bf16"))
    add("--json", type=Path)
    add("--dry-run", action="store_true", help="at toy size")
    add("--serve", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.serve:
        serve(str(options.before), options.serve)
        return
    size = (TOY if options.dry_run else FULL) | {"precision": options.precision}
    result: dict[str, Any] = {"machine": machine(), "size": size, "parts": {}}
    print(" ".join(f"{key}: {value}" for key, value in result["machine"].items()), file=sys.stderr)
    heads = ("part", "old, CPU s", "new, CPU s", "old / new", "quartiles")
    print(f"| {' | '.join(heads)} |\n|---{'|---:' * (len(heads) - 1)}|")
    sides = [Side(options.before, size, options.published), Side(options.after, size)]
    for part in options.parts.split(","):
        found = result["parts"][part] = measure(sides, part, options.rounds)
        low, high = found["quartiles"]
        row = f"{found['old']:.3f} | {found['new']:.3f} | {found['ratio']:.2f} | {low:.2f} to {high:.2f}"
        print(f"| {part} | {row} |", flush=True)
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + "\n")
    for side in sides:
        side.close()


if __name__ == "__main__":
    main()
