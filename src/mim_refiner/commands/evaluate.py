"""``evaluate``: the protocols on one encoder, or on two side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mim_refiner.analysis.verdict import verdict
from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.commands.runs import open_images
from mim_refiner.core.device import pick_device
from mim_refiner.core.identity import weights_sha256
from mim_refiner.evaluation.results import Result
from mim_refiner.evaluation.settings import EvaluationSettings
from mim_refiner.evaluation.suite import evaluate_backbone
from mim_refiner.reporting import NullReporter, Reporter


def evaluate(
    *,
    model: str,
    data: str,
    test: str | None = None,
    compare: str | None = None,
    protocols: Sequence[str] = ("knn", "linear", "clustering"),
    blocks: str = "-1",
    pooling: Sequence[str] | None = None,
    norm: bool = False,
    out: str | None = None,
    settings: list[str] | None = None,
    device: str = "auto",
    seed: int = 0,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Measure frozen features of ``model`` (and of ``compare`` in the same way) on labelled images.

    Returns {"results": [one record a number]}, with ``compare`` also {"change": [paired differences]}; with ``out``
    every number is a JSON file in evaluation/ there. Raises MimRefinerError with one line on bad input.
    """
    reporter = reporter or NullReporter()
    torch_device = pick_device(device)
    backbones = {"": load_backbone(model)} | ({"compare-": load_backbone(compare)} if compare else {})
    train = open_images(data, reporter, channels=backbones[""].info.in_chans)
    held_out = open_images(test, reporter, channels=train.channels) if test else None
    sources = {"": model, "compare-": compare or ""}
    found = {
        prefix: evaluate_backbone(
            backbone,
            train,
            held_out,
            protocols=protocols,
            blocks=blocks,
            poolings=pooling,
            norm=norm,
            settings=EvaluationSettings.from_overrides(settings or []),
            out_dir=out,
            name_prefix=prefix,
            model_sha256=weights_sha256(backbone.model),
            device=torch_device,
            seed=seed,
            reporter=reporter,
        )
        for prefix, backbone in backbones.items()
    }
    reporter.done()
    summary: dict[str, Any] = {
        "results": [_row(sources[prefix], result) for prefix, results in found.items() for result in results.values()]
    }
    if compare:
        summary["change"] = [
            {"metric": result.metric, "block": result.block, "pooling": result.pooling}
            | verdict(result.correct, other.correct, measure=result.metric)
            for name, result in found[""].items()
            if (other := found["compare-"].get(name)) and result.correct is not None and other.correct is not None
        ]
    if out:
        summary["out"] = str(Path(out) / "evaluation")
    return summary


def _row(model: str, result: Result) -> dict[str, Any]:
    keys = ("metric", "value", "ci95", "block", "pooling")
    return {"model": model} | {key: value for key, value in result.to_json().items() if key in keys}
