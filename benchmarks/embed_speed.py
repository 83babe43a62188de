"""Images/s of ``embed`` against a plain timm loop as a user would write it; same batch, precision and threads.

    python benchmarks/embed_speed.py --data cifar10_test.parquet --model src/mim_refiner/assets/mae --rounds 3

The two take turns, so that a machine with other work on it treats both alike. Whole calls are timed, from loading the
model to the written file; processor seconds are shown beside, since ``embed`` decodes in threads of its own.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image

from mim_refiner import embed


def plain_loop(model: str, data: str, out: Path, batch_size: int) -> int:
    """The class token of every image, by timm alone; returns the number of images."""
    encoder = timm.create_model(f"local-dir:{model}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))
    column = pq.read_table(data, columns=["image"]).column("image")
    features = []
    with torch.inference_mode():
        for start in range(0, len(column), batch_size):
            encoded = column[start : start + batch_size].to_pylist()
            images = torch.stack([transform(Image.open(io.BytesIO(item)).convert("RGB")) for item in encoded])
            features.append(encoder.forward_features(images)[:, 0])
    np.save(out, torch.cat(features).numpy())
    return len(column)


def ours(model: str, data: str, out: Path, batch_size: int) -> int:
    """The same by embed."""
    return int(embed(model=model, data=data, out=str(out), norm=True, batch_size=batch_size, device="cpu")["rows"])


def timed(
    function: Callable[[str, str, Path, int], int], model: str, data: str, batch_size: int
) -> tuple[float, float]:
    """Return images/s by the clock, and images per processor second."""
    with tempfile.TemporaryDirectory() as folder:
        clock, processor = time.perf_counter(), time.process_time()
        count = function(model, data, Path(folder) / "features.npy", batch_size)
        return count / (time.perf_counter() - clock), count / (time.process_time() - processor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=256)
    options = parser.parse_args()
    speeds: dict[str, list[tuple[float, float]]] = {"timm": [], "embed": []}
    for number in range(options.rounds):
        order = [("timm", plain_loop), ("embed", ours)]
        for name, function in order if number % 2 == 0 else reversed(order):
            speeds[name].append(timed(function, options.model, options.data, options.batch_size))
            clock, processor = speeds[name][-1]
            print(f"round {number} {name}: {clock:.1f} images/s, {processor:.1f} per processor second", flush=True)
    for part, what in enumerate(("images/s", "images per processor second")):
        median = {name: statistics.median(speed[part] for speed in values) for name, values in speeds.items()}
        ratio = median["embed"] / median["timm"]
        print(f"{what}: embed {median['embed']:.1f}, timm {median['timm']:.1f}, ratio {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
