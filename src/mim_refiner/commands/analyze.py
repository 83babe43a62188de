"""``analyze``: what is where in an encoder, which features to use, and whether refinement helped; labels optional."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mim_refiner.analysis.atlas import Atlas, place_heads
from mim_refiner.analysis.blocks import MIN_COMPARED, block_similarity, curves_from_scores
from mim_refiner.analysis.label_free import MIN_IMAGES
from mim_refiner.analysis.reconstruction import (
    MIN_TRAINED,
    ReconstructionSettings,
    reconstruction_by_block,
    regimes_record,
)
from mim_refiner.analysis.verdict import verdict
from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.commands.inputs import open_pair, tell_trained_on, tell_unreadable
from mim_refiner.commands.readout import measured_readouts
from mim_refiner.commands.survey import SIMILARITY_IMAGES, Samples, default_key
from mim_refiner.core.device import pick_device
from mim_refiner.core.run import Run
from mim_refiner.data.source_base import evenly
from mim_refiner.errors import DataError, InputError, did_you_mean
from mim_refiner.evaluation.cache import FeatureCache
from mim_refiner.evaluation.features import Features
from mim_refiner.files import name_of, write_json
from mim_refiner.models.backbone import Backbone
from mim_refiner.report.figures import atlas_map, block_curves, head_behaviour, regimes_plot, similarity_map
from mim_refiner.reporting import Reporter, listener
from mim_refiner.settings import as_list
from mim_refiner.training.resolve import last_third

PARTS = ("atlas", "verdict", "readout", "similarity", "reconstruction", "heads")


def analyze(
    *,
    model: Any,
    data: Any,
    out: str,
    compare: Any = None,
    test: str | None = None,
    parts: str | Sequence[str] = PARTS,
    cache: str | None = None,
    device: str = "auto",
    seed: int = 0,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Analyse ``model`` and, with ``compare``, what changed from it ("before") to the second encoder ("after").

    ``parts``: "atlas" (every block, pooling and norm; curves; recommendation; head placement), "verdict" (did it help:
    by k-NN when there are labels, and without labels always), "readout" (with labels: refine, or only read out
    better?), "similarity" (CKA of blocks), "reconstruction" (by block, and the three regimes), "heads" (from the run
    folders' metrics.jsonl). Labels are optional throughout.
    ``cache``: folder of the feature cache, or "off". Writes JSON and PNG files to ``out`` and returns the figures, the
    recommendation, the verdict, the sample sizes and the seconds of each part. Raises MimRefinerError on bad input.
    """
    reporter = listener(reporter)
    parts = as_list(parts)
    parts = PARTS if "all" in parts else parts
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        named = f"{unknown[0]!r} is unknown{did_you_mean(unknown[0], PARTS)}" if unknown else "none given"
        raise InputError(f"parts: {named}; choose from {', '.join(PARTS)}")
    run = Run(pick_device(device), seed=seed, reporter=reporter)
    given = {"before": model} | ({} if compare is None else {"after": compare})
    models = {name: load_backbone(source) for name, source in given.items()}
    train, held_out = open_pair(data, test, reporter, channels=models["before"].info.in_chans)
    samples = Samples.of(train, held_out, run, FeatureCache.open(cache))
    chosen = samples.described()
    unlabelled = "" if samples.labelled else "; no labels: neighbour consistency is told, not k-NN accuracy"
    reporter.message(
        f"looking at {chosen['queries']}, with {chosen['bank']} to find neighbours in; at "
        f"{chosen['label_free']} where no labels are needed{unlabelled}"
    )
    origins = {name: name_of(source) for name, source in given.items()}
    analysis = _Analysis(models, origins, samples, Path(out))
    analysis.result["statements"] += tell_trained_on(origins.values(), data if test is None else test, reporter)
    for part in PARTS:
        if part in parts:
            started = time.perf_counter()
            getattr(analysis, part)()
            analysis.result["seconds"][part] = round(time.perf_counter() - started, 1)
    if len(analysis.left_out) == len(set(parts)):
        raise DataError(f"{'; '.join(analysis.left_out)}; or choose other parts")
    reporter.done()
    facts = {name: images.facts() for name, images in (("train", train), ("test", held_out)) if images}
    analysis.result["data"] = facts
    write_json(Path(out) / "data.json", {"kind": "data", **facts})  # for the report
    for images in filter(None, (train, held_out)):
        tell_unreadable(images, reporter)
    if samples.cache is not None:
        analysis.result["cache"] = samples.cache.summary()
    return analysis.result


