"""Attentive probes: learned queries choose which patch tokens of a frozen encoder to read (arXiv 2506.10178).

Masked image models spread what they know over the patch tokens, where the class token and the mean miss much of it.
Efficient probing (EP) has M queries of width D. Query m attends to the tokens themselves (no projection of keys), and
its share of the values, W_m [D, D / (d M)], reads what it found; the M parts side by side go through BatchNorm without
parameters to a linear classifier. As W_m is linear it is applied after the sum over tokens, which is the same and
cheaper. ``single`` is the same with one query.

Tokens are normalised to mean 0 and variance 1 each. What an encoder's final norm does beyond that (a scale and a shift)
the probe can learn itself. A mixture reads the softmax-weighted sum of several blocks' tokens, weights learned.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from mim_refiner.core.modules import evaluation_mode
from mim_refiner.core.optim import adamw, set_learning_rate
from mim_refiner.core.run import Run
from mim_refiner.data.loaders import eval_batches
from mim_refiner.errors import DataError, InputError
from mim_refiner.evaluation.features import block_outputs
from mim_refiner.evaluation.finetune import LabelledRows
from mim_refiner.evaluation.linear_probe import LinearProbeScore, SelectedSettings, score_rates, shuffled
from mim_refiner.models.backbone import Backbone
from mim_refiner.reporting import number_of
from mim_refiner.settings import BatchSize, Listed, NonNegative, NonNegativeInt, PositiveInt, Rates
from mim_refiner.types import ImageSize

Blocks = tuple[int, ...]  # whose tokens a probe reads; more than one: a mixture
Tokens = Mapping[int, Tensor]  # by block, normalised [B, N, D]


class AttentiveSettings(SelectedSettings):
    """``queries`` M and ``value_divisor`` d (values are D / d wide) as published; M is lowered to what divides D / d.

    AdamW trains every probe at every one of ``learning_rates`` (for 256 images a step) on tokens computed once, from
    centre crops, that lie in float16 on the disk. ``mixture``: of so many blocks, evenly spaced to the last; 0: none.
    ``class_token`` lets the queries read it too. ``maps``: test images whose attention is kept.
    """

    learning_rates: Rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    poolers: Annotated[tuple[Literal["ep", "single"], ...], Field(min_length=1), Listed] = ("ep", "single")
    queries: PositiveInt = 32
    value_divisor: PositiveInt = 1
    mixture: NonNegativeInt = 4
    class_token: bool = False
    epochs: PositiveInt = 30
    batch_size: BatchSize = 256
    weight_decay: NonNegative = 0.0
    query_std: NonNegative = 0.02
    maps: NonNegativeInt = 8


@dataclass(frozen=True)
class AttentiveScore:
    """One probe's accuracies, and how its chosen rate reads an image."""

    accuracy: LinearProbeScore
    queries: int
    parameters: int  # of one rate's probe, classifier included
    weights: tuple[float, ...]  # of the blocks
    attention: NDArray[np.float32]  # [maps, M, N]; rows sum to 1


