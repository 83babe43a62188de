"""Does the verdict without labels say what k-NN says? Graded harm, judged by thresholds of the other encoders.

    python benchmarks/label_free_study.py --out runs/label_free
    python benchmarks/label_free_study.py --out runs/label_free --page docs/label-free.md

Every encoder is refined as it should be and with graded harm: rates x 3, x 10, x 30, many epochs on few images, and
neighbours drawn from the whole queue. ``ELSEWHERE`` adds arms of evidence.py, where their folders are. k-NN with labels
says what happened; beside it stand the measures of the label-free verdict (last block, class token). The same command
goes on where it was stopped. Thresholds are chosen on all encoders but one and tried on that one (label_free_page.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from label_free_page import RESULTS, page, write_results

from mim_refiner.analysis.verdict import label_free_verdict, verdict
from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.cli.progress import make_reporter
from mim_refiner.commands.inputs import open_images
from mim_refiner.commands.pretrain import pretrain
from mim_refiner.commands.refine import refine
from mim_refiner.commands.survey import Samples, default_key
from mim_refiner.core.knn import knn_predict
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.evaluation.features import extract_features
from mim_refiner.files import read_json, write_bytes
from mim_refiner.reporting import Reporter

TRAIN, FEW_LABELS = "{data}/cifar10_train-0.parquet", "{data}/cifar10_train-1.parquet[::50]"
SETS = {  # bank and test images to measure on
    "CIFAR-10": ("{data}/cifar10_train-1.parquet[::10]", "{data}/cifar10_test.parquet[::2]"),
}
ENCODERS = {  # architecture to pre-train briefly, or a folder; in order of cost
    "narrow": "vit_w48_d8_h3_p8",
    "shallow": "vit_w96_d4_h3_p8",
    "shipped": "src/mim_refiner/assets/mae",
    "refined": "src/mim_refiner/assets/refined",
}
QUEUE = 2048
PLAIN = [f"heads.queue_size={QUEUE}", "batch_size=128", "knn_every=0", "guard.enabled=false", "precision=fast",
         "warmup.epochs=1", "refinement.epochs=3", "refinement.base_lr=2e-3", "hold_out=0"]  # fmt: skip
RUNS: dict[str, list[str]] = {
    "recipe": [],
    "rate x 3": ["refinement.base_lr=6e-3"],
    "rate x 10": ["refinement.base_lr=2e-2"],
    "rate x 30": ["refinement.base_lr=6e-2"],
    "few images": ["refinement.epochs=48"],
    "shuffled neighbours": [f"refinement.top_k={QUEUE}", f"warmup.top_k={QUEUE}"],
}
IMAGES, FEW = 3072, 16  # training images, and so many times fewer images for "few images", as many draws
RANDOM, MAE96 = "{runs}/cifar10_short/random/seed0", "{runs}/mae96/export"
ELSEWHERE = {  # (encoder, run): encoder before and after, made by other studies
    ("shipped", "shipped refinement"): (ENCODERS["shipped"], ENCODERS["refined"]),
    **{("shipped", f"{arm}, 25,000 images"): (ENCODERS["shipped"], f"{{runs}}/cifar10_short/{arm}/seed0/export")
       for arm in ("full", "no_swap", "lora")},
    ("shipped", "full, Imagenette"): (ENCODERS["shipped"], "{runs}/imagenette_short/full/seed0/export"),
    ("random", "recipe"): (RANDOM, "{runs}/random/recipe/export"),
    ("random", "full, 25,000 images"): (RANDOM, "{runs}/cifar10_short/scratch/seed0/export"),
    ("mae96", "recipe"): (MAE96, "{runs}/mae96/recipe/export"),
    ("mae96", "long refinement"): (MAE96, "{runs}/mae96/long/export"),
}  # fmt: skip
Row = dict[str, Any]


# --- training


def start_of(name: str, data: Callable[[str], str], out: Path, reporter: Reporter) -> str:
    """The encoder to refine: shipped, or a masked autoencoder of a few epochs."""
    source = ENCODERS[name]
    if not source.startswith("vit_"):
        return source
    folder = out / name / "start"
    if (folder / "export").exists():
        return str(folder / "export")
    settings = ["training.epochs=12", "training.warmup_epochs=1", "knn_every=0", "precision=fast", "decoder_depth=1"]
    pretrain(data=f"{data(TRAIN)}[:{IMAGES}]", arch=source, out=str(folder), recipe="tiny_mae", settings=settings,
             device="cpu", reporter=reporter)  # fmt: skip
    return str(folder / "export")


def trained(encoder: str, run: str, model: str, data: Callable[[str], str], out: Path, reporter: Reporter) -> str:
    """Refine ``model`` as ``run`` says and return its export."""
    images = f"{data(TRAIN)}[:{IMAGES // FEW if run == 'few images' else IMAGES}]"
    folder = out / encoder / run.replace(" ", "_")
    if not (folder / "export").exists():
        refine(data=images, model=model, out=str(folder), recipe="tiny", settings=[*PLAIN, *RUNS[run]], device="cpu",
               eval_data=data(FEW_LABELS), reporter=reporter)  # fmt: skip
    return str(folder / "export")


# --- measuring


def measured(model: str, bank: ImageSet, test: ImageSet) -> Row:
    """k-NN hits [N], and the measures of the verdict on as many test images as it looks at."""
    backbone, run = load_backbone(model), Run()
    block, pooling, norm = default_key(backbone.info)
    options: dict[str, Any] = {"blocks": (block,), "poolings": (pooling,), "norm": norm, "run": run}
    banked, tested = (extract_features(backbone, images, **options)[block, pooling] for images in (bank, test))
    labels, truth = (torch.from_numpy(images.labels) for images in (bank, test))
    samples = Samples.of(bank, test, run)
    return {"hits": (knn_predict(banked, labels, tested) == truth).numpy(),
            "label-free": samples.measures(backbone, model)}  # fmt: skip


def compared(before: Row, after: Row) -> Row:
    """What k-NN says, what the verdict says without labels, and the measures: before, after, and the interval."""
    said, judged = verdict(before["hits"], after["hits"]), label_free_verdict(before["label-free"], after["label-free"])
    row = {"k-NN": [*(float(each["hits"].mean()) for each in (before, after)), *said["ci95"]]}
    row |= {each["measure"]: [each["before"], each["after"], *each["ci95"]] for each in judged["measures"]}
    return {"measures": {name: [round(value, 4) for value in values] for name, values in row.items()}}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data", help="folder of the images")
    parser.add_argument("--runs", default="runs", help="folder of other studies' runs, those that are there")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoders", default=",".join(ENCODERS), help="to train, some of them, separated by commas")
    parser.add_argument("--results", type=Path, default=RESULTS, help="what was measured, and goes on from there")
    parser.add_argument("--page", type=Path, help="write this page of what is measured so far, and stop")
    options = parser.parse_args(arguments)
    rows: list[Row] = read_json(options.results) if options.results.exists() else []
    if options.page:
        write_bytes(options.page, page(rows, options.page.parent).encode())
        return
    reporter = make_reporter(sys.stderr, quiet=True, live=False)

    def place(text: str) -> str:
        return text.format(data=options.data, runs=options.runs)

    @cache
    def images(name: str) -> list[ImageSet]:
        return [open_images(place(spec), reporter) for spec in SETS[name]]

    @cache
    def of_start(model: str, name: str) -> Row:
        return measured(model, *images(name))

    pairs = []
    for encoder in filter(None, options.encoders.split(",")):
        model = start_of(encoder, place, options.out, reporter)
        pairs += [(encoder, run, model, trained(encoder, run, model, place, options.out, reporter)) for run in RUNS]
    pairs += [(*key, *map(place, pair)) for key, pair in ELSEWHERE.items() if Path(place(pair[1])).exists()]
    known = {(row["encoder"], row["run"], row["images"]) for row in rows}
    for name, (encoder, run, before, after) in product(SETS, pairs):
        if (encoder, run, name) not in known:
            row = compared(of_start(before, name), measured(after, *images(name)))
            rows.append({"encoder": encoder, "run": run, "images": name, **row})
            write_results(options.results, rows)


if __name__ == "__main__":
    main()
