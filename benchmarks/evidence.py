"""Controlled studies: which part of the method carries the gain?

    python benchmarks/evidence.py benchmarks/studies/cifar10_cpu.yaml --out runs/evidence --plan
    python benchmarks/evidence.py benchmarks/studies/cifar10_cpu.yaml --out runs/evidence --arms full,scratch --seeds 0
    python benchmarks/evidence.py benchmarks/studies/cifar10_cpu.yaml --out runs/evidence --page docs/evidence.md

A study is one YAML file: data, start, recipe and the arms, each a change of the recipe, a control or a baseline
(``kind``: more_mae; diet and fungi of baselines.py). The same command goes on where it was stopped. Every arm is
trained by the package's own commands and measured in the same way (k-NN and linear probe of the last block, class and
mean pooling; ``few_labels``: also from such shares of the labels); what was right for every test image is kept, so
that any two X"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from baselines import DietSettings, FungiSettings, flops_of_diet, flops_of_fungi, fungi_correct, train_diet
from evidence_page import markdown, write_page
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.cli.progress import make_reporter
from mim_refiner.commands.inputs import open_images
from mim_refiner.commands.pretrain import make_autoencoder, pretrain
from mim_refiner.commands.refine import refine
from mim_refiner.core.device import pick_device, resolve_precision
from mim_refiner.core.guidance import known_labels
from mim_refiner.core.identity import weights_sha256
from mim_refiner.core.metrics import accuracy_interval, crossed_interval
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source
from mim_refiner.data.views import ViewSpec
from mim_refiner.evaluation.features import extract_features
from mim_refiner.evaluation.knn import knn_protocol
from mim_refiner.evaluation.low_shot import low_shot_protocol
from mim_refiner.evaluation.settings import EvaluationSettings
from mim_refiner.evaluation.suite import evaluate_backbone
from mim_refiner.export.timm import export_timm
from mim_refiner.files import atomic_file, write_bytes, write_json
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.mae import MaskedAutoencoder
from mim_refiner.reporting import Reporter
from mim_refiner.training.recipe import PretrainRecipe, RefineRecipe
from mim_refiner.training.recipes import pretrain_recipe, refine_recipe
from mim_refiner.training.refine import forward_backward, make_refiner, view_specs
from mim_refiner.training.resolve import resolve

Correct = dict[str, NDArray[np.bool_]]  # "knn_top1 cls": right or wrong for every test image


@dataclass(frozen=True)
class Study:
    """A study file, and where its data and its results lie."""

    tree: dict[str, Any]
    data: Path
    out: Path
    device: str = "auto"
    reporter: Reporter = field(default_factory=Reporter)

    def path(self, key: str) -> str:
        return str(self.tree[key]).format(data=self.data)

    @property
    def start(self) -> str:
        return self.path("start")

    @property
    def mae_settings(self) -> list[str]:
        return list(self.tree.get("mae_settings", ()))

    @property
    def protocols(self) -> list[str]:
        return list(self.tree.get("protocols", ("knn", "linear")))

    def run(self, seed: int, precision: str = "fp32") -> Run:
        device = pick_device(self.device)
        return Run(device, resolve_precision(precision, device), seed, self.reporter)

    def bank_and_test(self) -> tuple[ImageSet, ImageSet]:
        return open_images(self.path("bank"), self.reporter), open_images(self.path("test"), self.reporter)

    def settings(self, arm: str) -> list[str]:
        return [*self.tree["settings"], *self.tree["arms"][arm].get("settings", ())]

    def recipe(self, arm: str) -> RefineRecipe:
        chosen = refine_recipe(self.tree["recipe"], self.settings(arm), image_size=0)
        return resolve(chosen, load_backbone(self.start))

    @cached_property
    def images(self) -> int:
        return len(open_images(self.path("train"), self.reporter))

    def draws(self, recipe: RefineRecipe) -> int:
        """Images that both phases see, each drawn with all its views."""
        steps = self.images // recipe.batch_size
        return (recipe.warmup.epochs + recipe.refinement.epochs) * steps * recipe.batch_size

    @cached_property
    def budget(self) -> float:
        """Operations of the full recipe, which every control and baseline that trains may spend too."""
        return self.draws(self.recipe("full")) * flops_of_refinement(self.start, self.recipe("full"))

    @cached_property
    def diet_epochs(self) -> int:
        """Passes over the images that cost what the full recipe costs."""
        return max(1, round(self.budget / (flops_of_diet(self.start, self.images) * self.images)))

    def mae_recipe(self) -> PretrainRecipe:
        """The autoencoder's recipe with as many epochs as cost what the full recipe costs, in operations."""
        own = pretrain_recipe(self.tree["mae_recipe"], self.mae_settings, image_size=0)
        epochs = max(1, round(self.budget / (flops_of_autoencoder(self.start, own) * self.images)))
        own.training.epochs, own.training.warmup_epochs = epochs, min(own.training.warmup_epochs, epochs / 4)
        return own


