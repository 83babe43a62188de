"""k-NN side by side with the protocol written plainly: one float32 matrix of all cosines, then topk.

    python benchmarks/knn.py [--bank 50000 --test 10000 --dim 768] [--out knn.json]
    python benchmarks/knn.py --memory 100000 --dim 1024      # peak memory of a half-precision bank, with the formula

Each contender runs in a process of its own. Reported: wall and processor seconds, and how far the peak of memory rises
above what the process held with its inputs (bank, test, labels) in place.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

CONTENDERS = ("plain", "chunked-fp32", "chunked")


def features(rows: int, dim: int, seed: int):  # type: ignore[no-untyped-def]
    """100 classes: a random centre each, and noise that makes k-NN right most of the time but not always."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(100, dim, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(100, (rows,), generator=generator)
    return centres[labels] + 4 * torch.randn(rows, dim, generator=generator), labels


def plain(train_x, train_y, test_x, k=10, temperature=0.07):  # type: ignore[no-untyped-def]
    """The protocol's description, word by word (method section 6)."""
    import torch.nn.functional as F

    mean, std = train_x.mean(0), train_x.std(0) + 1e-6
    train_x, test_x = F.normalize((train_x - mean) / std, dim=1), F.normalize((test_x - mean) / std, dim=1)
    cosines, nearest = (test_x @ train_x.T).topk(k, dim=1)
    votes = F.one_hot(train_y[nearest], int(train_y.max()) + 1) * (cosines / temperature).exp()[:, :, None]
    return votes.sum(1).argmax(1)


def peak_bytes() -> int:
    """Largest resident size since the start, or since ``forget_peak``."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def forget_peak() -> None:
    """Let the peak start anew at the present size (Linux)."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def measure(name: str, bank: int, tests: int, dim: int) -> dict[str, object]:
    """Run one contender in this process."""
    import torch

    from mim_refiner.core import knn
    from mim_refiner.core.knn import knn_predict

    torch.set_num_threads(1)
    train_x, train_y = features(bank, dim, 0)
    test_x, test_y = features(tests, dim, 1)
    run = {
        "plain": lambda: plain(train_x, train_y, test_x),
        "chunked-fp32": lambda: knn_predict(train_x, train_y, test_x),
        "chunked": lambda: knn_predict(train_x, train_y, test_x),
    }[name]
    if name == "chunked-fp32":  # candidates are found without 8-bit integers
        knn.search_dtype = lambda features: features.dtype
    warm = features(300, dim, 2)
    knn_predict(*warm, warm[0])
    forget_peak()
    held, wall, cpu = peak_bytes(), time.perf_counter(), time.process_time()
    predicted = run()
    return {
        "contender": name,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "peak_above_inputs_bytes": peak_bytes() - held,
        "accuracy": float((predicted == test_y).float().mean()),
        "predictions_sha256": __import__("hashlib").sha256(predicted.numpy().tobytes()).hexdigest(),
    }


def memory(rows: int, dim: int) -> dict[str, object]:
    """Peak memory of a process that holds a half-precision bank and classifies 1,000 rows with it."""
    import torch

    from mim_refiner.core.knn import knn_predict

    torch.set_num_threads(1)
    before = peak_bytes()
    bank, labels = torch.empty(rows, dim, dtype=torch.float16), torch.arange(rows) % 1000
    for part in bank.split(8192):
        part.copy_(torch.randn(len(part), dim))
    start = time.perf_counter()
    knn_predict(bank, labels, torch.randn(1000, dim, dtype=torch.float16))
    rise = peak_bytes() - before
    bank_bytes = rows * (2 * dim + 8)
    fixed = rise - bank_bytes
    whole = 1_281_167 * (2 * 1024 + 8) + fixed * max(1, 1024 / dim) + before
    return {
        "bank": [rows, dim],
        "bank_bytes": bank_bytes,
        "rise_bytes": rise,
        "beside_the_bank_bytes": fixed,
        "libraries_bytes": before,
        "formula": "N (2 D + 8) bytes of bank and labels + tiles (16,384 x D, 256 x 16,384) + libraries",
        "expected_for_1.28M_x_1024_bytes": int(whole),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bank", type=int, default=50_000)
    parser.add_argument("--test", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out")
    parser.add_argument(
        "--memory", type=int, help="measure the memory of a half-precision bank of so many rows instead"
    )
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(memory(arguments.memory, arguments.dim), indent=2))
        return
    if arguments.contender:
        print(json.dumps(measure(arguments.contender, arguments.bank, arguments.test, arguments.dim)))
        return
    found: list[dict[str, object]] = []
    for repeat in range(arguments.repeats):  # in turn, so that a busy machine is equally busy for all
        for name in CONTENDERS:
            command = [sys.executable, __file__, "--contender", name]
            for key in ("bank", "test", "dim"):
                command += [f"--{key}", str(getattr(arguments, key))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append({"repeat": repeat, **json.loads(done.stdout)})
    best = {
        name: min((row for row in found if row["contender"] == name), key=lambda row: float(str(row["cpu_s"])))
        for name in CONTENDERS
    }
    print("| contender | wall s | CPU s | speed (CPU) | peak above inputs | of plain | accuracy | same predictions |")
    print("|---|---:|---:|---:|---:|---:|---:|---|")
    base = best["plain"]
    for name, row in best.items():
        speed = float(str(base["cpu_s"])) / float(str(row["cpu_s"]))
        share = int(str(row["peak_above_inputs_bytes"])) / int(str(base["peak_above_inputs_bytes"]))
        same = "yes" if row["predictions_sha256"] == base["predictions_sha256"] else "no"
        rise = int(str(row["peak_above_inputs_bytes"])) / 1e6
        print(
            f"| {name} | {row['wall_s']:.2f} | {row['cpu_s']:.2f} | {speed:.2f}x | {rise:.0f} MB | {share:.3f} "
            f"| {row['accuracy']:.4f} | {same} |"
        )
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump({"arguments": vars(arguments), "runs": found}, file, indent=2)


if __name__ == "__main__":
    main()
