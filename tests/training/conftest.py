"""A tiny refinement that runs in a second: 64 random images of 16 px, a 3-block ViT, two heads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mim_refiner.core.ema import ExponentialMovingAverage
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import TrainLoader
from mim_refiner.data.photometric import BatchPhotometric
from mim_refiner.data.sources import open_source
from mim_refiner.data.views import multi_crop_views
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.heads import HeadConfig
from mim_refiner.models.refiner import Refiner
from mim_refiner.reporting import NullReporter
from mim_refiner.training.recipe import Heads, Phase, RefineRecipe
from mim_refiner.training.refinement import Refinement
from mim_refiner.training.state import RunFolder
from mim_refiner.training.trainer import LoopSettings, fit

TINY = RefineRecipe(
    name="test",
    batch_size=16,
    heads=Heads(blocks=[1, 2], pooling="cls"),
    warmup=Phase(epochs=2, base_lr=2e-3, warmup_epochs=1),
    refinement=Phase(epochs=3, base_lr=2e-3, warmup_epochs=1, top_k=4, layer_decay=0.8),
    ema_decay=0.9,
)


class TinyRun:
    """One refinement job with its modules; ``run`` trains it in a folder."""

    def __init__(self, images: ImageSet, *, drop_path: float = 0.1) -> None:
        torch.manual_seed(0)
        backbone = Backbone.wrap(create_vit("vit_w32_d3_h2_p8", image_size=16, drop_path_rate=drop_path))
        self.refiner = Refiner(backbone, (1, 2), HeadConfig(32, 32, 16, 64), pooling="cls")
        self.ema = ExponentialMovingAverage(backbone)
        views = multi_crop_views(16, 8, 2)
        self.loader = TrainLoader(images, views, 16, seed=0)
        mean, std = backbone.info.mean, backbone.info.std
        photometrics = [BatchPhotometric(v, mean, std) for v in views for _ in range(v.count)]
        self.job = Refinement(
            self.refiner,
            self.ema,
            TINY,
            self.loader,
            photometrics,
            device=torch.device("cpu"),
            precision="fp32",
            labels=images.labels,
        )

    def run(self, folder: Path, *, checkpoint_every: int = 3, stop_after: int | None = None) -> list[dict[str, Any]]:
        """Train (or go on); ``stop_after`` raises KeyboardInterrupt instead of that step. Returns the metrics."""
        phases = self.job.phases()
        if stop_after is not None:
            phases = [
                stopping(phase, stop_after, offset) for phase, offset in zip(phases, (0, phases[0].steps), strict=True)
            ]
        run = RunFolder.open(folder, TINY.model_dump(mode="json"), overwrite=False)
        loop = LoopSettings(0, torch.device("cpu"), log_every=1, checkpoint_every=checkpoint_every)
        fit(phases, {"model": self.refiner, "ema": self.ema}, run, loop, NullReporter())
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stopping(phase: Any, stop_after: int, offset: int) -> Any:
    """The phase, torn down before step ``stop_after`` of the whole run: as a kill would, without a checkpoint."""
    import dataclasses

    seen = {"steps": offset}

    def step(*arguments: Any) -> Any:
        if seen["steps"] >= stop_after:
            raise KeyboardInterrupt
        seen["steps"] += 1
        return phase.step(*arguments)

    return dataclasses.replace(phase, step=step)


@pytest.fixture
def tiny_images(tmp_path: Path) -> ImageSet:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (64, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=coarse.repeat(5, axis=1).repeat(5, axis=2), labels=np.arange(64) % 4)
    return ImageSet(open_source(tmp_path / "images.npz"))


@pytest.fixture
def tiny_run(tiny_images: ImageSet) -> Callable[[], TinyRun]:
    return lambda: TinyRun(tiny_images)
