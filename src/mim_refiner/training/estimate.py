"""What a training will cost, told before it starts: hours from a measured step of its own, bytes against what is free.

The one model of cost, behind the line that a run begins with, ``--plan`` and ``doctor``. A step is taken on a few of
the run's own images, in its own precision; time, operations and activations grow in step with the images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mim_refiner.core.collectives import agree, process_rows, world_size
from mim_refiner.core.device import eagerly
from mim_refiner.core.run import Run
from mim_refiner.core.threads import CLEAR, threads_kept
from mim_refiner.data.loaders import TrainLoader, ViewBatch
from mim_refiner.data.photometric import BatchPhotometric, augment
from mim_refiner.errors import InputError
from mim_refiner.models.mae import MaskedAutoencoder
from mim_refiner.models.refiner import Refiner
from mim_refiner.training.cached import refuse_batch_dependent
from mim_refiner.training.memory import RESERVE, WASTE, LiveBytes, even_parts, format_bytes
from mim_refiner.training.pretrain import forward_backward as pretrain_forward_backward
from mim_refiner.training.recipe import Phase, PretrainRecipe, RefineRecipe
from mim_refiner.training.refine import forward_backward, view_specs
from mim_refiner.training.view_pool import pool_bytes

ENOUGH = 0.4  # seconds: a step that takes as long tells the speed of larger ones
FEW = 2  # images of the first step
AN_HOUR = 3600.0

Step = Callable[[ViewBatch], None]


@dataclass(frozen=True)
class PhaseCost:
    """``setting``: the recipe's key of ``epochs``; ``seconds`` and ``operations`` are those of a step, ``alone`` its
    seconds on one thread of the processor (infinite where that was not tried).
    """

    setting: str
    limit: float  # seconds after which the phase ends anyhow
    epochs: int
    steps: int
    seconds: float
    operations: float
    alone: float = math.inf

    @property
    def hours(self) -> float:
        """Of all its steps."""
        return min(self.limit, self.steps * self.seconds) / AN_HOUR

    @property
    def hours_alone(self) -> float:
        """The same on one thread."""
        return min(self.limit, self.steps * self.alone) / AN_HOUR


@dataclass(frozen=True)
class Bytes:
    """What a step holds: ``state`` is weights, moments, average and queues; gradients come as ``activations`` go; a
    view pool lies beside them.
    """

    state: float
    gradients: float
    activations_base: float
    activations_image: float
    view_pool: float = 0.0

    def peak(self, images: int) -> float:
        """Of a step that holds the activations of so many images at a time."""
        activations = self.activations_base + images * self.activations_image
        return self.state + self.view_pool + max(activations, self.gradients)

    def images_within(self, free: float) -> int:
        """The most images whose step fits into so many bytes, with what is kept in reserve; below 1: none."""
        room = free * (1 - RESERVE) - self.state - self.view_pool
        if room < self.gradients:
            return 0
        return int(min(room - self.activations_base, 1e15) // max(1.0, self.activations_image))


@dataclass(frozen=True)
class Estimate:
    """Of a whole run; ``held``: images whose activations a pass holds, ``free``: bytes that the device has for it."""

    images: int
    batch: int
    phases: Mapping[str, PhaseCost]
    needs: Bytes
    held: int
    free: float
    planned: float | None = None  # peak of a cached step, as the planner has it
    pool: int = 0  # bytes of the view pool

    @property
    def peak(self) -> float:
        """Bytes that a step needs, in the warm-up beside the view pool."""
        step = self.needs.peak(self.held) if self.planned is None else self.planned
        return max(step, self.needs.state + self.pool)

    @property
    def hours(self) -> float:
        """Of all phases; measuring the encoder before, between and after comes on top."""
        return sum(phase.hours for phase in self.phases.values())

    @property
    def line(self) -> str:
        """What a run begins with."""
        epochs = " and ".join(f"{phase.epochs} epochs of {name}" for name, phase in self.phases.items())
        free = "" if self.free == math.inf else f" of {format_bytes(self.free)} free"
        text = (
            f"cost: {self.images} images, {epochs or 'no epochs'}: about {format_hours(self.hours)}; memory: about "
            f"{format_bytes(self.peak)}{free}"
        )
        text += ", time without what the view pool saves" if self.pool else ""
        return f"{text}; {self.advice}" if self.advice else text

    @property
    def advice(self) -> str:
        """One thread where several wait for another process, or the setting with which it ends within an hour."""
        alone = sum(phase.hours_alone for phase in self.phases.values())
        if self.hours > CLEAR * alone:
            return (
                f"other work holds this processor: on one thread about {format_hours(alone)}, with "
                "OMP_NUM_THREADS=1 before the command"
            )
        if self.hours <= 1:
            return ""
        *before, last = self.phases.values()
        epochs = max(1, int((1 - sum(phase.hours for phase in before)) / max(last.hours, 1e-9) * last.epochs))
        return f"for about an hour: --set {last.setting}={epochs}" if epochs < last.epochs else ""

    def record(self) -> dict[str, Any]:
        """For ``--plan``: hours and bytes, as numbers and in words."""
        peak, needs = self.peak, self.needs
        phases = {name: {**asdict(phase), "hours": phase.hours, "time": format_hours(phase.hours)}
                  for name, phase in self.phases.items()}  # fmt: skip
        memory = {
            "weights, gradients, moments": format_bytes(needs.state + needs.gradients),
            f"activations of {self.held} images": format_bytes(
                needs.activations_base + self.held * needs.activations_image
            ),
            "peak": f"{format_bytes(peak)} of {format_bytes(self.free)}"
            if self.free < math.inf
            else format_bytes(peak),
        }
        return {
            "images": self.images,
            "batch": self.batch,
            "phases": phases,
            "hours": self.hours,
            "time": format_hours(self.hours),
            "memory": memory,
            "bytes": {"peak": peak, "free": self.free, **asdict(needs)},
            "settings": f"micro_batch={self.held}"
            if self.held < self.batch // world_size()
            else "the whole batch at once",
            "verdict": "fits" if peak <= self.free else "does not fit",
            "to_change": self.advice,
        }


def limit_of(phase: Phase) -> float:
    """Seconds, infinite without ``max_seconds``."""
    return phase.max_seconds or math.inf


def format_hours(hours: float) -> str:
    """``"3.2 hours"``, ``"25 minutes"``, ``"12 days"``."""
    for name, least, size in (("days", 48.0, 24.0), ("hours", 1.5, 1.0), ("minutes", 1.5 / 60, 1 / 60)):
        if hours >= least:
            amount = hours / size
            return f"{amount:.1f} {name}" if amount < 10 else f"{amount:.0f} {name}"
    return "a minute"


# --- of a refinement


def refine_estimate(refiner: Refiner, recipe: RefineRecipe, loader: TrainLoader, free: float, run: Run) -> Estimate:
    """What both phases cost. The refiner stays as it is, but for ``checkpointing``, which becomes the recipe's."""
    step, phases = refine_step(refiner, recipe, run), {}
    plain = refine_step(refiner, recipe.model_copy(update={"micro_batch": None}), run)
    batch = loader.batch_size // world_size()
    refiner.backbone.set_checkpointing(recipe.checkpointing)
    with unchanged(refiner):
        refiner.unfreeze_encoder()
        needs = traced(plain, refiner, loader, run)
        average = sum(parameter.nbytes for parameter in refiner.backbone.parameters())
        pool = pool_bytes(recipe, refiner, loader.steps_per_epoch * recipe.batch_size)
        needs = replace(needs, state=needs.state + average, view_pool=pool if recipe.frozen_blocks else 0)
        most = batch if recipe.micro_batch else max(FEW, min(batch, needs.images_within(free)))
        for name, setting, phase, begin in (
            ("warm-up", "warmup.epochs", recipe.warmup, refiner.freeze_encoder),
            ("refinement", "refinement.epochs", recipe.refinement, refiner.unfreeze_encoder),
        ):
            begin()
            if phase.epochs:
                steps = phase.epochs * loader.steps_per_epoch
                cost = measured(step, loader, run, most)
                phases[name] = PhaseCost(setting, limit_of(phase), phase.epochs, steps, *cost)
    return Estimate(len(loader.images), loader.batch_size, phases, needs, recipe.micro_batch or batch, free, pool=pool)


