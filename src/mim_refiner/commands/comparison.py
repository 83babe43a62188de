"""Measure encoders before and after on the same images, and say whether it helped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mim_refiner.analysis.blocks import curves_from_results
from mim_refiner.analysis.label_free import MIN_IMAGES
from mim_refiner.analysis.verdict import verdict
from mim_refiner.commands.survey import Samples, atlas_of, choose_samples, default_key, judged_without_labels
from mim_refiner.core.identity import weights_sha256
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.source_base import sliced
from mim_refiner.evaluation.results import Result, result_name
from mim_refiner.evaluation.settings import EvaluationSettings
from mim_refiner.evaluation.suite import evaluate_backbone, summary_metrics
from mim_refiner.files import write_json
from mim_refiner.models.backbone import Backbone
from mim_refiner.report.figures import block_curves

SUMMARY_TRAIN_LIMIT, SUMMARY_TEST_LIMIT = 10_000, 5_000  # evenly spaced images: quick, and stated in the JSON
TOO_FEW = {
    "verdict": "not measured",
    "reason": f"a verdict without labels needs {MIN_IMAGES} images or more; give them, or labels by --eval-data",
}


def compare(
    stages: Mapping[str, Backbone],
    train: ImageSet,
    test: ImageSet | None,
    *,
    pooling: str,
    head_blocks: Sequence[int],
    out: Path,
    run: Run,
) -> dict[str, Any]:
    """Evaluate the encoders {"before": ..., "after": ...[, "full": ...]} and return their summary entries,
    the verdict, and the features of "after" to use ("recommendation").

    With labels: k-NN of every block, linear probe, clustering and effective rank of the last one; writes
    evaluation/<stage>-<name>.json, evaluation/blocks.json and block_curves.png. Without labels: effective
    rank, and the verdict of the label-free measures. evaluation/atlas-after.json is what the recommendation is by.
    """
    labelled = train.labels is not None and (test is None or test.labels is not None)
    protocols = ("knn", "linear", "clustering", "rank") if labelled else ("rank",)
    results: dict[str, dict[str, Result]] = {}
    for stage, backbone in stages.items():
        run.reporter.message(f"evaluating: {stage}")
        results[stage] = evaluate_backbone(
            backbone,
            train,
            test,
            protocols=protocols,
            blocks=(-1,),
            knn_blocks="all",
            settings=EvaluationSettings.quick(precision=run.precision),
            out_dir=out,
            name_prefix=f"{stage}-",
            model_sha256=weights_sha256(backbone.model),
            run=run,
        )
    last = next(iter(stages.values())).info.depth - 1
    summary: dict[str, Any] = {
        stage: summary_metrics(found, block=last, pooling=pooling) for stage, found in results.items()
    }
    samples = choose_samples(train, test, seed=run.seed)
    enough = labelled or len(samples.view_rows) >= MIN_IMAGES
    summary["recommendation"] = _recommended(stages["after"], samples, run, pooling, enough, out)
    if not labelled:
        summary["verdict"] = judged_without_labels(stages, samples, run, pooling=pooling) if enough else TOO_FEW
        return summary
    curves = curves_from_results(results, head_blocks=head_blocks)
    curves.write(out / "evaluation")
    block_curves(curves.record, out / "block_curves.png")
    key = result_name("knn_top1", last, pooling)
    before, after = results["before"][key].correct, results["after"][key].correct
    assert before is not None  # k-NN results carry them
    assert after is not None
    summary["verdict"] = verdict(before, after)
    for stage in list(stages)[2:]:
        further = results[stage][key].correct
        assert further is not None
        summary["verdict"][stage] = verdict(before, further)
    summary["verdict"]["statements"] = curves.record["statements"]
    return summary


def _recommended(
    backbone: Backbone, samples: Samples, run: Run, pooling: str, enough: bool, out: Path
) -> dict[str, Any]:
    """Block, pooling and norm to use, by the atlas; the usual ones when there are too few images to tell."""
    if enough:
        atlas, _ = atlas_of(backbone, samples, run, name="after", pooling=pooling, probe=False, both=False)
        write_json(out / "evaluation" / "atlas-after.json", atlas.record)  # the report draws it
        return atlas.recommendation
    block, pooling, norm = default_key(backbone.info, pooling)
    return {"block": block, "pooling": pooling, "norm": norm, "reason": "the usual features: too few images to measure"}


def thinned(images: ImageSet, limit: int) -> ImageSet:
    """Every n-th image so that at most ``limit`` remain (even over sorted class folders)."""
    step = math.ceil(len(images) / limit)
    if step <= 1:
        return images
    return ImageSet(sliced(images.source, slice(None, None, step), f"[::{step}]"), channels=images.channels)
