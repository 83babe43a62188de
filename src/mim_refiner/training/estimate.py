"""What a training will cost, told before it starts: hours from a measured step of its own, bytes against what is free.

The one model of cost, behind the line that a run begins with, ``--plan`` and ``doctor``. A step is taken on a few of
the run's own images, in its own precision; time and operations grow in step with the images. Bytes are the planner's
(training/memory.py).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mim_refiner.core.collectives import agree, process_rows, world_size
from mim_refiner.core.device import eagerly
from mim_refiner.core.modules import evaluation_mode
from mim_refiner.core.run import Run
from mim_refiner.core.sharding import processes_on_node
from mim_refiner.core.threads import CLEAR, threads_kept
from mim_refiner.data.loaders import TrainLoader, ViewBatch
from mim_refiner.data.photometric import BatchPhotometric
from mim_refiner.errors import InputError
from mim_refiner.models.mae import MaskedAutoencoder
from mim_refiner.models.refiner import Refiner
from mim_refiner.reporting import number_of
from mim_refiner.training.cached import refuse_batch_dependent
from mim_refiner.training.memory import (
    RESERVE,
    WASTE,
    Choice,
    Needs,
    even_parts,
    format_bytes,
    scratch_bytes,
    shards_of,
)
from mim_refiner.training.pretrain import forward_backward as pretrain_forward_backward
from mim_refiner.training.recipe import PretrainRecipe, RefineRecipe
from mim_refiner.training.refine import NUM_GLOBAL, anchor_backward, forward_backward, make_views, photometrics_of
from mim_refiner.training.traces import Trace
from mim_refiner.training.view_pool import pooled_epochs
from mim_refiner.types import ImageSize, height_width

ENOUGH = 0.4  # seconds: a step that takes as long tells the speed of larger ones
FEW = 2  # images of the first step
AN_HOUR, A_MINUTE = 3600.0, 60.0
CLEARLY = 0.7  # of a core: as much of the load average must be others' work


@dataclass(frozen=True)
class PhaseCost:
    """What a phase takes, by a step that was measured."""

    setting: str  # the recipe's key of ``epochs``
    limit: float  # seconds after which the phase ends anyhow
    epochs: int
    steps: int
    seconds: float  # of a step
    operations: float
    alone: float = math.inf  # seconds of a step on one thread of the processor, where that was tried
    before: float = 0.0  # seconds of the view pool
    before_alone: float = 0.0

    def hours(self, *, alone: bool = False) -> float:
        """Of all its steps; ``alone``: on one thread. A limited phase finds the faster number of threads itself."""
        several = self.before + self.steps * self.seconds
        one = self.before_alone + self.steps * self.alone
        chosen = one if alone else several if self.limit == math.inf else min(several, one)
        return min(self.limit, chosen) / AN_HOUR


@dataclass(frozen=True)
class Estimate:
    """Of a whole run; ``picked``: its way through the memory, of which ``free`` bytes are there for it."""

    images: int
    batch: int
    phases: Mapping[str, PhaseCost]
    picked: Choice
    free: float
    busy: bool = False  # other processes held the machine when the steps were timed

    @property
    def hours(self) -> float:
        """Of all phases; measuring the encoder before, between and after comes on top."""
        return sum(phase.hours() for phase in self.phases.values())

    @property
    def time(self) -> str:
        """In words; a run that shares its weights is not measured."""
        if not self.phases:
            return "time is not measured where weights are shared"
        passes = " (the machine was busy when this was timed; it may be quicker)" if self.busy else ""
        return f"about {format_hours(self.hours)}{passes}"

    @property
    def memory(self) -> str:
        """``"2.7 GB of 8.0 GB free"``; of the second nothing where nobody knows."""
        free = "" if self.free == math.inf else f" of {format_bytes(self.free)} free"
        return format_bytes(self.picked.peak) + free

    @property
    def line(self) -> str:
        """What a run begins with."""
        epochs = " and ".join(number_of(phase.epochs, f"epochs of {name}") for name, phase in self.phases.items())
        what = f"{number_of(self.images, 'images')}, {f'{epochs}: ' if epochs else ''}"
        text = f"cost: {what}{self.time}; memory: about {self.memory}"
        elsewhere = " with another --out or --overwrite" if "--set" in self.advice else ""  # the folder is taken by now
        return f"{text}; {self.advice}{elsewhere}" if self.advice else text

    @property
    def advice(self) -> str:
        """One thread where several wait for another process, or the setting with which it ends within an hour."""
        alone = sum(phase.hours(alone=True) for phase in self.phases.values())
        if self.hours > CLEAR * alone:
            return (
                f"other work holds this processor: on one thread about {format_hours(alone)}, with "
                "OMP_NUM_THREADS=1 before the command"
            )
        if self.hours <= 1:
            return ""
        last = list(self.phases.values())[-1]
        epochs = max(1, int((1 - self.hours + last.hours()) / max(last.hours(), 1e-9) * last.epochs))
        return f"for about an hour: --set {last.setting}={epochs}" if epochs < last.epochs else ""

    def record(self) -> dict[str, Any]:
        """For ``--plan``: hours and bytes, as numbers and in words."""
        needs, peak, held = self.picked.needs, self.picked.peak, self.picked.micro_batch or self.picked.needs.batch
        activations = f"activations of {number_of(held, 'images')}, beyond gradients"
        parts = {
            "Python, its libraries and images": needs.process,
            "weights, gradients, moments, queues": needs.state,
            "view pool": needs.view_pool,
            activations: peak - needs.process - needs.state - needs.view_pool,
        }
        sizes = {key: value for key, value in vars(needs).items() if key not in ("batch", "image_graphs")}
        return {
            "images": self.images,
            "batch": self.batch,
            "phases": {
                name: {**vars(phase), "hours": phase.hours(), "time": format_hours(phase.hours())}
                for name, phase in self.phases.items()
            },
            "hours": self.hours,
            "time": self.time,
            "memory": {name: format_bytes(size) for name, size in parts.items() if size} | {"peak": self.memory},
            "bytes": {
                "peak": peak,
                "free": self.free if self.free < math.inf else None,
                **sizes,
                "plain_step": needs.whole(),
                "one_image_at_a_time": needs.cached(1),
            },
            "settings": f"micro_batch={held}" if held < needs.batch else "the whole batch at once",
            "verdict": "fits" if peak <= self.free else "does not fit",
            "to_change": self.advice,
        }


def format_hours(hours: float) -> str:
    """``"3.2 hours"``, ``"25 minutes"``, ``"12 days"``."""
    for name, least, size in (("days", 48.0, 24.0), ("hours", 1.5, 1.0), ("minutes", 1.5 / 60, 1 / 60)):
        if hours >= least:
            amount = hours / size
            return f"{amount:.1f} {name}" if amount < 10 else f"{amount:.0f} {name}"
    return "a minute"


# --- of a refinement


def refine_phases(
    refiner: Refiner, recipe: RefineRecipe, loader: TrainLoader, run: Run, patience: float = 0.0
) -> dict[str, PhaseCost]:
    """What each phase costs; ``patience``: see :func:`measured`. The refiner stays as it is, but for ``checkpointing``,
    which becomes the recipe's. A run that shares its weights is not measured: a process that held all gradients might
    not fit.
    """
    phases: dict[str, PhaseCost] = {}
    if shards_of(recipe) > 1:
        return phases
    photometrics, kept = photometrics_of(recipe, refiner.backbone.info), dict[int, ViewBatch]()
    generator, epochs, steps = torch.Generator().manual_seed(0), pooled_epochs(recipe), loader.steps_per_epoch

    def fill(batch: ViewBatch) -> None:
        views, _ = make_views(batch, photometrics, generator, run)
        with evaluation_mode(refiner.backbone), run.autocast():
            features = [feature.float() for feature in refiner.frozen_features(views)]
        kept[len(batch.sample_ids)] = ViewBatch(features, batch.sample_ids, None)

    def step(batch: ViewBatch, *, pooled: bool) -> None:
        images = len(batch.sample_ids)
        if pooled and images not in kept:
            fill(batch)
        views, ids = make_views(kept[images] if pooled else batch, photometrics, generator, run)
        parts = parts_of(recipe, images)
        forward_backward(refiner, views, ids, generator, run, *parts)
        if refiner.anchor and not refiner.encoder_frozen:  # as in every step, whatever its share
            anchor_backward(refiner, views[:NUM_GLOBAL], generator, run, recipe.anchor.weight, parts[0])

    refiner.backbone.set_checkpointing(recipe.checkpointing)
    with unchanged(refiner):
        timed = partial(measured, loader=loader, run=run, patience=patience)
        seconds, _, alone = timed(fill) if epochs else (0.0, 0.0, 0.0)
        before = epochs * steps * seconds, epochs * steps * alone
        for name, key, phase, begin in (
            ("warm-up", "warmup.epochs", recipe.warmup, refiner.freeze_encoder),
            ("refinement", "refinement.epochs", recipe.refinement, refiner.unfreeze_encoder),
        ):
            begin()
            pooled = bool(epochs and (refiner.encoder_frozen or recipe.frozen_blocks))
            if phase.epochs:
                cost, limit = timed(partial(step, pooled=pooled), loads=not pooled), phase.max_seconds
                phases[name] = PhaseCost(key, limit or math.inf, phase.epochs, phase.epochs * steps, *cost, *before)
                before = 0.0, 0.0
    return phases


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
    process: int = 0,
) -> tuple[PretrainRecipe, Estimate]:
    """The recipe, with the micro-batch that fits if the whole batch does not, and what it costs. Raises InputError. The
    autoencoder stays as it is. ``process``: bytes that lie beside the step.
    """
    refuse_batch_dependent(mae, recipe.micro_batch)
    needs = pretrain_needs(mae, loader.batch_size // world_size(), loader.views[0].size, run, process)
    micro = _fitting(needs, recipe.micro_batch, free)
    refuse_batch_dependent(mae, micro)

    def step(batch: ViewBatch) -> None:
        generator = torch.Generator().manual_seed(0)
        images = photometric(batch.views[0].to(run.device), generator, process_rows(len(batch.sample_ids)))
        pretrain_forward_backward(mae, images, generator, run, micro)

    with unchanged(mae):
        cost = measured(step, loader, run)
    steps = recipe.training.epochs * loader.steps_per_epoch
    limit = recipe.training.max_seconds or math.inf
    phases = {"pre-training": PhaseCost("training.epochs", limit, recipe.training.epochs, steps, *cost)}
    picked = Choice(needs, micro, 0, False, "the largest that fits")
    estimate = Estimate(len(loader.images), loader.batch_size, phases, picked, free, machine_is_busy(loader, run))
    return recipe.model_copy(update={"micro_batch": micro}), estimate


def pretrain_needs(mae: MaskedAutoencoder, batch: int, size: ImageSize, run: Run, process: int = 0) -> Needs:
    """Trace the step of ``batch`` images a process, of so many pixels; ``process``: bytes beside it."""
    traced = Trace(mae)
    shape = mae.encoder.patch_embed.proj.in_channels, *height_width(size)

    def peak(images: int) -> int:
        pixels = traced.empty(images, *shape)
        with traced.watched() as live:
            pretrain_forward_backward(traced.module, pixels, None, run)
        return live.peak

    one, whole = peak(1), peak(batch)
    plain, parts = WASTE.get(run.device.type, WASTE["cuda"])
    image = (whole - one) / max(1, batch - 1)
    gradients = sum(parameter.nbytes for parameter in mae.parameters() if parameter.requires_grad)
    held = sum(tensor.nbytes for tensor in (*mae.parameters(), *mae.buffers()))
    return Needs(
        batch=batch,
        state=held + 3 * gradients + scratch_bytes(run.device, run.precision),
        gradients=gradients,
        images=4 * batch * math.prod(shape),
        encoder_base=int(parts * max(0.0, one - image)),
        encoder_image=int(parts * image),
        plain=int(plain * whole),
        process=process,
    )


def _fitting(needs: Needs, micro_batch: int | None, free: float) -> int | None:
    """Images that a pass may hold: what the recipe says if that fits, else the most that do; None: the whole batch."""
    usable = free * (1 - RESERVE)
    if micro_batch is None and needs.whole() <= usable:
        return None
    most = min(needs.largest_micro_batch(usable), micro_batch or needs.batch - 1)
    if most < 1:
        needed = needs.cached(1) / (1 - RESERVE)
        raise InputError(
            f"this needs about {format_bytes(needed)} even for one image at a time, and {format_bytes(free)} are free; "
            f"give --memory-budget {math.ceil(needed / 1e6)}MB if the machine has as much, a smaller --arch, smaller "
            "images (--set image_size=...) or a smaller decoder (--set decoder_depth=... --set decoder_dim=...)"
        )
    return micro_batch if most == micro_batch else even_parts(most, needs.batch)


# --- measuring


def measured(
    step: Callable[[ViewBatch], None], loader: TrainLoader, run: Run, *, loads: bool = True, patience: float = 0.0
) -> tuple[float, float, float]:
    """(seconds, operations, seconds on one thread) of a step of a process, from the smallest batch that takes long
    enough; the least of two times, or of all within ``patience`` seconds. ``loads``: that batches are made counts.
    """
    batch = loader.batch_size // world_size()
    images = min(FEW, batch)

    def seconds() -> float:
        begun = time.perf_counter()
        views = loader.first(images)
        loaded = time.perf_counter()
        step(views)
        if run.device.type != "cpu":
            torch.accelerator.synchronize()
        loading, computing = (loaded - begun) * loads, time.perf_counter() - loaded
        # loader processes work beside the step; without them loading adds to it
        return agree(max(loading / loader.workers, computing) if loader.workers else loading + computing)

    with eagerly(), threads_kept():
        cold, alone = seconds(), math.inf
        with FlopCounterMode(display=False) as counter:
            step(loader.first(images))
        operations = counter.get_total_flops() * batch / images
        if cold >= 20 * ENOUGH:
            found = min(cold, seconds())
        else:
            while (found := seconds()) < max(ENOUGH, patience) and images < batch:
                images = min(batch, 4 * images)
            until, found = time.perf_counter() + patience, min(found, seconds())  # others may have held the machine
            while agree(time.perf_counter()) < agree(until):
                found = min(found, seconds())
        if run.device.type == "cpu" and torch.get_num_threads() > 1:
            # threads meet after each operation; where another process holds a core, all wait
            torch.set_num_threads(1)
            alone = min(seconds(), seconds())
        return found * batch / images, operations, alone * batch / images


def machine_is_busy(loader: TrainLoader, run: Run) -> bool:
    """Whether more was to be computed in the last minute than this process, and those beside it of the run, ask for,
    and more than all cores can do; False where the system tells no load.
    """
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows has none
        return False
    threads = loader.workers + (torch.get_num_threads() if run.device.type == "cpu" else 1)
    own = min(threads, time.process_time() / A_MINUTE)  # this process is part of the load, a young one of little
    others = load - own * processes_on_node()
    return others > CLEARLY and others + threads * processes_on_node() > (os.cpu_count() or 1)


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """What runs inside leaves buffers, modes, gradients and random numbers as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    with torch.random.fork_rng(), evaluation_mode(module):  # whose end brings all modes back
        module.train()
        yield
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)
        parameter.grad = None