# --- cost


def flops_of_refinement(model: str, recipe: RefineRecipe, images: int = 4) -> float:
    """Operations of one image's refinement step: all its views, forward and backward.

    (The warm-up costs less, since its encoder is frozen: taken as the same, which favours the control.)
    """
    backbone = load_backbone(model)
    backbone.use_math_attention()  # plain products, which the counter knows
    refiner = make_refiner(backbone, recipe)
    channels = backbone.info.in_chans
    views = [torch.randn(images, channels, *_size(view)) for view in view_specs(recipe) for _ in range(view.count)]
    with FlopCounterMode(display=False) as counter:
        forward_backward(refiner, views, torch.arange(images), None, Run())
    return counter.get_total_flops() / images


def flops_of_autoencoder(model: str, recipe: PretrainRecipe, images: int = 4) -> float:
    """Operations of one image's step of masked autoencoding, forward and backward."""
    backbone = load_backbone(model)
    backbone.use_math_attention()
    mae: MaskedAutoencoder = make_autoencoder(backbone.model, recipe, model)
    with FlopCounterMode(display=False) as counter:
        mae(torch.randn(images, backbone.info.in_chans, *backbone.info.image_size)).loss.backward()
    return counter.get_total_flops() / images


def _size(view: ViewSpec) -> tuple[int, int]:
    return view.size if isinstance(view.size, tuple) else (view.size, view.size)


# --- training and measuring


def train(study: Study, arm: str, seed: int) -> str:
    """Train one arm (or go on) and return its encoder."""
    folder, what = study.out / arm / f"seed{seed}", study.tree["arms"][arm]
    common = {"data": study.path("train"), "device": study.device, "seed": seed, "reporter": study.reporter}
    kind = what.get("kind", "refine")
    if kind == "diet":
        if not (folder / "export").exists():
            backbone, recipe = load_backbone(study.start), study.recipe(arm)
            run, settings = study.run(seed, recipe.precision), DietSettings(**what.get("diet", {}))
            images = open_images(study.path("train"), study.reporter)
            train_diet(backbone, images, recipe, study.diet_epochs, settings, run)
            export_timm(backbone, folder / "export", card={"base": study.start})
    elif kind == "more_mae":
        own = study.mae_recipe()
        length = [f"training.{key}={getattr(own.training, key)}" for key in ("epochs", "warmup_epochs")]
        model = study.tree.get("mae_run", study.start)
        pretrain(**common, model=model, out=str(folder), recipe=study.tree["mae_recipe"],
                 settings=[*study.mae_settings, *length, "knn_every=0"])  # fmt: skip
    else:
        model = random_start(study, seed) if what.get("start") == "random" else study.start
        thin = study.tree.get("thin", 25)  # the study's own measure follows, on all images
        few = f"[::{thin}]" if thin > 1 else ""
        refine(**common, model=model, out=str(folder), recipe=study.tree["recipe"], settings=study.settings(arm),
               eval_data=study.path("bank") + few, eval_test=study.path("test") + few)  # fmt: skip
    return str(folder / "export")


def random_start(study: Study, seed: int) -> str:
    """The start's architecture with weights drawn as masked autoencoders begin."""
    folder = study.out / "random" / f"seed{seed}"
    if not folder.exists():
        torch.manual_seed(seed)
        backbone = load_backbone(study.start)
        make_autoencoder(backbone.model, study.mae_recipe())
        export_timm(backbone, folder, card={"base": "random weights"})
    return str(folder)


def measure(study: Study, model: str, file: Path, seed: int) -> None:
    """What is right for every test image; what ``file`` has is not measured again."""
    found: Correct = {}
    if file.exists():
        with np.load(file) as stored:
            found = dict(stored)
    else:
        store(file, found := usual(study, load_backbone(model)))
    for share in study.tree.get("few_labels", ()):
        if not any(f"@{100 * share:g}%" in name for name in found):
            store(file, found := found | with_few_labels(study, load_backbone(model), share, seed))


