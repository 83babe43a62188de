"""All benchmarks of a machine in one go, each part in a process of its own: a table, and a JSON file.

    python benchmarks/run.py --json bench.json                     on a CPU: a ViT of 12 blocks on 32 px images
    python benchmarks/run.py --size vit_l --json bench.json        on a GPU: twelve views, eight heads, ViT-L/16, bf16
    python benchmarks/run.py --size vit_l --processes 8            and how it scales over eight GPUs

Parts: step (plain, cached, with data, frozen prefix), processes, data (decode and crops beside Pillow), knn.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SIZES = {
    "cpu": ("--batch 64 --micro-batch 16", 4),
    "vit_b": ("--size vit_b --precision bf16 --batch 256 --micro-batch 64", 4),
    "vit_l": ("--size vit_l --precision bf16 --batch 96 --micro-batch 32", 8),
}  # options of step.py, and how many blocks the frozen variant freezes


def python(*words: str, processes: int = 1) -> str:
    """Standard output of a script of this folder; its messages pass through."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launch, str(HERE / words[0]), *words[1:]]
    print("$ " + " ".join(["python", *command[1:]]).replace(str(HERE), "benchmarks"), file=sys.stderr, flush=True)
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def step(size: str, more: str = "", processes: int = 1) -> Any:
    return json.loads(python("step.py", *SIZES[size][0].split(), *more.split(), processes=processes).splitlines()[-1])


def knn(file: Path) -> dict[str, Any]:
    """One run of every contender of knn.py (on the CPU); its peak is what comes on top of the inputs."""
    python("knn.py", "--out", str(file))
    runs = json.loads(file.read_text())["runs"]
    file.unlink()
    return {
        run["contender"]: {
            "seconds": run["wall_s"],
            "cpu_seconds": run["cpu_s"],
            "peak_bytes": run["peak_above_inputs_bytes"],
        }
        for run in runs
    }


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| what | seconds | CPU seconds | images/s | MFU | peak GB |", "|---|---:|---:|---:|---:|---:|"]
    for name, result in results.items():
        for part, found in result.get("parts", {name: result}).items():
            if "seconds" in found:
                keys = ("seconds", "cpu_seconds", "images_per_s", "mfu")
                cells = [f"{found[key]:.3g}" if key in found else "" for key in keys]
                words = part if part == name else f"{name}: {part}"
                lines.append(f"| {words} | {' | '.join(cells)} | {found['peak_bytes'] / 1e9:.2f} |")
    for stage, value in results.get("data", {}).get("crops", {}).items():
        if stage != "image":  # which says what was decoded
            lines.append(f"| data, ms of CPU an image: {stage} | | {value} | | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--parts", default="step,data,knn", help="of step, data, knn, separated by commas")
    parser.add_argument("--processes", type=int, default=1, help="more than 1: measures the step over so many, too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    parts = options.parts.split(",")
    scratch = options.json or Path("benchmark")
    if "step" in parts:
        results["one process"] = step(options.size)
        frozen = SIZES[options.size][1]
        results[f"first {frozen} blocks frozen"] = step(options.size, f"--frozen {frozen} --only step;cached")
        if options.processes > 1:
            results[f"{options.processes} processes"] = step(options.size, "--only step;cached", options.processes)
    if "data" in parts:
        file = scratch.with_suffix(".data.json")
        python("data_path.py", "--part", "crops", "--json", str(file))
        results["data"] = json.loads(file.read_text())
        file.unlink()
    if "knn" in parts:
        results["k-NN, 10,000 on 50,000 x 768"] = {"parts": knn(scratch.with_suffix(".knn.json"))}
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
