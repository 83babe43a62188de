"""A tiny refinement that runs in a second: 64 random images of 16 px, a 3-block ViT, two heads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import TrainLoader
from mim_refiner.data.sources import open_source
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.training import refine
from mim_refiner.training.loop import step_generator
from mim_refiner.training.recipe import EncoderPhase, GuardSettings, HeadPhase, Heads, RefineRecipe, Views
from mim_refiner.training.state import RunFolder

TINY = RefineRecipe(
    name="test",
    batch_size=16,
    views=Views(global_size=16, local_size=8, num_local=2),
    heads=Heads(blocks=[1, 2], pooling="cls", projector_hidden=32, predictor_hidden=32, out_dim=16, queue_size=64),
    warmup=HeadPhase(epochs=2, base_lr=2e-3, warmup_epochs=1),
    refinement=EncoderPhase(epochs=3, base_lr=2e-3, warmup_epochs=1, top_k=4, layer_decay=0.8),
    ema_decay=0.9,
    log_every=1,
    guard=GuardSettings(enabled=False),
)


class TinyRun:
    """One refinement with its modules; ``run`` trains it in a folder."""

    def __init__(self, images: ImageSet, *, drop_path: float = 0.1, **settings: Any) -> None:
        torch.manual_seed(0)
        self.recipe = TINY.model_copy(update=settings, deep=True)  # tests may change parts of it
        backbone = Backbone.wrap(create_vit("vit_w32_d3_h2_p8", image_size=16, drop_path_rate=drop_path))
        self.refiner = refine.make_refiner(backbone, self.recipe)
        self.loader = TrainLoader(images, refine.view_specs(TINY), TINY.batch_size, seed=0)
        self.refinement = refine.build(self.recipe, self.refiner, self.loader, Run())
        self.ema = self.refinement.ema
        self.steps: list[int] = []  # of the whole run, as they were taken
        self.spoil: Callable[[int], bool] = lambda step: False  # whether losses and gradients of a step are NaN

    def run(self, folder: Path, *, stop_after: int | None = None, **settings: Any) -> list[dict[str, Any]]:
        """Train (or go on); ``stop_after`` raises KeyboardInterrupt instead of that step. Returns the metrics.

        As a kill would, without a checkpoint. ``settings`` of the recipe change what is logged, saved and watched.
        """
        recipe = self.recipe.model_copy(update={"checkpoint_every": 3, **settings})
        refinement = dataclasses.replace(self.refinement, recipe=recipe)
        taken = refine.forward_backward

        def forward_backward(refiner: Any, views: Any, ids: Any, generator: torch.Generator, *rest: Any) -> Any:
            step = self._number(generator)
            if stop_after is not None and step >= stop_after:
                raise KeyboardInterrupt
            self.steps.append(step)
            output = taken(refiner, views, ids, generator, *rest)
            if self.spoil(step):
                for parameter in refiner.parameters():
                    parameter.grad = torch.full_like(parameter, float("nan"))
                output = output._replace(loss=output.loss * float("nan"))
            return output

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(refine, "forward_backward", forward_backward)
            refine.train(refinement, RunFolder(folder, recipe.model_dump(mode="json"), overwrite=False))
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    def _number(self, generator: torch.Generator) -> int:
        """Which step of the run has this generator; torch's global one is left as it is."""
        with torch.random.fork_rng(devices=[]):
            places = [(phase, step) for phase, count in ((0, 8), (1, 12)) for step in range(count)]
            seeds = [step_generator(0, *place).initial_seed() for place in places]
        return seeds.index(generator.initial_seed())


@pytest.fixture
def tiny_images(tmp_path: Path) -> ImageSet:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (64, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=coarse.repeat(5, axis=1).repeat(5, axis=2), labels=np.arange(64) % 4)
    return ImageSet(open_source(tmp_path / "images.npz"))


@pytest.fixture
def tiny_run(tiny_images: ImageSet) -> Callable[..., TinyRun]:
    return lambda **options: TinyRun(tiny_images, **options)
