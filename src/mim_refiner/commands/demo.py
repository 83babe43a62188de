"""``demo``: the whole story, offline, on images and weights that travel with the package."""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from mim_refiner.commands.refine import refine_and_compare
from mim_refiner.reporting import NullReporter, Reporter

SMOKE_SETTINGS = ["warmup.epochs=1", "refinement.epochs=1", "warmup.warmup_epochs=0", "refinement.warmup_epochs=0"]


def demo(
    *,
    out: str = "demo-out",
    smoke: bool = False,
    device: str = "auto",
    seed: int = 0,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Refine the shipped masked autoencoder on the shipped CIFAR-10 subset and compare it with the full refinement.

    ``out`` becomes a run folder as of ``refine``; its summary also has "full", the shipped full refinement.
    ``smoke``: a few steps on a few images, to see that everything runs. Raises MimRefinerError on bad input.
    """
    reporter = reporter or NullReporter()
    with as_file(files("mim_refiner") / "assets") as assets:
        made = json.loads((assets / "weights.json").read_text())
        for weights in made.values():
            reporter.message(f"shipped weights: {weights['what']}; made on {weights['date']} by: {weights['command']}")
        cut = "[:512]" if smoke else ""
        summary = refine_and_compare(
            data=str(assets / "cifar10_train.parquet") + cut,
            model=str(assets / "mae"),
            out=out,
            recipe="demo",
            eval_data=str(assets / "cifar10_train.parquet") + cut,
            eval_test=str(assets / "cifar10_test.parquet") + ("[:256]" if smoke else ""),
            settings=SMOKE_SETTINGS if smoke else [],
            device=device,
            seed=seed,
            overwrite=False,
            reporter=reporter,
            others={"full": str(assets / "refined")},
        )
    reporter.message(f"block curves: {Path(out) / 'block_curves.png'}; the encoder for timm: {Path(out) / 'export'}")
    return summary
