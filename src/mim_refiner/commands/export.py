"""``export``: an encoder in a format that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.commands.runs import open_images
from mim_refiner.data.loaders import eval_batches
from mim_refiner.data.photometric import normalize
from mim_refiner.errors import InputError
from mim_refiner.export.timm import export_timm
from mim_refiner.reporting import NullReporter, Reporter

CHECK_IMAGES = 16


def export(
    *,
    model: str,
    out: str,
    format: str = "timm",
    data: str | None = None,
    device: str = "auto",
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Write ``model`` to the folder ``out`` as timm loads it, and compare its outputs with ours.

    ``data``: images for that comparison (default: random ones). Returns the report with the largest difference.
    Raises MimRefinerError on bad input, or when the exported model differs.
    """
    reporter = reporter or NullReporter()
    if format != "timm":
        raise InputError(f"--format {format}: unknown format; use timm")
    backbone = load_backbone(model)
    check_images = None
    if data:
        images = open_images(data, reporter, channels=backbone.info.in_chans)
        batch, _ = next(eval_batches(images, backbone.info.image_size[0], CHECK_IMAGES))
        check_images = normalize(batch, backbone.info.mean, backbone.info.std)
    report = export_timm(backbone, Path(out), card={"base": Path(model).name}, check_images=check_images)
    reporter.done()
    return report
