"""The do-no-harm guard: looks at the encoder's features while it trains, and compares them with the START.

A few hundred unlabelled images of the training set, two fixed crops each, tell cheaply what goes wrong: the effective
rank and the spread fall when features collapse, pooled ones or patch tokens, and an image's second crop is no longer
found among those of the others. With labels the online k-NN is watched too. What a run of a few epochs cannot do to a
healthy encoder is bad; bad twice running stops the run, and the best state so far is kept.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mim_refiner.core.collectives import decide_on_rank_0, from_rank_0
from mim_refiner.core.metrics import effective_rank, standardized
from mim_refiner.core.modules import evaluation_mode
from mim_refiner.core.run import Run
from mim_refiner.core.sharding import full_state, load_full_state
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.photometric import normalize
from mim_refiner.data.views import ViewSpec, crop_batch, draws
from mim_refiner.errors import GuardStopError, RunFolderError
from mim_refiner.files import atomic_folder, read_json, reading, write_json
from mim_refiner.models.backbone import Backbone
from mim_refiner.training.recipe import GuardSettings
from mim_refiner.training.state import RunFolder, load_state

PROBE_BATCH = 64  # images a forward pass
PROBE_PATCHES = 4  # of an image, evenly spaced, whose rank is measured
FILE, BEST = "guard.json", "best/encoder.safetensors"  # in the run folder, in its checkpoints
SAME = 1e-6  # measures differ by as much by rounding: of images that are all alike there is nothing to lose
FORGOTTEN = "the features lost what tells images apart: share of images found by another crop"
NOISE = 2.5  # standard deviations of a difference of two shares that count as noise


Encoder = TypeVar("Encoder", bound=torch.nn.Module)


@dataclass
class FeatureProbe:
    """Label-free measures of the last block's features, pooled and dense, on fixed crops of fixed images."""

    backbone: Backbone
    images: ImageSet
    view: ViewSpec
    count: int  # images, at most
    pooling: str
    run: Run

    def __post_init__(self) -> None:
        self.count = min(self.count, len(self.images))

    def __call__(self) -> dict[str, float]:
        """Of pooled features ``rank``, ``spread`` (1 - mean cosine of different images), ``view_alignment`` (mean
        cosine of the two crops of an image) and ``retrieval`` (share of images whose second crop is, by cosine of
        standardised features, the nearest to the first); of patch tokens ``dense_rank``, ``dense_spread`` (1 - mean
        cosine of different patches of one image) and ``dense_image_spread`` (of the same patch in different images).
        All NaN if any are.
        """
        (first, dense), (second, _) = (self._features(crops) for crops in self._two_crops)
        if not all(bool(torch.isfinite(found).all()) for found in (first, second, *dense.values())):
            return dict.fromkeys(("rank", "spread", "view_alignment", "retrieval", *dense), math.nan)
        a, b = F.normalize(first, dim=1), F.normalize(second, dim=1)
        cosine, own = a @ b.T, (a * b).sum(1)
        others = (cosine.sum() - own.sum()) / max(1, self.count * (self.count - 1))
        found = (standardized(first) @ standardized(second, first).T).argmax(1) == torch.arange(self.count)
        return {
            "rank": effective_rank(first),
            "spread": 1 - others.item(),
            "view_alignment": own.mean().item(),
            "retrieval": found.float().mean().item(),
            "dense_rank": effective_rank(dense.pop("dense_rank")),
            **{name: value.mean().item() for name, value in dense.items()},
        }

    @cached_property
    def _two_crops(self) -> list[Tensor]:
        """The same images and crops at every look, also after a resume."""
        chosen = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0))[: self.count]
        pixels = [self.images.load(int(index)) for index in chosen]
        return [crop_batch(pixels, self.view, draws(0, 0, view, 0, len(pixels))) for view in range(2)]

    @torch.no_grad()
    def _features(self, crops: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Pooled features [N, D], and what the dense measures are made of: patches [n, D] and two lists of spreads."""
        info, pooled, some, within, sums = self.backbone.info, [], [], [], []
        for part in crops.split(PROBE_BATCH):
            with evaluation_mode(self.backbone), self.run.autocast():
                inputs = normalize(part.to(self.run.device), info.mean, info.std)
                output = self.backbone.forward_blocks(inputs, [-1])[0]
            pooled.append(output.pooled(self.pooling).float().cpu())
            patches = output.patches.float()
            some.append(patches[:, :: max(1, patches.shape[1] // PROBE_PATCHES)].flatten(0, 1).cpu())
            patches = F.normalize(patches, dim=2)
            within.append(_spread(patches.sum(1), patches.shape[1]).cpu())
            sums.append(patches.sum(0))
        across = _spread(torch.stack(sums).sum(0), len(crops)).cpu()
        dense = {"dense_rank": torch.cat(some), "dense_spread": torch.cat(within), "dense_image_spread": across}
        return torch.cat(pooled), dense


def _spread(sums: Tensor, count: int) -> Tensor:
    """1 - mean cosine of pairs among ``count`` vectors of length 1, from their sums [..., D]."""
    return 1 - (sums.square().sum(-1) - count) / max(1, count * (count - 1))


@dataclass
class Guard:
    """Measures, remembers in guard.json, keeps the best sound encoder in checkpoints/best, and stops the run.

    ``knn_images``: number of test images of the online k-NN, 0 without labels; with labels it decides what is best.
    """

    probe: Callable[[], dict[str, float]]
    encoder: torch.nn.Module
    folder: RunFolder
    settings: GuardSettings
    steps: int  # of the refinement
    probe_images: int
    knn_images: int = 0
    start: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0  # the START

    def __post_init__(self) -> None:
        self.every = max(1, min(self.settings.every, self.steps // 5))  # a short run is looked at too
        self.score = "knn_top1" if self.knn_images else "retrieval"
        self.file = self.folder.path / FILE
        retrieval_noise, knn_noise = (NOISE * math.sqrt(0.5 / max(1, n)) for n in (self.probe_images, self.knn_images))
        rank, spread, any_drop = self.settings.min_rank, self.settings.min_spread, -math.inf
        knn_drop = max(self.settings.max_knn_drop, knn_noise)
        # {measure: (how to say that it is bad, below which share of the START it is, by how much less at least)}
        self.rules: dict[str, tuple[str, float, float]] = {
            "rank": ("the features collapse: effective rank", rank, any_drop),
            "spread": ("the features collapse: spread", spread, SAME),
            "dense_rank": ("the patch tokens collapse: effective rank", rank, any_drop),
            "dense_spread": ("the patch tokens of an image collapse: spread", spread, SAME),
            "dense_image_spread": ("the patch tokens of all images become the same: spread", spread, SAME),
            "retrieval": (FORGOTTEN, self.settings.min_retrieval, retrieval_noise),
            "knn_top1": ("k-NN accuracy fell and stayed low", math.inf, knn_drop),
        }

    # --- what the loop calls

    def begin(self, total_step: int) -> None:
        """Measure the START, or remember it together with what was seen up to ``total_step``."""

        def known(stored: Any) -> tuple[dict[str, float], list[dict[str, float]], int]:
            history = [_numbers(entry) for entry in stored["history"]]
            seen = [entry for entry in history if entry["total_step"] <= total_step]
            return _numbers(stored["start"]), seen, operator.index(stored["best_step"])

        nothing, so = (dict[str, float](), list[dict[str, float]](), 0), "the guard begins anew from here"
        found = decide_on_rank_0(lambda: self.folder.recall(FILE, known, nothing, so))
        self.start, self.history, self.best_step = found
        if not self.start:
            self.start = dict(from_rank_0(self.probe()))
            self._write()

    def note_start_knn(self, monitor: Callable[[], dict[str, float]]) -> None:
        """Measure the START's k-NN accuracy too, if it counts, and is not known; while the encoder still is that."""
        if self.score == "knn_top1" and self.score not in self.start:
            self.start["knn_top1"] = monitor()["knn_top1"]
            self._write()

    def check(self, total_step: int, monitor: Callable[[], dict[str, float]] | None = None) -> dict[str, float]:
        """Measure, with ``monitor`` the online k-NN too, and judge. Returns what was measured; raises GuardStopError
        with the reason. Features that are not finite stop before k-NN would refuse them.
        """
        found: dict[str, float] = from_rank_0(self.probe())  # every rank looks: a sharded encoder needs them all
        entry: dict[str, float] = {"total_step": total_step, **found}
        if monitor and _finite(found):
            found |= monitor()
            entry["knn_top1"] = found["knn_top1"]
        self.history.append(entry)
        value = entry.get(self.score, math.nan)
        sound = [self.start, *(known for known in self.history[:-1] if not self._broken(known))]
        earlier = [known[self.score] for known in sound if self.score in known]
        if not self._broken(entry) and value > max(earlier, default=-math.inf):
            self._keep(total_step)
        reason = self._reason()
        self._write(reason)
        if reason:
            state = f"the state after step {self.best_step}" if self.best_step else "the encoder as it was at the start"
            raise GuardStopError(
                f"{self.folder.path}: the guard stopped the run after step {total_step}: {reason}. "
                f"Kept and exported: {state}. See guard.json; try a lower --set refinement.base_lr=... with "
                f"another --out; with --set guard.enabled=false {self.folder.going_on} trains on"
            )
        return found

    def _keep(self, total_step: int) -> None:
        self.best_step = total_step
        whole = full_state(self.encoder)
        if not self.folder.writes:
            return
        best = self.folder.checkpoints / BEST
        with atomic_folder(best.parent) as folder:
            state = {name: tensor.contiguous() for name, tensor in whole.items()}
            save_file(state, folder / best.name, {"total_step": str(total_step)})

    def _reason(self) -> str:
        if not _finite(self.history[-1]):
            return "the features are not finite any more"
        for measure, (words, _, _) in self.rules.items():
            recent = [entry for entry in self.history if measure in entry][-self.settings.patience :]
            if len(recent) == self.settings.patience and all(measure in self._broken(entry) for entry in recent):
                seen = ", ".join(f"{entry[measure]:.3g}" for entry in recent)
                return f"{words} (at the start {self.start[measure]:.3g}, then {seen})"
        return ""

    def _broken(self, entry: dict[str, float]) -> list[str]:
        """The measures of a look by which it would count against the run."""
        return [
            measure
            for measure, (_, share, drop) in self.rules.items()
            if measure in self.start and measure in entry
            if entry[measure] < share * self.start[measure] and self.start[measure] - entry[measure] > drop
        ]

    def _write(self, stopped: str = "") -> None:
        if self.folder.writes:
            seen: dict[str, Any] = {"start": self.start, "history": self.history}
            write_json(self.file, seen | {"best_step": self.best_step, "stopped": stopped or None})


def load_best(folder: RunFolder, fresh: Encoder) -> Encoder:
    """Give ``fresh`` (the encoder as it was at the START) the best state's weights, if that is a later one."""

    def later() -> int:
        with reading(folder.path / FILE, "use --overwrite to start anew", RunFolderError):
            return read_json(folder.path / FILE)["best_step"]

    if decide_on_rank_0(later):
        load_full_state(fresh, load_state(folder.checkpoints / BEST, fresh) if folder.writes else {})
    return fresh


def _finite(entry: dict[str, float]) -> bool:
    return all(math.isfinite(value) for value in entry.values())


def _numbers(entry: dict[str, Any]) -> dict[str, float]:
    """JSON has no NaN: files.write_json writes it as text."""
    return {key: value if isinstance(value, int) else float(value) for key, value in entry.items()}