def refine_step(refiner: Refiner, recipe: RefineRecipe, run: Run) -> Step:
    """Augmentation, forward and backward pass of a batch."""
    info = refiner.backbone.info
    views = [view for view in view_specs(recipe) for _ in range(view.count)]
    photometrics = [BatchPhotometric(view, info.mean, info.std) for view in views]

    def step(batch: ViewBatch) -> None:
        generator, ids = torch.Generator().manual_seed(0), batch.sample_ids.to(run.device)
        crops = augment(batch.views, photometrics, generator, run.device, process_rows(len(ids)))
        forward_backward(refiner, crops, ids, generator, run, *parts_of(recipe, len(ids)))

    return step


def parts_of(recipe: RefineRecipe, images: int) -> tuple[int | None, int]:
    """(micro_batch, kept graphs) with which a few images go in parts as the whole batch does."""
    whole, micro = recipe.batch_size // world_size(), recipe.micro_batch
    if micro is None or micro >= whole:
        return None, 0
    own = max(1, micro * images // whole)
    return own, recipe.graphs * -(-images // own) // -(-whole // micro)


# --- of a pre-training


def pretrain_estimate(
    mae: MaskedAutoencoder,
    recipe: PretrainRecipe,
    loader: TrainLoader,
    photometric: BatchPhotometric,
    free: float,
    run: Run,
) -> tuple[PretrainRecipe, Estimate]:
    """The recipe, with the micro-batch that fits if the whole batch does not, and what it costs. Raises InputError.

    The autoencoder stays as it is.
    """

    def step(batch: ViewBatch, micro_batch: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        images = photometric(batch.views[0].to(run.device), generator, process_rows(len(batch.sample_ids)))
        pretrain_forward_backward(mae, images, generator, run, micro_batch)

    batch, epochs = loader.batch_size // world_size(), recipe.training.epochs
    refuse_batch_dependent(mae, recipe.micro_batch)
    with unchanged(mae):
        needs = traced(step, mae, loader, run)
        micro = _fitting(needs, recipe.micro_batch, batch, free)
        refuse_batch_dependent(mae, micro)
        cost = measured(partial(step, micro_batch=micro), loader, run, batch)
    phases = {
        "pre-training": PhaseCost(
            "training.epochs", limit_of(recipe.training), epochs, epochs * loader.steps_per_epoch, *cost
        )
    }
    estimate = Estimate(len(loader.images), loader.batch_size, phases, needs, micro or batch, free)
    return recipe.model_copy(update={"micro_batch": micro}), estimate


def _fitting(needs: Bytes, micro_batch: int | None, batch: int, free: float) -> int | None:
    """Images that a pass may hold: what the recipe says if that fits, else the most that do; None: the whole batch."""
    most = needs.images_within(free)
    if most >= (micro_batch or batch):
        return micro_batch
    if most < 1:
        raise InputError(
            f"this needs about {format_bytes(needs.peak(1) / (1 - RESERVE))} even for one image at a time, and "
            f"{format_bytes(free)} are free; use a smaller --arch, smaller images (--set image_size=...) or a smaller "
            "decoder (--set decoder_depth=... decoder_dim=...)"
        )
    return even_parts(most, batch)


# --- measuring


def traced(step: Step, module: nn.Module, loader: TrainLoader, run: Run) -> Bytes:
    """Bytes of a step by its images, from the storages alive during two small ones."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # Gradients are counted apart: with few images a trace that kept them would see their peak, not the activations'.
    hooks = [parameter.register_post_accumulate_grad_hook(_drop_gradient) for parameter in trained]
    peaks = []
    for images in (FEW, 2 * FEW):
        batch = loader.first(images)
        with LiveBytes() as live:
            step(batch)
        peaks.append(live.peak)
    for hook in hooks:
        hook.remove()
    waste = WASTE.get(run.device.type, WASTE["cuda"])[0]
    image = waste * (peaks[1] - peaks[0]) / FEW
    gradients = sum(parameter.nbytes for parameter in trained)
    held = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    return Bytes(held + 2 * gradients, gradients, max(0.0, waste * peaks[0] - FEW * image), image)


def measured(step: Step, loader: TrainLoader, run: Run, most: int) -> tuple[float, float, float]:
    """(seconds, operations, seconds on one thread) of a step of a process, from the smallest batch that takes long
    enough, at ``most``.
    """
    batch = loader.batch_size // world_size()
    images, warm = min(FEW, most), False
    with eagerly():
        with FlopCounterMode(display=False) as counter:
            step(loader.first(images))
        operations = counter.get_total_flops() * batch / images
        while True:
            seconds = agree(_seconds(step, loader, images, run))
            if (warm and images == most) or seconds >= (ENOUGH if warm else 20 * ENOUGH):
                seconds = min(seconds, agree(_seconds(step, loader, images, run)))  # others may have held the machine
                return seconds * batch / images, operations, _alone(step, loader, images, run) * batch / images
            images, warm = (min(most, 4 * images) if warm else images), True


def _alone(step: Step, loader: TrainLoader, images: int, run: Run) -> float:
    """Seconds on one thread. Threads meet after each operation; where another process holds a core, all wait."""
    if run.device.type != "cpu" or torch.get_num_threads() == 1:
        return math.inf
    with threads_kept():
        torch.set_num_threads(1)
        return min(agree(_seconds(step, loader, images, run)) for _ in range(2))


def _seconds(step: Step, loader: TrainLoader, images: int, run: Run) -> float:
    begun = time.perf_counter()
    batch = loader.first(images)
    loaded = time.perf_counter()
    step(batch)
    if run.device.type != "cpu":
        torch.accelerator.synchronize()
    loading, computing = loaded - begun, time.perf_counter() - loaded
    # loader processes work beside the step; without them loading adds to it
    return max(loading / loader.workers, computing) if loader.workers else loading + computing


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """What runs inside leaves buffers, modes, gradients and random numbers as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    modes = [(part, part.training) for part in module.modules()]
    with torch.random.fork_rng():
        yield
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)
        parameter.grad = None
    for part, training in modes:
        part.training = training


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
