"""Measure encoders before and after on the same images, and say whether it helped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from mim_refiner.analysis.blocks import curves_from_results
from mim_refiner.analysis.label_free import MIN_IMAGES
from mim_refiner.analysis.verdict import verdict, what_next
from mim_refiner.commands.deadline import REPORT, Box, OutOfTimeError
from mim_refiner.commands.dense import dense_change
from mim_refiner.commands.inputs import check_pair, open_images
from mim_refiner.commands.monitor import TRAINED_ON
from mim_refiner.commands.survey import Samples, default_key, thinned
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.duplicates import compare_images
from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError, InputError
from mim_refiner.evaluation.clustering import said_of_few
from mim_refiner.evaluation.results import Result
from mim_refiner.evaluation.settings import EvaluationSettings
from mim_refiner.evaluation.splits import stratified_split
from mim_refiner.evaluation.suite import evaluate_backbone, summary_metrics, write_results
from mim_refiner.files import name_of, write_json
from mim_refiner.models.backbone import Backbone
from mim_refiner.report.figures import block_curves, read_metrics
from mim_refiner.reporting import number_of
from mim_refiner.training.recipe import RefineRecipe

SUMMARY_TRAIN_LIMIT, SUMMARY_TEST_LIMIT = 10_000, 5_000  # evenly spaced images: quick, and stated in the JSON
KNN_K = EvaluationSettings().knn_k


@dataclass(frozen=True)
class Measured:
    """The labelled images to measure on, as far as they can be, by ``k`` neighbours; settled before step 1."""

    bank: ImageSet
    test: ImageSet | None
    k: int = KNN_K
    says: str = ""  # a sentence for the verdict: whether the test images were trained on

    @property
    def tested(self) -> ImageSet:
        """The images that accuracies are of."""
        return self.bank if self.test is None else self.test

    def bytes_beside(self, images: ImageSet) -> int:
        """What they take in memory beside the training ``images``."""
        return sum(each.nbytes for each in (self.bank, self.test) if each is not None and each is not images)

    def facts(self) -> dict[str, str | None]:
        """What they are known by."""
        sets = {"bank": self.bank, "test": self.test}
        return {name: None if images is None else images.source.fingerprint() for name, images in sets.items()}


def said_of_training(images: ImageSet, on: Measured, *, held_out: bool) -> str:
    """Say whether the images to measure on are among the training ``images``, as far as samples of both tell."""
    if held_out:
        return f"Measured on {number_of(len(on.tested), 'images')}, held out of training."
    tested = on.tested.source
    if tested is images.source:
        return TRAINED_ON
    if on.test is not None and on.bank.source.fingerprint() == images.source.fingerprint():
        shared = tested.shared  # compared already
    else:
        shared = compare_images(images.source, tested)[0]
    if shared is None or not shared.count:
        return ""
    return f"{TRAINED_ON[:-1]}: at least {shared.count} of the {shared.compared} compared."


def measured(bank: ImageSet, test: ImageSet | None, *, given: bool, run: Run) -> Measured:
    """Try every split that the comparison will make, so that no measurement can cost a finished training.

    Labels that do not suffice are left aside, and that is said: the verdict then needs none. DataError where the
    images were ``given`` to measure on.
    """
    if bank.labels is None or (test is not None and test.labels is None):
        return Measured(bank, test)
    settings = EvaluationSettings.quick()
    try:
        seen = thinned(bank, SUMMARY_TRAIN_LIMIT)
        labels = np.delete(seen.labels, [index for index, *_ in seen.unreadable])  # type: ignore[arg-type]
        if test is None:
            labels = labels[stratified_split(labels, settings.test_share, run.seed)[0]]
            Samples.of(bank, None, run)
        settings.linear.parts(labels, run.seed)
        if len(np.unique(labels)) < 2:
            raise DataError(f"{number_of(len(labels), 'images')} to compare with, all of one class; give more classes")
    except DataError as error:
        if given:
            raise DataError(f"--eval-data: {bank.description}: {error}") from None
        run.reporter.warning(f"the labels of {bank.description} are left aside: {error}; the verdict will need none")
        return Measured(_without_labels(bank), None if test is None else _without_labels(test))
    return Measured(bank, test, min(KNN_K, len(labels)))


def measure_on(images: ImageSet, held_out: ImageSet | None, eval_data: Any, eval_test: Any, run: Run) -> Measured:
    """The images to measure on: those given, else those held out of the training ``images``, else these themselves."""
    if eval_test is not None and eval_data is None:
        raise InputError("--eval-test needs --eval-data; give the labelled bank that the test images are compared with")
    same = isinstance(eval_data, str) and images.source.fingerprint() == open_source(eval_data).fingerprint()
    bank = images if eval_data is None or same else open_images(eval_data, run.reporter, channels=images.channels)
    test = None if eval_test is None else open_images(eval_test, run.reporter, channels=images.channels)
    for option, given in (("--eval-data", None if eval_data is None else bank), ("--eval-test", test)):
        if given is not None and given.labels is None:
            raise DataError(
                f"{option}: {given.source.counted} has no labels ({given.source.no_labels}); give labelled images, or "
                f"leave {option} out"
            )
    if test is not None:
        check_pair(bank, test, run.reporter)  # now, not after the training
    on = measured(bank, held_out or test, given=eval_data is not None, run=run)
    return replace(on, says=said_of_training(images, on, held_out=held_out is not None))


def _without_labels(images: ImageSet) -> ImageSet:
    bare = object.__new__(ImageSet)  # a copy would leave the source behind
    bare.__dict__.update(images.__dict__)
    bare.classes = bare.labels = bare.class_names = None
    return bare


def compare(
    stages: Mapping[str, Backbone], on: Measured, recipe: RefineRecipe, out: Path, run: Run, box: Box | None = None
) -> dict[str, Any]:
    """Evaluate the encoders {"before": ..., "after": ...[, "full": ...]} and return their summary entries,
    the verdict, and the features of "after" to use ("recommendation").

    With labels: k-NN of every block, linear probe, clustering and effective rank of the last one; writes
    evaluation/<stage>-<name>.json, evaluation/blocks.json and block_curves.png. Without labels: effective
    rank, and the verdict of the label-free measures. evaluation/atlas-after.json is what the recommendation is by.
    A ``box`` of time limits the images of both sets that are measured on.
    """
    train, test, pooling = thinned(on.bank, SUMMARY_TRAIN_LIMIT), on.test, recipe.heads.measured_pooling
    labelled = train.labels is not None and (test is None or test.labels is not None)
    if test is None and not labelled and len(train) < MIN_IMAGES:
        test = ImageSet(train.source, channels=train.channels)  # nothing is judged on so few, and none can be spared

    how: dict[str, Any] = {"protocols": ("knn", "linear", "clustering", "rank") if labelled else ("rank",)}
    how |= {"knn_blocks": "all", "settings": EvaluationSettings.quick(precision=run.precision, knn_k=on.k)}

    def measure(bank: ImageSet, queries: ImageSet | None, run: Run) -> dict[str, dict[str, Result]]:
        found = {}
        for stage, backbone in stages.items():
            run.reporter.message(f"evaluating: {stage}")
            found[stage] = evaluate_backbone(backbone, bank, queries, run=run, **how)
        return found

    if box is None or test is None:
        results = measure(train, test, run)
    else:
        results, train, test = box.most(measure, train, test, run)
    for stage, found in results.items():
        write_results(found.values(), out, f"{stage}-")
    last = next(iter(stages.values())).info.depth - 1
    summary: dict[str, Any] = {
        stage: summary_metrics(found, block=last, pooling=pooling) for stage, found in results.items()
    }
    samples = Samples.of(train, test, run)
    in_time = samples if box is None else replace(samples, run=box.until(run, REPORT))
    summary["recommendation"] = _recommended(stages["after"], in_time, pooling, out)
    if labelled:
        curves = curves_from_results(results, head_blocks=[int(block) for block in recipe.heads.blocks])
        write_json(out / "evaluation" / "blocks.json", curves.record)
        block_curves(curves.record, out / "block_curves.png")
        before, *others = (curves.correct[f"{stage}/{pooling}"][-1] for stage in stages)
        of_first, *further = (verdict(before, other) for other in others)
        said = {"statements": curves.record["statements"]}
        judged = of_first | dict(zip(list(stages)[2:], further, strict=True)) | said
        judged |= {"clusters": few} if (few := said_of_few(results["after"].values())) else {}
    else:
        judged = samples.judged_without_labels(stages, pooling)
    if on.says and judged["verdict"] != "not measured":
        judged |= {"measured_on": on.says, "reason": f"{judged['reason']} {on.says}"}
    summary["verdict"] = judged
    if recipe.anchor.weight:
        summary["dense"] = dense_change(stages, on.bank, on.test, run)
        judged["dense"] = summary["dense"]["reason"]
    return summary


def _recommended(backbone: Backbone, samples: Samples, pooling: str, out: Path) -> dict[str, Any]:
    """Block, pooling and norm to use, by the atlas; the usual ones when there are too few images to tell."""
    reason = "the usual features: too few images to measure"
    if samples.labelled or len(samples.view_rows) >= MIN_IMAGES:
        try:
            atlas, _ = samples.atlas(backbone, "after", pooling=pooling, full=False)
            write_json(out / "evaluation" / "atlas-after.json", atlas.record)  # the report draws it
            return dict(atlas.record["recommendation"])
        except OutOfTimeError:
            reason = "the usual features: there was no time to measure others"
    block, pooling, norm = default_key(backbone.info, pooling)
    return {"block": block, "pooling": pooling, "norm": norm, "reason": reason}


def advised(
    summary: Mapping[str, Any], recipe: RefineRecipe, out: Path, before: Backbone, model: Any, stopped: object
) -> dict[str, Any]:
    """The verdict with what to try "next", by summary and log of the run; not the demo's, which takes no settings.

    ``before``: the START, as ``model`` names it; ``stopped``: the error of the guard or the loss.
    """
    if "full" in summary:
        return dict(summary["verdict"])
    log = read_metrics(out / "metrics.jsonl") if (out / "metrics.jsonl").is_file() else []
    labelled = "knn_difference" in summary["verdict"]
    verb, on = (
        ("evaluate", "--data LABELLED --test MORE")
        if labelled
        else ("analyze", f"--data MORE --out {quote(str(out))}-more")
    )
    tips = what_next(
        summary["verdict"],
        recipe.model_dump(),
        again=(f"--out {quote(f'{out}-{number}')}" for number in count(2) if not Path(f"{out}-{number}").exists()),
        compared=f"mim-refiner {verb} --model {quote(name_of(model))} --compare {quote(str(out))} {on}",
        draws=next((each["step"] for each in log[::-1] if each.get("phase") == "refinement"), 0) * recipe.batch_size,
        knn=[record["knn_top1"] for record in log if "knn_top1" in record],
        recommendation=summary["recommendation"],
        last_block=before.info.depth - 1,
        stopped=stopped is not None,
    )
    return {**summary["verdict"], "next": tips}
