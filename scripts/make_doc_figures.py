"""Draw the figures of docs/ with the package's own functions: python scripts/make_doc_figures.py (about a minute)."""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import timm
import torch
from torch.nn.functional import normalize

from mim_refiner import NeighborQueue, analyze, layer_decay_scales, nna_loss, warmup_cosine
from mim_refiner.core.schedules import peak_learning_rate
from mim_refiner.report.figures import legend
from mim_refiner.report.panels import Panel, block_curve_panels, finish, new_figure
from mim_refiner.training.recipes import REFINE_RECIPES

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "figures"
BLUE, RED, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#555555"


def block_curves() -> Panel:
    """k-NN by block of the two shipped encoders."""
    with as_file(files("mim_refiner") / "assets") as assets, tempfile.TemporaryDirectory() as out:
        analyze(
            model=str(assets / "mae"),
            compare=str(assets / "refined"),
            data=str(assets / "cifar10_train.parquet"),
            test=str(assets / "cifar10_test.parquet"),
            out=out,
        )
        record = json.loads((Path(out) / "blocks.json").read_text())
    return block_curve_panels(record)[0]


def schedule() -> Panel:
    """Learning rate of both phases of mae_l16, by epoch."""
    recipe = REFINE_RECIPES["mae_l16"]()
    figure, axis = new_figure()
    start = 0
    for name, phase, colour in (("warm-up", recipe.warmup, GREY), ("refinement", recipe.refinement, BLUE)):
        steps = np.arange(phase.epochs * 100)
        peak = peak_learning_rate(phase.base_lr, recipe.batch_size)
        rates = [
            warmup_cosine(int(step), total_steps=len(steps), warmup_steps=int(phase.warmup_epochs * 100), peak=peak)
            for step in steps
        ]
        axis.plot(start + steps / 100, rates, color=colour, label=f"{name}, peak {peak:.2g}")
        start += phase.epochs
    axis.set_xlabel("epoch")
    axis.set_ylabel("learning rate")
    legend(axis)
    return finish(figure, "schedule", "learning rate of recipe mae_l16", "Two phases, each linear warm-up and cosine.")


def layer_decay() -> Panel:
    """Scale of the learning rate by block of a ViT-L."""
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch16_224", num_classes=0)
    decay = REFINE_RECIPES["mae_l16"]().refinement.layer_decay
    scales = layer_decay_scales(model, decay)
    figure, axis = new_figure()
    blocks = range(len(model.blocks))
    axis.bar(blocks, [scales[f"blocks.{block}.norm1.weight"] for block in blocks], color=BLUE)
    axis.set_xlabel("encoder block (from 0)")
    axis.set_ylabel(f"scale at layer decay {decay}")
    return finish(figure, "layer_decay", "scale of the learning rate by block", "Late blocks move, early ones hardly.")


def alignment() -> Panel:
    """Target, its neighbour in a queue, prediction and negatives on the unit circle, with the loss they give."""
    generator = torch.Generator().manual_seed(3)
    queue = NeighborQueue(size=24, dim=2)
    queue.entries.copy_(torch.randn(24, 2, generator=generator))
    angles = torch.tensor([1.15, 2.6, 3.9, 5.4])
    targets = torch.stack([angles.cos(), angles.sin()], dim=1)
    shifted = angles + torch.tensor([-0.55, 0.2, -0.3, 0.25])
    predicted = torch.stack([shifted.cos(), shifted.sin()], dim=1)
    neighbors = normalize(queue.lookup(targets).neighbors, dim=1)
    loss = float(nna_loss(predicted, targets, neighbors, 0.2))
    figure, axis = new_figure()
    axis.set_aspect("equal")
    axis.grid(False)
    axis.set_axis_off()
    circle = np.linspace(0, 2 * np.pi, 200)
    axis.plot(np.cos(circle), np.sin(circle), color="#dddddd", linewidth=1, zorder=0)
    entries = normalize(queue.entries, dim=1)
    axis.scatter(entries[:, 0], entries[:, 1], s=14, color=GREY, label="queue", alpha=0.6)
    axis.scatter(*targets[0], s=60, color=BLUE, label="target t")
    axis.scatter(*neighbors[0], s=60, color=GREEN, marker="s", label="neighbour n(t)")
    axis.scatter(*predicted[0], s=60, color=RED, marker="^", label="prediction p")
    axis.scatter(predicted[1:, 0], predicted[1:, 1], s=40, color=RED, marker="x", label="other images' p")
    legend(axis)
    arrow = {"arrowstyle": "->", "color": GREEN, "linewidth": 1.6, "connectionstyle": "arc3,rad=0.25"}
    axis.annotate("", xy=tuple(0.97 * neighbors[0]), xytext=tuple(0.97 * predicted[0]), arrowprops=arrow)
    for other in predicted[1:]:
        push = {"arrowstyle": "->", "color": RED, "linewidth": 0.9, "linestyle": "--"}
        axis.annotate("", xy=tuple(0.9 * other), xytext=tuple(0.55 * targets[0]), arrowprops=push)
    axis.text(0, -0.42, f"loss of these four images {loss:.2f}", ha="center", fontsize=8, color="#222222")
    return finish(figure, "alignment", "nearest neighbour alignment", "Prediction is pulled to the neighbour.")


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = sys.argv[1:]
    for name, draw in {"block_curves": block_curves, "schedule": schedule, "layer_decay": layer_decay,
                       "alignment": alignment}.items():  # fmt: skip
        if wanted and name not in wanted:
            continue
        svg = base64.b64decode(draw().svg.partition(",")[2])
        (FOLDER / f"{name}.svg").write_bytes(svg)
        print(f"docs/figures/{name}.svg: {len(svg) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