class AttentiveProbe(nn.Module):
    """R probes, one a learning rate, on tokens [B, N, D] of one block or of several; all have the same start."""

    def __init__(
        self, blocks: Blocks, dim: int, num_classes: int, queries: int, settings: AttentiveSettings, seed: int
    ) -> None:
        super().__init__()
        width = dim // settings.value_divisor
        self.blocks, self.queries, self.scale = blocks, math.gcd(queries, width), dim**-0.5
        generator = torch.Generator().manual_seed(seed)
        bound = dim**-0.5  # as torch draws the weights of a linear layer
        start = {
            "query": torch.randn(self.queries, dim, generator=generator) * settings.query_std,
            "value": (2 * torch.rand(self.queries, dim, width // self.queries, generator=generator) - 1) * bound,
            "weight": torch.randn(width, num_classes, generator=generator) * settings.init_std,
            "bias": torch.zeros(num_classes),
            "mix": torch.zeros(len(blocks)),
        }
        self.rates = nn.ModuleList(
            nn.ParameterDict({name: nn.Parameter(value.clone()) for name, value in start.items()})
            for _ in settings.learning_rates
        )
        self.norm = nn.BatchNorm1d(len(self.rates) * width, affine=False, eps=1e-6)

    def stacked(self, name: str) -> Tensor:
        """One parameter of all rates, [R, ...]."""
        return torch.stack([rate[name] for rate in self.rates])  # type: ignore[index]

    def attend(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Attention [B, R, M, N] and what the queries found [B, R, M, D]."""
        query, read = self.stacked("query") * self.scale, [tokens[block] for block in self.blocks]
        if len(read) == 1:
            attention = torch.einsum("bnd,rmd->brmn", read[0], query).softmax(-1)
            return attention, torch.einsum("brmn,bnd->brmd", attention, read[0])
        mixed = torch.einsum("rl,lbnd->brnd", self.stacked("mix").softmax(-1), torch.stack(read))
        attention = torch.einsum("brnd,rmd->brmn", mixed, query).softmax(-1)
        return attention, attention @ mixed

    def forward(self, tokens: Tokens) -> Tensor:
        """Logits [B, R, C]."""
        _, found = self.attend(tokens)
        read = torch.einsum("brmd,rmde->brme", found, self.stacked("value")).flatten(2)
        normed = self.norm(read.flatten(1)).view_as(read)
        return torch.einsum("bre,rec->brc", normed, self.stacked("weight")) + self.stacked("bias")


def attentive_protocol(
    backbone: Backbone,
    train: LabelledRows,
    test: LabelledRows,
    sources: Sequence[Blocks],
    settings: AttentiveSettings | None = None,
    *,
    image_size: ImageSize,
    batch_size: int = 256,
    run: Run | None = None,
    folder: Path | None = None,
) -> dict[tuple[Blocks, str], AttentiveScore]:
    """Train every pooler on each of ``sources`` at every rate, all in one pass, and score them on ``test``.

    The tokens of the training images wait in ``folder`` (None: the system's temporary one) and are removed at the end;
    those of the test images are read once and never stored. Raises InputError for a full disk.
    """
    settings, run = settings or AttentiveSettings(), run or Run()
    if settings.class_token and not backbone.info.has_cls:
        raise InputError("attentive.class_token: this encoder has no class token; leave it out")
    read = sorted({block for blocks in sources for block in blocks})
    divisor = settings.value_divisor
    if odd := [width for width in sorted({backbone.block_dims[block] for block in read}) if width % divisor]:
        raise InputError(f"attentive.value_divisor {divisor} does not divide the width {odd[0]}; use 1")

    encode = partial(_tokens, backbone, read, settings.class_token, image_size, batch_size, run)
    splits = settings.parts(train.labels, run.seed)
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    labels, keys = torch.from_numpy(train.labels), list(product(sources, settings.poolers))
    right: list[list[Tensor]] = []  # of every part and probe
    with tempfile.TemporaryDirectory(prefix="mim-refiner-tokens-", dir=folder) as place:
        store = _stored(encode(train), len(train.rows), Path(place))
        for kept, held in splits:
            probes = []
            for blocks, pooler in keys:
                dim, queries = store[blocks[0]].shape[2], settings.queries if pooler == "ep" else 1
                probes.append(AttentiveProbe(blocks, dim, classes, queries, settings, run.seed).to(run.device))
            _fit(probes, store, kept, labels, settings, run)
            of_held = map(Tensor.numpy, torch.from_numpy(held).split(settings.batch_size))
            right.append(_hits(probes, (_taken(store, rows, run.device) for rows in of_held), labels[held])[0])
    on_test, attention = _hits(probes, encode(test), torch.from_numpy(test.labels), settings.maps)
    scores: dict[tuple[Blocks, str], AttentiveScore] = {}
    for number, (key, probe) in enumerate(zip(keys, probes, strict=True)):
        on_held = torch.cat([found[number] for found in right])
        score = score_rates(on_test[number], on_held, settings.learning_rates)
        rate = list(settings.learning_rates).index(score.selected_rate or score.best_rate)
        maps = attention[number][:, rate] if settings.maps else torch.empty(0)
        parts = dict(probe.rates[rate].items())  # type: ignore[operator]
        parameters = sum(part.numel() for name, part in parts.items() if name != "mix" or len(probe.blocks) > 1)
        weights = tuple(parts["mix"].softmax(0).tolist())
        scores[key] = AttentiveScore(score, probe.queries, parameters, weights, maps.float().cpu().numpy())
    return scores


def sources_of(backbone: Backbone, blocks: Sequence[int], mixture: int) -> list[Blocks]:
    """Each of ``blocks`` alone, then a mixture of so many, evenly spaced to the last: 2, 5, 8, 11 of 12.

    No mixture where there is nothing to mix: hierarchical encoders change width and number of tokens on the way.
    """
    depth, count = backbone.info.depth, min(mixture, backbone.info.depth)
    mixed = tuple(depth * (number + 1) // count - 1 for number in range(count))
    mixable = count > 1 and len({backbone.block_dims[block] for block in mixed}) == 1
    return [*((block,) for block in blocks), *[mixed] * mixable]


def _tokens(
    backbone: Backbone,
    blocks: Sequence[int],
    class_token: bool,
    image_size: ImageSize,
    batch_size: int,
    run: Run,
    of: LabelledRows,
) -> Iterator[Tokens]:
    """The normalised tokens of the images, batch by batch."""
    backbone.to(run.device)
    run.reporter.phase(f"attentive: tokens of {number_of(len(of.rows), 'images')}", len(of.rows))
    seen = 0
    with evaluation_mode(backbone), torch.inference_mode():
        for batch, positions in eval_batches(of.images, image_size, batch_size, indices=of.rows):
            tokens = {}
            for block, output in zip(blocks, block_outputs(backbone, batch, blocks, run), strict=True):
                x = output.patches
                if class_token and output.cls is not None:
                    x = torch.cat([output.cls[:, None], x], dim=1)
                tokens[block] = F.layer_norm(x.float(), x.shape[-1:])
            seen += len(positions)
            run.reporter.progress(seen, {})
            yield tokens
    if seen != len(of.rows):
        lost = number_of(len(of.rows) - seen, "images")
        raise DataError(f"{of.images.description}: {lost} became unreadable; run again")


def _stored(batches: Iterator[Tokens], count: int, place: Path) -> dict[int, NDArray[np.float16]]:
    """Tokens of all ``count`` images by block, float16 [images, N, D], in files that are mapped into memory."""
    store: dict[int, NDArray[np.float16]] = {}
    done = 0
    for tokens in batches:
        if not store:
            shapes = {block: (count, *x.shape[1:]) for block, x in tokens.items()}
            needed, free = 2 * sum(map(math.prod, shapes.values())), shutil.disk_usage(place).free
            if needed > free:
                raise InputError(
                    f"attentive: the tokens need {needed / 1e9:.1f} GB in {place.parent}, which has {free / 1e9:.1f} "
                    "GB free; name fewer --blocks, lower attentive.mixture, or give another --cache folder"
                )
            store = {block: np.lib.format.open_memmap(place / f"{block}.npy", "w+", np.float16, shape)
                     for block, shape in shapes.items()}  # fmt: skip
        for block, x in tokens.items():
            store[block][done : done + len(x)] = x.half().cpu().numpy()
        done += len(x)
    return store


def _taken(store: Mapping[int, NDArray[np.float16]], rows: NDArray[np.int64], device: torch.device) -> Tokens:
    return {block: torch.from_numpy(values[rows]).to(device).float() for block, values in store.items()}


def _fit(
    probes: Sequence[AttentiveProbe],
    store: Mapping[int, NDArray[np.float16]],
    kept: NDArray[np.int64],
    labels: Tensor,
    settings: AttentiveSettings,
    run: Run,
) -> None:
    """AdamW on the sum of all cross-entropies: no two probes share a weight, so each trains as if alone."""
    groups: list[dict[str, Any]] = [
        {"params": list(probe.rates[number].parameters()), "lr_scale": rate, "weight_decay": settings.weight_decay}
        for probe, (number, rate) in product(probes, enumerate(settings.learning_rates))
    ]
    optimizer = adamw(groups, (0.9, 0.999))
    size = min(settings.batch_size, len(kept))
    total = settings.epochs * (len(kept) // size)
    run.reporter.phase("attentive: training the probes", total)
    for step, chosen in enumerate(shuffled(len(kept), size, settings.epochs, run.seed)):
        rows = np.sort(kept[chosen.numpy()])  # in the order of the file
        tokens, y = _taken(store, rows, run.device), labels[rows].to(run.device)
        set_learning_rate(optimizer, settings.rate(step, total, 1.0, size))
        optimizer.zero_grad(set_to_none=True)
        for probe in probes:  # one after the other, so that one graph is held at a time
            logits = probe(tokens)
            loss = F.cross_entropy(logits.transpose(1, 2), y[:, None].expand(logits.shape[:2]), reduction="sum")
            (loss / size).backward()
        optimizer.step()
        run.reporter.progress(step + 1, {})


@torch.no_grad()
def _hits(
    probes: Sequence[AttentiveProbe], batches: Iterator[Tokens], labels: Tensor, maps: int = 0
) -> list[list[Tensor]]:
    """Of every probe whether each rate is right, bool [N, R], and its attention [maps, R, M, N] to the first images."""
    found: list[list[Tensor]] = [[] for _ in probes]
    attention: list[list[Tensor]] = [[] for _ in probes]
    done = 0
    for tokens in batches:
        for number, probe in enumerate(probes):
            hits = probe.eval()(tokens).argmax(2).cpu()
            found[number].append(hits == labels[done : done + len(hits), None])
            if done < maps:
                attention[number].append(probe.attend(tokens)[0][: maps - done])
        done += len(hits)
    return [[torch.cat(parts) if parts else torch.empty(0, 0) for parts in each] for each in (found, attention)]
