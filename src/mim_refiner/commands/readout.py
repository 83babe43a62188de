"""The measurements behind "refine or read out": classifiers on several read-outs of the START and of the refined."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mim_refiner.analysis.atlas import Atlas, Key, best_on_other_half, name_of, plainest_first
from mim_refiner.analysis.readout import Cost, Hits, Row, readout_record
from mim_refiner.commands.survey import Samples, default_key
from mim_refiner.evaluation.attentive import AttentiveSettings, Blocks, attentive_protocol, sources_of
from mim_refiner.evaluation.features import Features, own_image_size
from mim_refiner.evaluation.finetune import LabelledRows
from mim_refiner.evaluation.linear_probe import LinearProbeSettings, linear_probe
from mim_refiner.models.backbone import Backbone

LINEAR = LinearProbeSettings(last=1, concatenate=False)
ATTENTIVE = AttentiveSettings(poolers=("ep",), learning_rates=(1e-3, 3e-3, 1e-2), epochs=20, maps=0)


def measured_readouts(models: Mapping[str, Backbone], atlases: Mapping[str, Atlas], samples: Samples) -> dict[str, Any]:
    """The record of "before", and of "after" where there is one (its usual feature); needs labels."""
    before, atlas, seed = models["before"], atlases["before"], samples.run.seed
    usual, depth = default_key(before.info), before.info.depth
    keys = plainest_first(atlas.scores)
    table = np.stack([atlas.scores[key] for key in keys])
    chosen = best_on_other_half(table, seed)
    cells = [keys[number] for number in np.unique(chosen)]
    features, test, hits = _linear(before, samples, "before", {usual, *cells})
    best = np.array([hits[keys[number]][image] for image, number in enumerate(chosen)])
    knn = table[chosen, np.arange(len(chosen))]
    rows = [Row("usual feature", hits[usual], Cost(depth, depth), knn=float(atlas.scores[usual].mean()))]
    if cells != [usual]:
        named = "best cell (" + " / ".join(map(name_of, cells)) + ")"
        rows.append(Row(named, best, Cost(max(key[0] for key in cells) + 1, depth), knn=float(knn.mean())))
    rows += _attentive(before, features, test, samples)
    if "after" in models:
        after = models["after"]
        key = default_key(after.info)
        of_key = _linear(after, samples, "after", {key})[2][key]
        refined, whole = float(atlases["after"].scores[key].mean()), Cost(after.info.depth, after.info.depth)
        rows.append(Row("refined, usual feature", of_key, whole, refined=True, knn=refined))
    return readout_record(rows, samples=samples.described(), seed=seed)


def _linear(
    backbone: Backbone, samples: Samples, name: str, keys: set[Key]
) -> tuple[Features, Features, dict[Key, Hits]]:
    """Bank and query features, and the hits of the linear probe at its selected rate on each of ``keys``."""
    options = {"blocks": sorted({key[0] for key in keys}), "norms": sorted({key[2] for key in keys})}
    pair = samples.features(backbone, name, **options)
    samples.run.reporter.phase(f"readout: linear probes, {name}", 0)

    def side_by_side(found: Mapping[bool, Features]) -> Features:
        """Every key under its block and a pooling that names the norm too."""
        values = {}
        for block, pooling, norm in sorted(keys):
            parts = ("cls", "mean") if pooling == "both" else (pooling,)
            values[block, f"{pooling} {norm}"] = torch.cat([found[norm][block, part] for part in parts], dim=1)
        return replace(next(iter(found.values())), values=values)

    train, test = map(side_by_side, pair)
    scores = linear_probe(train, test, LINEAR, samples.run)
    hits = {}
    for block, pooling, norm in keys:
        chosen = scores[block, f"{pooling} {norm}"].selected
        assert chosen is not None  # a part of the bank is held out
        hits[block, pooling, norm] = chosen.correct
    return train, test, hits


def _attentive(backbone: Backbone, bank: Features, queries: Features, samples: Samples) -> list[Row]:
    """Efficient probing of the last block, and of a mixture of four."""
    depth, size = backbone.info.depth, own_image_size(backbone.info)
    pair = LabelledRows.of(samples.bank, bank), LabelledRows.of(samples.queries, queries)
    how: dict[str, Any] = {"image_size": size, "run": samples.run}
    how["folder"] = samples.cache.made_folder() if samples.cache else None
    sources = sources_of(backbone, [depth - 1], ATTENTIVE.mixture)
    scores = attentive_protocol(backbone, *pair, sources, ATTENTIVE, **how)
    rows = []
    for (blocks, _), score in scores.items():
        chosen = score.accuracy.selected
        assert chosen is not None
        name = "attentive" if len(blocks) == 1 else f"layer mixture (blocks {', '.join(map(str, blocks))}), attentive"
        width = backbone.block_dims[blocks[-1]]
        parameters = score.queries * width + width * width
        rows.append(Row(name, chosen.correct, Cost(depth, depth, _extra(backbone, score.queries, blocks), parameters)))
    return rows


def _extra(backbone: Backbone, queries: int, blocks: Blocks) -> float | None:
    """Operations of the queries, their values and the mixing, as a share of the encoder's on an image."""
    info = backbone.info
    if not backbone.is_plain_vit:
        return None
    tokens, dim = math.prod(backbone.grid_of(info.image_size)) + info.num_prefix_tokens, info.embed_dim
    mixing = 2 * len(blocks) * tokens * dim if len(blocks) > 1 else 0
    reading = 4 * queries * tokens * dim + 2 * dim**2
    return (mixing + reading) / (info.depth * (24 * tokens * dim**2 + 4 * tokens**2 * dim))