def usual(study: Study, backbone: Backbone) -> Correct:
    """The study's protocols by the last block, with all labels of the bank."""
    bank, test = study.bank_and_test()
    results = evaluate_backbone(
        backbone,
        bank,
        test,
        protocols=study.protocols,
        settings=EvaluationSettings.quick(),
        run=Run(reporter=study.reporter),
    )
    last = backbone.info.depth - 1
    kept = [result for result in results.values() if result.block == last and result.correct is not None]
    return {f"{result.metric} {result.pooling}": result.correct for result in kept if result.correct is not None}


def with_few_labels(study: Study, backbone: Backbone, share: float, seed: int) -> Correct:
    """k-NN and logistic regression from the very labels that a run with guidance_share=``share`` and ``seed`` uses."""
    train, test = open_images(study.path("train"), study.reporter), study.bank_and_test()[1]
    assert train.labels is not None
    rows = (known_labels(train.labels, share, seed) >= 0).nonzero()[:, 0]
    common = {"blocks": (-1,), "run": Run(reporter=study.reporter)}
    bank = extract_features(backbone, train, indices=rows.numpy(), **common)
    tested = extract_features(backbone, test, **common)
    found = {f"knn_top1@{100 * share:g}% {key[1]}": score.correct for key, score in knn_protocol(bank, tested).items()}
    shots = low_shot_protocol(bank, tested, drawn={0: [np.arange(len(rows))]})
    return found | {f"low_shot@{100 * share:g}% {key[1]}": score.correct[0] for (key, _), score in shots.items()}


def measure_fungi(study: Study, arm: str, seed: int, file: Path) -> None:
    """What is right by the gradient features of the start."""
    settings = FungiSettings(**study.tree["arms"][arm].get("fungi", {}))
    backbone, (bank, test) = load_backbone(study.start), study.bank_and_test()
    store(file, fungi_correct(backbone, bank, test, study.protocols, settings, study.run(seed)))


def store(file: Path, found: Correct) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as stream:
        np.savez_compressed(stream, **found)


# --- tables


def collect(study: Study) -> dict[str, dict[int, Correct]]:
    """{arm: {seed: what was right}} of all that is measured so far; the start has no seed of ours."""
    found: dict[str, dict[int, Correct]] = {}
    for arm in ("start", *study.tree["arms"]):
        for file in sorted((study.out / arm).glob("seed*.npz")):
            with np.load(file) as stored:
                found.setdefault(arm, {})[int(file.stem.removeprefix("seed"))] = dict(stored)
    return found


def compared(better: dict[int, Correct], than: dict[int, Correct], metric: str) -> tuple[float, float, float] | None:
    """Difference of two arms in points with its 95 % interval over test images and, when there are several, seeds."""
    seeds = sorted(better) if len(than) == 1 else sorted(better.keys() & than.keys())
    pairs = [(better[seed], than[seed if len(than) > 1 else min(than)]) for seed in seeds]
    if not pairs or any(metric not in correct for pair in pairs for correct in pair):
        return None
    mean, low, high = crossed_interval(np.stack([b[metric].astype(float) - t[metric] for b, t in pairs]))
    return 100 * mean, 100 * low, 100 * high


def summarize(study: Study) -> dict[str, Any]:
    """Every arm's numbers and every claim's verdict."""
    found = collect(study)
    metrics = sorted({metric for seeds in found.values() for correct in seeds.values() for metric in correct})
    arms: dict[str, Any] = {}
    for arm, seeds in found.items():
        arms[arm] = {"says": study.tree["arms"].get(arm, {}).get("says", "the start"), "seeds": sorted(seeds)}
        for metric in metrics:
            values = [100 * accuracy_interval(correct[metric])[0] for correct in seeds.values() if metric in correct]
            if values:
                spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
                arms[arm][metric] = {"mean": float(np.mean(values)), "sd": spread, "values": values}
    claims = []
    for claim in study.tree["claims"]:
        better, than = claim["better"], claim["than"]
        for metric in metrics if better in found and than in found else ():
            change = compared(found[better], found[than], metric)
            if change is not None:
                word = "supported" if change[1] > 0 else "not supported" if change[2] < 0 else "not decidable here"
                seeds = len(found[better]) if than == "start" else len(found[better].keys() & found[than].keys())
                claims.append({"by": study.tree["metric"], **claim, "metric": metric, "difference": change[0],
                               "ci95": change[1:], "seeds": seeds, "verdict": word})  # fmt: skip
    untried = [arm["says"] for name, arm in study.tree["arms"].items() if name not in found]
    return {"title": study.tree["title"], "torch": torch.__version__, "metric": study.tree["metric"], "arms": arms,
            "claims": claims, "untried": untried}  # fmt: skip


