"""``analyze``: k-NN accuracy of every block, for one encoder or before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mim_refiner.analysis.blocks import knn_by_block
from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.commands.runs import open_images
from mim_refiner.core.device import pick_device
from mim_refiner.report.figures import block_curves
from mim_refiner.reporting import NullReporter, Reporter


def analyze(
    *,
    model: str,
    data: str,
    out: str,
    compare: str | None = None,
    test: str | None = None,
    device: str = "auto",
    seed: int = 0,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Measure and draw the k-NN accuracy of every block and pooling of ``model``, and of ``compare`` beside it.

    With ``compare``, ``model`` is "before" and ``compare`` "after". Writes blocks.json, blocks.npz (per-image hits)
    and block_curves.png to ``out``. Returns the curves with their peaks. Raises MimRefinerError on bad input.
    """
    reporter = reporter or NullReporter()
    torch_device = pick_device(device)
    models = {"before": load_backbone(model)}
    if compare:
        models["after"] = load_backbone(compare)
    train = open_images(data, reporter, channels=models["before"].info.in_chans)
    held_out = open_images(test, reporter, channels=train.channels) if test else None
    curves = knn_by_block(models, train, held_out, device=torch_device, seed=seed, reporter=reporter)
    record = curves.write(out)
    figure = block_curves(curves.record, Path(out) / "block_curves.png")
    reporter.done()
    return {
        "curves": curves.record["curves"],
        "change": curves.record["change"],
        "statements": curves.record["statements"],
        "record": str(record),
        "figure": str(figure),
    }
