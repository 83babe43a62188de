"""Time of the probe grid (52 probes in one pass) against one probe, on frozen features and with the frozen forward.

    python benchmarks/linear_probe.py [--images 2048 --width 192 --depth 12 --classes 10 --out probe.json]

"One probe" is a single learning rate on the class token of the last block; "widest" a single rate on class and mean
tokens of the last four blocks. The forward pass is that of a plain ViT of this width and depth on 32 px images with
patches of 4 px, and happens once an epoch, as augmentation needs it; it is the same for one probe and for 52.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from mim_refiner.core.run import Run
from mim_refiner.evaluation.features import Features
from mim_refiner.evaluation.linear_probe import LinearProbeSettings, ProbeGrid, paper_sets
from mim_refiner.models.vit import create_vit


def cpu_seconds(work) -> float:  # type: ignore[no-untyped-def]
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = LinearProbeSettings(epochs=arguments.epochs)
    sets = paper_sets(range(arguments.depth), ("cls", "mean"), settings)
    labels = torch.arange(arguments.images) % arguments.classes
    values = {key: torch.randn(arguments.images, arguments.width) for key in sets[-1]}
    features = Features(values, labels, torch.arange(arguments.images), arguments.depth)

    def train(chosen, rates):  # type: ignore[no-untyped-def]
        chosen_rates = settings.model_copy(update={"learning_rates": rates})
        grid = ProbeGrid(chosen, features, arguments.classes, chosen_rates, Run())
        x = torch.cat([features[key] for key in grid.keys], 1)
        return lambda: grid.fit(lambda _: x.__getitem__, labels)

    every = settings.learning_rates
    jobs = {
        "one": train([sets[0]], every[:1]),
        "widest": train([sets[-1]], every[:1]),
        "grid": train(sets, every),
    }
    jobs["one"]()  # warm
    seconds = {name: min(cpu_seconds(job) for _ in range(2)) / arguments.epochs for name, job in jobs.items()}
    alone = [train([feature_set], (rate,)) for feature_set in sets for rate in every]
    seconds["52 one by one"] = sum(map(cpu_seconds, alone)) / arguments.epochs
    heads = max(1, arguments.width // 64)
    model = create_vit(f"vit_w{arguments.width}_d{arguments.depth}_h{heads}_p4", 32).eval()
    images = torch.randn(256, 3, 32, 32)
    with torch.inference_mode():
        model.forward_features(images[:8])
        seconds["forward"] = cpu_seconds(lambda: model.forward_features(images)) / 256 * arguments.images
    ratio = {
        "features only, grid / one": seconds["grid"] / seconds["one"],
        "features only, grid / widest": seconds["grid"] / seconds["widest"],
        "features only, one by one / grid": seconds["52 one by one"] / seconds["grid"],
        "with the forward pass, grid / one": (seconds["grid"] + seconds["forward"])
        / (seconds["one"] + seconds["forward"]),
    }
    print("| processor seconds an epoch | |\n|---|---:|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.3f} |")
    print("\n| ratio | |\n|---|---:|")
    for name, value in ratio.items():
        print(f"| {name} | {value:.2f} |")
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump({"arguments": vars(arguments), "seconds_per_epoch": seconds, "ratio": ratio}, file, indent=2)


if __name__ == "__main__":
    main()