def record(study: Study, file: Path) -> dict[str, Any]:
    """The summary with what makes it repeatable: sizes, settings, command, day."""
    sizes = {key: len(open_source(study.path(key))) for key in ("train", "bank", "test")}
    command = f"python benchmarks/evidence.py {shlex.quote(f'benchmarks/studies/{file.name}')} --out runs/{file.stem}"
    return {"study": file.stem, **summarize(study), "images": sizes, "draws": study.draws(study.recipe("full")),
            "settings": study.settings("full"), "command": command,
            "start_sha256": weights_sha256(load_backbone(study.start).model),
            "date": datetime.date.today().isoformat()}  # fmt: skip


def plan(study: Study, arms: list[str], seeds: list[int]) -> str:
    """What the arms cost, in operations and in hours of this machine at the speed of a matrix product of 1024."""
    speed, lines, total = matrix_speed(), [], 0.0
    for arm in arms:
        kind = study.tree["arms"][arm].get("kind", "refine")
        if kind == "diet":
            cost, what = study.budget, f"{study.diet_epochs} epochs of DIET"
        elif kind == "fungi":
            settings = FungiSettings(**study.tree["arms"][arm].get("fungi", {}))
            images = sum(len(open_source(study.path(key))) for key in ("bank", "test"))
            cost = flops_of_fungi(study.start, settings) * images
            what = f"{'gradients' if settings.losses else 'embeddings'} of {images:,} images"
        elif kind == "more_mae":
            own = study.mae_recipe()
            cost = flops_of_autoencoder(study.start, own) * own.training.epochs * study.images
            what = f"{own.training.epochs} epochs of masked autoencoding"
        else:
            chosen = study.recipe(arm)
            cost = flops_of_refinement(study.start, chosen) * study.draws(chosen)
            what = f"{study.draws(chosen):,} draws"
        hours = cost / speed / 3600 * len(seeds)
        total += hours
        lines.append(f"{arm:20} {what:40} {cost / 1e15:6.2f} PFLOP a seed, at least {hours:5.2f} h for all seeds")
    return "\n".join([*lines, f"together at least {total:.1f} h: matrix products at full speed, nothing else counted"])


def matrix_speed(size: int = 1024) -> float:
    """Operations a second of a square matrix product on all threads."""
    a = torch.randn(size, size)
    (a @ a).sum()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 0.3:
        a @ a
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - started)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder that {data} stands for")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="write this page of what is measured so far, and stop")
    parser.add_argument("--arms", default="", help="some arms, separated by commas (default: all)")
    parser.add_argument("--seeds", default="", help="some seeds (default: the study's)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plan", action="store_true", help="say what it costs and stop")
    options = parser.parse_args(arguments)
    tree = yaml.safe_load(options.study.read_text())
    reporter = make_reporter(sys.stderr, quiet=False, live=False)
    study = Study(tree, options.data, options.out, options.device, reporter)
    arms = options.arms.split(",") if options.arms else list(tree["arms"])
    unknown = set(arms) - tree["arms"].keys()
    if unknown:
        parser.error(f"no such arm: {', '.join(sorted(unknown))}; the study has {', '.join(tree['arms'])}")
    seeds = [int(seed) for seed in options.seeds.split(",")] if options.seeds else tree["seeds"]
    if options.page:
        if collect(study):
            write_json(options.study.with_suffix(".json"), record(study, options.study))
        write_page(options.study.parent, options.page)
        return
    print(plan(study, arms, seeds))
    if options.plan:
        return
    measure(study, study.start, study.out / "start" / "seed0.npz", 0)
    for seed in seeds:  # the first seed of every arm before the second of any
        for arm in arms:
            file = study.out / arm / f"seed{seed}.npz"
            if study.tree["arms"][arm].get("kind") != "fungi":
                trained = study.out / arm / f"seed{seed}" / "export"
                measure(study, str(trained) if file.exists() else train(study, arm, seed), file, seed)
            elif not file.exists():
                measure_fungi(study, arm, seed, file)
            write_json(study.out / "results.json", summarize(study))
            write_bytes(study.out / "results.md", markdown(summarize(study)).encode())
    print((study.out / "results.md").read_text())


if __name__ == "__main__":
    main()