class _Analysis:
    """The parts one after the other; each adds to ``result`` and writes its files."""

    def __init__(self, models: Mapping[str, Backbone], sources: Mapping[str, str], samples: Samples, out: Path) -> None:
        self.models, self.sources, self.samples, self.run, self.out = models, sources, samples, samples.run, out
        self.pooling = default_key(models["before"].info)[1]
        self.atlases: dict[str, Atlas] = {}
        self.features: dict[str, Features] = {}  # raw, of the query images
        self.curves: dict[str, dict[str, Any]] = {}
        self.left_out: list[str] = []
        self.result: dict[str, Any] = {"samples": samples.described(), "statements": []}
        self.result |= {"figures": {}, "records": {}, "seconds": {}}

    def atlas(self) -> None:
        """Every block, pooling and norm of every model; curves over blocks; where heads would go."""
        self._measure_blocks()
        for name, atlas in self.atlases.items():
            self._keep(f"atlas-{name}", atlas.record, atlas_map)
        self.result["recommendation"] = list(self.atlases.values())[-1].record["recommendation"]
        third = last_third(self.models["before"].info.depth)
        self.result["head_placement"] = place_heads(self.atlases["before"], pooling=self.pooling, recipe_blocks=third)

    def verdict(self) -> None:
        enough = len(self.samples.view_rows) >= MIN_IMAGES
        if not enough and not self.samples.labelled:
            return self._leave_out(f"verdict left out: without labels it needs {MIN_IMAGES} images or more; give them")
        if "after" not in self.models:
            if enough:
                self.result["label_free"] = self.samples.measures(self.models["before"], "before").summary()
            return
        judged = self.samples.judged_without_labels(self.models) if enough else {}
        if self.samples.labelled:
            beside = {"label_free": judged} if enough else {}
            judged = verdict(self._hits("before"), self._hits("after")) | beside
        self.result["verdict"] = judged
        self._keep("verdict", {"kind": "verdict", **judged, "seed": self.run.seed})

    def readout(self) -> None:
        """Refine, or only read out better: classifiers on several read-outs of the first model, beside the second."""
        if not self.samples.labelled:
            return self._leave_out("refine or read out left out: its classifiers need labels; give labelled images")
        self._measure_blocks()
        try:
            record = measured_readouts(self.models, self.atlases, self.samples)
        except DataError as error:  # too few images to hold any out: the other parts go on
            return self._leave_out(f"refine or read out left out: {error}")
        self.result["readout"] = {key: record[key] for key in ("rows", "best", "sentence")}
        self.result["statements"].append(record["sentence"])
        self._keep("readout", record)

    def similarity(self) -> None:
        """CKA between blocks, within and across the models."""
        if len(self.samples.query_rows if self.samples.labelled else self.samples.view_rows) < MIN_COMPARED:
            return self._leave_out(f"similarity left out: it needs {MIN_COMPARED} test images or more; give them")
        self._measure_blocks()
        chosen = {name: found.select(evenly(len(found), SIMILARITY_IMAGES)) for name, found in self.features.items()}
        record = block_similarity(chosen, self.pooling)
        self.result["statements"] += record["statements"]
        self._keep("similarity", record, similarity_map)

    def reconstruction(self) -> None:
        """Reconstruction error by block, shares of the improvement, and the three regimes."""
        if others := [each.info.architecture for each in self.models.values() if not each.is_plain_vit]:
            return self._leave_out(f"reconstruction by block left out: {others[0]} is not a plain ViT; give one")
        settings = ReconstructionSettings()
        bank, queries = self.samples.bank_rows, self.samples.query_rows
        if len(bank) < MIN_TRAINED:
            return self._leave_out(f"reconstruction left out: it needs {MIN_TRAINED} images or more; give them")
        self._measure_blocks()
        train = bank[evenly(len(bank), settings.train_images)]
        test = queries[evenly(len(queries), settings.test_images)]
        how: dict[str, Any] = {"train_rows": train, "test_rows": test, "settings": settings, "run": self.run}
        errors = {}
        for name, backbone in self.models.items():
            self.run.reporter.phase(f"reconstruction by block: {name}", settings.steps(len(train)))
            errors[name] = reconstruction_by_block(backbone, self.samples.bank, self.samples.queries, **how)
        facts: dict[str, Any] = {"settings": settings.__dict__, "samples": {"train": len(train), "test": len(test)}}
        facts |= {"measure": self.atlases["before"].record["measure"], "pooling": self.pooling, "seed": self.run.seed}
        curves = {name: by_pooling[self.pooling] for name, by_pooling in self.curves.items()}
        record = regimes_record(curves, errors, **facts)
        self.result["regimes"] = {name: found["regimes"] for name, found in record["models"].items()}
        self.result["statements"] += [found["statement"] for found in record["models"].values()]
        self._keep("regimes", record, regimes_plot)

    def heads(self) -> None:
        """Head behaviour of every refine run among the sources."""
        drawn = {}
        for name, source in self.sources.items():
            for folder in (Path(source), Path(source).parent):  # a run folder, or export/ in one
                metrics = folder / "metrics.jsonl"
                if metrics.is_file() and '"alignment/' in metrics.read_text(encoding="utf-8", errors="replace"):
                    drawn[f"heads-{name}"] = str(head_behaviour(metrics, self.out / f"heads-{name}.png"))
                    break
        self.result["figures"] |= drawn
        if not drawn:
            self._leave_out("head behaviour left out: metrics.jsonl tells of no heads; give a run folder of refine")

    def _leave_out(self, why: str) -> None:
        self.left_out.append(why)
        self.run.reporter.message(why)

    def _hits(self, name: str) -> NDArray[np.float64]:
        """k-NN hits of the usual features: from the atlas where there is one, else of these features alone."""
        if name in self.atlases:
            return self.atlases[name].scores[default_key(self.models[name].info)]
        return self.samples.knn_hits(self.models[name], name)

    def _measure_blocks(self) -> None:
        """The atlases and the curves that several parts need; once."""
        if self.atlases:
            return
        for name, backbone in self.models.items():
            self.atlases[name], features = self.samples.atlas(backbone, name)
            self.features[name] = features[False]
        by_model = {name: atlas.curves() for name, atlas in self.atlases.items()}
        facts: dict[str, Any] = {"norm": False, "data": self.samples.described(), "seed": self.run.seed}
        curves = curves_from_scores(by_model, measure=self.atlases["before"].record["measure"], **facts)
        self.curves = curves.record["curves"]
        self.result["curves"], self.result["change"] = self.curves, curves.record["change"]
        self.result["statements"] += curves.record["statements"]
        self.result["records"]["blocks"] = str(write_json(self.out / "blocks.json", curves.record))
        self.result["figures"]["blocks"] = str(block_curves(curves.record, self.out / "block_curves.png"))

    def _keep(self, name: str, record: Mapping[str, Any], draw: Callable[..., Path] | None = None) -> None:
        self.result["records"][name] = str(write_json(self.out / f"{name}.json", record))
        if draw is not None:
            self.result["figures"][name] = str(draw(record, self.out / f"{name}.png"))
