"""Does the verdict without labels say what k-NN says? Graded harm, judged by thresholds of the other encoders.

    python benchmarks/label_free_study.py --out runs/label_free
    python benchmarks/label_free_study.py --out runs/label_free --table

Every encoder is refined as it should be and with graded harm: rates x 3, x 10, x 30, many epochs on few images, and
neighbours drawn from the whole queue. k-NN with labels says what happened; beside it stand the label-free measures of
the last block, under the views of the verdict (like training's) and under views that training never makes. Thresholds
are chosen on all encoders but one and tried on that one. The same command goes on where it was stopped; ``--also`` adds
arms of evidence.py. Writes results.json and results.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mim_refiner.analysis.augmented import DISJOINT, VIEW, paired_views
from mim_refiner.analysis.label_free import LabelFreeMeasures, label_free_measures
from mim_refiner.analysis.verdict import verdict
from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.cli.progress import make_reporter
from mim_refiner.commands.inputs import open_images
from mim_refiner.commands.pretrain import pretrain
from mim_refiner.commands.refine import refine
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.evaluation.settings import EvaluationSettings
from mim_refiner.evaluation.suite import evaluate_backbone
from mim_refiner.files import read_json, write_bytes, write_json
from mim_refiner.reporting import Reporter

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
VIEWS = {"like training": VIEW, "disjoint": DISJOINT}
Row = dict[str, Any]


# --- training and measuring


def start_of(name: str, data: str, out: Path, reporter: Reporter) -> str:
    """The encoder to refine: shipped, or a masked autoencoder of a few epochs."""
    source = ENCODERS[name]
    if not source.startswith("vit_"):
        return source
    folder = out / name / "start"
    settings = ["training.epochs=12", "training.warmup_epochs=1", "knn_every=0", "precision=fast", "decoder_depth=1"]
    pretrain(data=f"{data}[:{IMAGES}]", arch=source, out=str(folder), recipe="tiny_mae", settings=settings,
             device="cpu", reporter=reporter)  # fmt: skip
    return str(folder / "export")


def trained(encoder: str, run: str, model: str, data: str, bank: str, out: Path, reporter: Reporter) -> str:
    """Refine ``model`` as ``run`` says and return its export."""
    images = f"{data}[:{IMAGES // FEW}]" if run == "few images" else f"{data}[:{IMAGES}]"
    folder = out / encoder / run.replace(" ", "_")
    refine(data=images, model=model, out=str(folder), recipe="tiny", settings=[*PLAIN, *RUNS[run]], device="cpu",
           eval_data=bank.partition("[")[0] + "[::50]", reporter=reporter)  # fmt: skip
    return str(folder / "export")


def measured(model: str, bank: ImageSet, test: ImageSet, seed: int = 0) -> Row:
    """k-NN hits [N] and, by kind of view, the label-free measures of the last block's class token, all of ``test``."""
    backbone, run = load_backbone(model), Run(seed=seed)
    last, pooling = backbone.info.depth - 1, "cls" if backbone.info.has_cls else "mean"
    options: dict[str, Any] = {"blocks": (last,), "poolings": (pooling,)}
    hits = evaluate_backbone(backbone, bank, test, protocols=("knn",), settings=EvaluationSettings.quick(), run=run,
                             poolings=(pooling,))  # fmt: skip
    found: Row = {"hits": next(result.correct for result in hits.values() if result.metric == "knn_top1")}
    for name, view in VIEWS.items():
        views = paired_views(backbone, test, run, view=view, norms=(False,), **options)
        parts = [part[False][last, pooling] for part in (views.clean, views.first, views.second)]
        found[name] = label_free_measures(*parts, seed=seed, pairs=2)
    return found


def compared(before: Row, after: Row) -> Row:
    """What k-NN says, and the changes of the label-free measures."""
    said = verdict(before["hits"], after["hits"])
    row: Row = {"knn": said["knn_difference"], "ci95": said["ci95"], "verdict": said["verdict"]}
    for name in VIEWS:
        one, two = (summary_of(each[name]) for each in (before, after))
        row[name] = {"consistency": two["consistency"] - one["consistency"],
                     "retrieval": two["retrieval"] - one["retrieval"], "rank": two["rank"] / one["rank"],
                     "centred rank": two["centred rank"] / one["centred rank"]}  # fmt: skip
    return row


def summary_of(measures: LabelFreeMeasures) -> dict[str, float]:
    found = measures.summary()
    return {"consistency": found["neighbour consistency"], "retrieval": found["view retrieval"],
            "rank": found["effective rank"], "centred rank": found["effective rank, centred"]}  # fmt: skip


# --- rules


def loses(row: Row, view: str, fall: float, kept: float) -> bool:
    """The rule of the verdict: harm is a fall of the consistency, or of the effective rank."""
    return bool(row[view]["consistency"] < -fall or row[view]["rank"] < kept)


def wins(row: Row, view: str, rise: float, kept: float) -> bool:
    """The rule that would allow the word "better"."""
    return bool(row[view]["consistency"] > rise and row[view]["rank"] >= kept)


