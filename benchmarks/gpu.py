"""Everything that only a GPU can tell, in a few minutes: parts with a time box each, each with a JSON file of its own.

    python benchmarks/gpu.py --out results                                  all parts, one after the other
    python benchmarks/gpu.py --out results --parts check,vit_l --box vit_l=120
    python benchmarks/gpu.py --out results --dry-run                        every part at toy size on the CPU

check    golden vectors, photometrics, k-NN, a step (plain, cached) and a resumed run: the device against the CPU
vit_l    ViT-L/16, 2 x 224 + 10 x 96 px, 8 heads, bf16: plain, with checkpointing, cached at 1,024, compiled and not
vit_b    the same with ViT-B/16 and 4 heads
small    192 wide, 12 deep, patch 4, 32 px: the step alone, and ``refine`` with its data path
profile  the dearest kernels, launches and host waits of a step, small and ViT-L
train    masked autoencoders and their refinements on CIFAR-10 within the box; goes on where it stood (gpu_train.py)

A part is a process; when its box is over it is ended and keeps what it has written. A file holds the device, the
measured speed of its matrix product, and the results so far; ``error`` says what went wrong. Nothing needs to be
installed: this repository's src comes first on the path, beside it only the runtime dependencies are used.

A machine without a network, lent for 15 minutes, that is sent at most 64 MiB a call, starts in one or two of these
minutes, and sends at most 8 files of 16 MiB back. Before, where there is a network, in the root of the checkout:

    echo .whl/ >> .git/info/exclude; echo .gpu/ >> .git/info/exclude
    python3 -m pip download -c constraints.txt --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp --platform manylinux_2_17_x86_64 --platform manylinux_2_28_x86_64 -d .whl \
        pydantic pydantic-core annotated-types typing-inspection timm    (6 MB; and what else it lacks, but no torch)
    python benchmarks/gpu.py --pack 'cifar10_train-*.parquet' --to .gpu  (writes train-0 to train-2, 30 MB each)
    python benchmarks/gpu.py --pack cifar10_test.parquet --to .gpu       (writes test-0, 18 MB)

Then there, one call after the other on the same machine without a pause, each with .whl and one piece beside the
repository (20 MB), each beginning with ``pip install -q --no-index --no-deps --upgrade --target /tmp/site .whl/*.whl;
export PYTHONPATH=/tmp/site;`` and then ``python benchmarks/gpu.py --out $OUT --work /tmp/gpu --keep .gpu/*.parquet``
(pieces are kept in --work, outside of what a call replaces; results leave by --out):

    1. train-0   --parts check,vit_l              at most 210 s: is it right, and the goals of ViT-L/16
    2. train-1   --parts small                    at most 90 s
    3. train-2   --parts profile                  at most 60 s
    4. test-0    --parts train --box train=SECONDS   what is left, less 40 s; two encoders and two refined ones, 11 MB
                                                  each in bf16, and their scores
    5. (none)    the fourth again without --keep, if it says "unfinished" and there is time; vit_b where there is more

Afterwards ``python benchmarks/gpu.py --unpack results --to encoders`` makes timm folders of the trained weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
BOXES = {"check": 60, "vit_l": 150, "small": 90, "profile": 60, "vit_b": 60, "train": 360}  # seconds, in this order
GRACE = 20  # seconds that a part gets to end by itself
WIDTH = 100  # of a line on the screen


class Results:
    """The JSON file of one part, written anew with every value, and the time that the part has left."""

    def __init__(self, path: Path, seconds: float, values: dict[str, Any] | None = None) -> None:
        self.path, self.end = path, time.monotonic() + seconds
        self.values: dict[str, Any] = {"box_seconds": seconds, **(values or {})}

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def put(self, **values: Any) -> None:
        from mim_refiner.files import write_json

        self.values |= values
        write_json(self.path, self.values)
        for key, value in values.items():
            newest = dict(list(value.items())[-1:]) if isinstance(value, dict) else value
            line = f"{self.path.stem}: {key}: {in_short(newest)}"
            print(line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…", file=sys.stderr, flush=True)


def in_short(value: Any) -> str:
    """For a line of the screen; the file has all of it."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {in_short(item)}" for key, item in value.items())
    if isinstance(value, list):
        return f"{len(value)} listed"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def facts(device: str) -> dict[str, Any]:
    """What a figure has to be read with."""
    import torch

    found: dict[str, Any] = {"python": sys.version.split()[0], "torch": torch.__version__, "cores": os.cpu_count()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "device_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found | {"device": found.get("device", "cpu")}


def run_part(name: str, options: argparse.Namespace, seconds: float) -> Results:
    """Run a part in this process; an error goes into its file and is raised."""
    import gpu_check
    import gpu_parts
    import gpu_train
    import torch

    device = "cuda" if torch.cuda.is_available() and not options.dry_run else "cpu"
    if device == "cpu" and not options.dry_run:
        raise SystemExit("torch sees no GPU here; --dry-run walks the parts on the CPU")
    if device == "cpu":
        torch.set_num_threads(1)
        os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler tells of the missing GPU as an error
    results = Results(options.out / f"{name}.json", seconds, {"part": name, "dry_run": options.dry_run})
    results.put(facts=facts(device))
    parts: dict[str, Callable[..., None]] = {**gpu_parts.PARTS, "check": gpu_check.check, "train": gpu_train.train}
    started = time.monotonic()
    try:
        parts[name](results, options, torch.device(device))
        results.put(finished=True, seconds=round(time.monotonic() - started, 1))
    except BaseException:
        results.put(finished=False, error=traceback.format_exc()[-4000:])
        raise
    return results


def run_apart(name: str, options: argparse.Namespace, words: list[str], seconds: float) -> bool:
    """Run a part in a process of its own, for at most its box; True if it ended well."""
    command = [sys.executable, __file__, *words, "--child", name, "--box", f"{name}={seconds:.0f}"]
    file, started = options.out / f"{name}.json", time.time()
    child = subprocess.Popen(command, process_group=0)  # of its own, so that what it starts ends with it
    try:
        return child.wait(seconds + (GRACE if name == "train" else 0)) == 0
    except subprocess.TimeoutExpired:
        if file.exists() and file.stat().st_mtime >= started and json.loads(file.read_text()).get("finished"):
            return True  # it only had not left yet: a busy machine takes long to load torch, and to let go of it
        print(f"{name}: its {seconds:.0f} s are over; what it wrote stays", file=sys.stderr, flush=True)
        return False
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def keep(pieces: list[Path], work: Path) -> Path:
    """Copy pieces of data to where the next call finds them."""
    folder = work / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for piece in pieces:
        shutil.copyfile(piece, folder / f".{piece.name}")
        (folder / f".{piece.name}").replace(folder / piece.name)
    return folder


def pack(pattern: str, target: Path, megabytes: float) -> list[Path]:
    """Rewrite Parquet files as pieces of at most so many megabytes, named after the first word of theirs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(Path().glob(pattern)) if not Path(pattern).is_absolute() else sorted(Path("/").glob(pattern[1:]))
    if not files:
        raise SystemExit(f"--pack {pattern}: no such file")
    table = pa.concat_tables(pq.read_table(file) for file in files)
    pieces = -(-sum(file.stat().st_size for file in files) // int(megabytes * 1e6 * 0.98))
    rows = -(-len(table) // pieces)
    target.mkdir(parents=True, exist_ok=True)
    stem = "test" if "test" in files[0].name else "train"
    written = []
    for number in range(pieces):
        written.append(target / f"{stem}-{number}.parquet")
        pq.write_table(table.slice(number * rows, rows), written[-1], compression="zstd")
        print(f"{written[-1]}: {written[-1].stat().st_size / 1e6:.1f} MB")
    return written


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("gpu-results"), help="folder for the JSON files and weights")
    add("--parts", default=",".join(BOXES), help="names separated by commas, in the order to run them")
    add("--box", default="", help="seconds of parts where others are wanted: vit_l=120,train=300")
    add("--dry-run", action="store_true", help="toy sizes on the CPU")
    add("--work", type=Path, default=Path("gpu-work"), help="folder that stays between calls: data, run folders")
    add("--keep", type=Path, nargs="*", default=[], help="pieces of data to copy there first")
    add("--decoders", default="1x64,4x192", help="train: depth x width of the autoencoders' decoders, side by side")
    add("--arch", default="vit_w192_d12_h3_p4", help="train: the encoder")
    add("--mae-epochs", type=int, default=400, help="train: at most; fewer where the box is too short")
    add("--refine-epochs", type=int, default=150)
    add("--batch", type=int, default=512, help="train: images a step")
    add("--mae-set", action="append", default=[], help="train: a setting of pretrain, key=value")
    add("--refine-set", action="append", default=[], help="train: a setting of refine, key=value")
    add("--start", type=Path, help="train: a folder of timm folders mae-<decoder> to refine, in place of training them")
    add("--pack", help="Parquet files to cut into pieces, then end")
    add("--unpack", type=Path, help="results of train to turn into timm folders, then end")
    add("--to", type=Path, default=Path(".gpu"))
    add("--megabytes", type=float, default=30)
    add("--child", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    options = parse(words)
    if options.pack:
        pack(options.pack, options.to, options.megabytes)
        return 0
    if options.unpack:
        from gpu_train import unpack

        unpack(options.unpack, options.to)
        return 0
    boxes = BOXES | {
        name: float(text) for name, _, text in (item.partition("=") for item in options.box.split(",")) if text
    }
    if options.child:
        run_part(options.child, options, boxes[options.child])
        return 0
    unknown = set(options.parts.split(",")) - BOXES.keys()
    if unknown:
        raise SystemExit(f"--parts: unknown {', '.join(sorted(unknown))}; there are {', '.join(BOXES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    keep(options.keep, options.work)
    wrong = [name for name in options.parts.split(",") if not run_apart(name, options, words, boxes[name])]
    print("ended well: all" if not wrong else f"did not end well: {', '.join(wrong)} (see their files)")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