def left_out(rows: Sequence[Row], view: str, rule: Callable[..., bool], word: str) -> Row:
    """Errors of ``rule`` against k-NN's ``word`` on each encoder, its two thresholds chosen on the other encoders.

    Runs that k-NN cannot tell from no change count for neither side when thresholds are chosen, and are reported.
    """
    clear = [row for row in rows if row["verdict"] != "no clear change"]
    missed = false = positive = negative = unclear = called = 0
    for encoder in dict.fromkeys(row["encoder"] for row in rows):
        change, kept = best_thresholds([row for row in clear if row["encoder"] != encoder], view, rule, word)
        for row in (row for row in rows if row["encoder"] == encoder):
            says = rule(row, view, change, kept)
            if row["verdict"] == "no clear change":
                unclear, called = unclear + 1, called + says
            elif row["verdict"] == word:
                positive, missed = positive + 1, missed + (not says)
            else:
                negative, false = negative + 1, false + says
    change, kept = best_thresholds(clear, view, rule, word)
    return {"missed": missed, "of": positive, "false": false, "of_others": negative, "called_though_unclear": called,
            "unclear": unclear, "change": change, "rank_kept": kept}  # fmt: skip


def best_thresholds(rows: Sequence[Row], view: str, rule: Callable[..., bool], word: str) -> tuple[float, float]:
    """The (change, rank kept) of least error, the share missed plus the share falsely called; ties: the middle."""
    grid = [(change, kept) for change in np.arange(0, 0.21, 0.01) for kept in np.arange(0.1, 1.0, 0.05)]

    sides = [[row for row in rows if (row["verdict"] == word) == truth] for truth in (True, False)]
    errors = [
        round(sum(np.mean([rule(row, view, *pair) != truth for row in side]) for side, truth in
                  zip(sides, (True, False), strict=True) if side), 9)
        for pair in grid
    ]  # fmt: skip
    best = [pair for pair, each in zip(grid, errors, strict=True) if each == min(errors)]
    change, kept = best[len(best) // 2]
    return float(change), float(kept)


def table(rows: Sequence[Row]) -> str:
    """Runs, and the leave-one-encoder-out errors of both rules under both kinds of view."""
    lines = ["| encoder | run | k-NN [95 %] | k-NN says | consistency | disjoint views | rank | rank, centred |",
             "|---|---|---:|---|---:|---:|---:|---:|"]  # fmt: skip
    for row in rows:
        low, high = (100 * value for value in row["ci95"])
        same, other = (row[name] for name in VIEWS)
        lines.append(
            f"| {row['encoder']} | {row['run']} | {100 * row['knn']:+.1f} [{low:+.1f}, {high:+.1f}] | {row['verdict']} "
            f"| {100 * same['consistency']:+.1f} | {100 * other['consistency']:+.1f} | {same['rank']:.2f} "
            f"| {same['centred rank']:.2f} |"
        )
    lines += ["", "| views | rule | missed | false | called though k-NN is unclear | change, rank kept (all) |",
              "|---|---|---:|---:|---:|---|"]  # fmt: skip
    for view in VIEWS:
        for name, rule, word in (("harm", loses, "worse"), ("gain", wins, "better")):
            found = left_out(rows, view, rule, word)
            lines.append(
                f"| {view} | {name} | {found['missed']} of {found['of']} | {found['false']} of {found['of_others']} "
                f"| {found['called_though_unclear']} of {found['unclear']} | {100 * found['change']:.0f} points, "
                f"{found['rank_kept']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="../shared/data/cifar10_train-0.parquet")
    parser.add_argument("--bank", default="../shared/data/cifar10_train-1.parquet[::5]")
    parser.add_argument("--test", default="../shared/data/cifar10_test.parquet[::5]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoders", default=",".join(ENCODERS), help="some of them, separated by commas")
    parser.add_argument(
        "--also", action="append", default=[], metavar="ENCODER:NAME=FOLDER", help="a refinement made elsewhere"
    )
    parser.add_argument("--table", action="store_true", help="only write the tables of what is there")
    options = parser.parse_args(arguments)
    file = options.out / "results.json"
    rows: list[Row] = read_json(file) if file.exists() else []
    if not options.table:
        reporter = make_reporter(sys.stderr, quiet=True, live=False)
        bank, test = (open_images(spec, reporter) for spec in (options.bank, options.test))
        for name in options.encoders.split(","):
            extra = dict(pair[len(name) + 1 :].split("=", 1) for pair in options.also if pair.startswith(f"{name}:"))
            wanted = [run for run in (*RUNS, *extra) if not any(r["encoder"] == name and r["run"] == run for r in rows)]
            model = start_of(name, options.train, options.out, reporter) if wanted else ""
            before = measured(model, bank, test) if wanted else {}
            for run in wanted:
                export = extra.get(run) or trained(name, run, model, options.train, options.bank, options.out, reporter)
                rows.append({"encoder": name, "run": run, **compared(before, measured(export, bank, test))})
                write_json(file, rows)
    write_bytes(options.out / "results.md", table(rows).encode())
    print(table(rows))


if __name__ == "__main__":
    main()
