"""The memory planner: what a step will need, found by tracing it (training/traces.py), and what then fits."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from pydantic import ByteSize

from mim_refiner.core.collectives import world_size
from mim_refiner.core.device import free_memory
from mim_refiner.core.run import Run
from mim_refiner.core.sharding import shard_count
from mim_refiner.errors import InputError
from mim_refiner.models.refiner import Refiner
from mim_refiner.models.stochastic import batch_dependent_layer
from mim_refiner.training.recipe import RefineRecipe
from mim_refiner.training.traces import TRACED, RefinerTrace
from mim_refiner.training.view_pool import view_tokens
from mim_refiner.types import Checkpointing, ImageSize, height_width

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
RESERVE = 0.08  # of the budget, for what libraries keep
# Activations and transients take more than their own bytes, by the gaps between blocks of changing size: in a plain
# step, and in a cached one, whose passes follow each other. glibc's heap: measured (docs/scale.md); CUDA's: assumed.
WASTE = {"cpu": (1.09, 1.3), "cuda": (1.1, 1.1)}
BF16_SCRATCH = 80e6  # that products in bf16 keep on a CPU: measured, about the same for all sizes


@dataclass(frozen=True)
class Needs:
    """Bytes of one process; ``encoder`` and ``heads`` are peaks above what is there before and after."""

    batch: int  # images
    state: int  # weights, gradients, moments, average, queues
    gradients: int  # of the state: those of a plain step come as its activations go
    images: int  # the batch's views
    encoder_base: int  # of the encoder's pass: what does not grow with its images
    encoder_image: int  # and what an image (all its views of the larger kind) adds
    plain: int  # graph of everything at once
    features: int = 0  # inputs of the heads and their gradients
    prefix: int = 0  # tokens after the frozen blocks, which a cached step keeps
    heads: int = 0  # graph of the heads on the whole batch
    image_graphs: tuple[int, ...] = ()  # an image's graph through all its views of one size, in the order of the sizes
    view_pool: int = 0  # beside all of it
    warmup: int = 0  # peak of the warm-up on a view pool that goes with it
    process: int = 0  # what Python, its libraries and the images take
    anchor_image: int = 0  # an image's graph in the dense anchor's pass, when the gradients are there

    @property
    def kept(self) -> int:
        """What a cached step holds all the time."""
        return self.process + self.state + self.view_pool + self.images + self.features + self.prefix

    def graphs(self, micro_batch: int, count: int) -> int:
        """The graphs of the first ``count`` micro-batches."""
        parts = -(-self.batch // micro_batch)  # of every size of view
        kept = (min(max(0, count - parts * i) * micro_batch, self.batch) for i in range(len(self.image_graphs)))
        return sum(images * graph for images, graph in zip(kept, self.image_graphs, strict=True))

    def cached(self, micro_batch: int, kept_graphs: int = 0) -> int:
        """Peak of the cached step. Kept graphs stand beside the heads', before the encoder has gradients."""
        kept = self.graphs(micro_batch, kept_graphs)
        image = max(self.encoder_image, self.anchor_image)
        most = max(self.heads + max(0, kept - self.gradients), self.encoder_base + max(kept, micro_batch * image))
        return max(self.warmup, self.kept + most)

    def most_graphs(self, micro_batch: int, budget: float) -> int:
        """How many micro-batches' graphs can be kept within ``budget``."""
        count = -(-self.batch // micro_batch) * len(self.image_graphs)
        while count and self.cached(micro_batch, count) > budget:
            count -= 1
        return count

    def whole(self) -> int:
        """Peak of the plain step."""
        most = max(self.plain, self.gradients + self.batch * self.anchor_image)
        return max(self.warmup, self.process + self.state - self.gradients + self.view_pool + self.images + most)

    def largest_micro_batch(self, budget: float) -> int:
        """Images that fit into a pass of the cached step, 0 if not even one."""
        room = budget - self.kept
        if room < self.heads or self.warmup > budget:
            return 0
        image = max(1, self.encoder_image, self.anchor_image)
        return max(0, min(self.batch, int(min(room - self.encoder_base, 1e15) // image)))


@dataclass(frozen=True)
class Choice:
    """What the planner picked: keys of the recipe, and why."""

    needs: Needs
    micro_batch: int | None
    kept_graphs: int
    checkpointing: Checkpointing
    words: str

    @property
    def peak(self) -> int:
        """Bytes at the peak of a step."""
        if self.micro_batch is None or self.micro_batch >= self.needs.batch:
            return self.needs.whole()
        return self.needs.cached(self.micro_batch, self.kept_graphs)

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of the recipe."""
        return {key: getattr(self, key) for key in ("micro_batch", "kept_graphs", "checkpointing")}


def measure_needs(
    refiner: Refiner,
    view_shapes: Sequence[tuple[ImageSize, int]],
    batch: int,
    *,
    precision: str,
    checkpointing: Checkpointing = False,
    shards: int = 1,
    process: int = 0,
    pool: int = 0,
) -> Needs:
    """Trace the step of ``batch`` images a process. view_shapes: (pixels, how many such views), global ones first.

    ``shards``: processes that share the blocks' weights (core.sharding). ``process`` and ``pool``: bytes that lie
    beside the step, of Python, its libraries and images, and of a view pool; without frozen blocks it is gone when the
    encoder moves.
    """
    traced = RefinerTrace(refiner, precision, checkpointing)
    info, frozen, views = refiner.backbone.info, refiner.frozen_blocks, sum(count for _, count in view_shapes)
    trainable = sum(p.nbytes for p in traced.module.parameters() if p.requires_grad)
    held = sum(tensor.nbytes for tensor in (*refiner.parameters(), *refiner.buffers()))
    average = sum(parameter.nbytes for parameter in refiner.backbone.parameters())
    several = [traced.encoder(shape, TRACED) for shape in view_shapes]
    largest = max(range(len(several)), key=several.__getitem__)
    one = traced.encoder(view_shapes[largest], 1)  # base: largest transients of weights, and their casts
    base = max(0.0, one - (several[largest] - one) / (TRACED - 1))
    slopes = [(peak - base) / TRACED for peak in several]
    features = len(refiner.blocks) * batch * views * info.embed_dim * 4
    heads = traced.heads(batch, views)
    plain, cached = WASTE.get(traced.device.type, WASTE["cuda"])
    scratch = scratch_bytes(traced.device, precision)
    state = held + average + 3 * trainable + scratch - _elsewhere(traced.module, shards)
    return Needs(
        batch=batch,
        state=state,
        gradients=0 if shards > 1 else trainable,
        images=sum(batch * count * info.in_chans * math.prod(height_width(size)) * 4 for size, count in view_shapes),
        features=2 * features,
        prefix=4 * batch * view_tokens(refiner.backbone, view_shapes) * info.embed_dim if frozen else 0,
        heads=int(cached * heads),
        encoder_base=int(cached * base),
        encoder_image=int(cached * slopes[largest]),
        image_graphs=tuple(int(plain * slope) for slope in slopes),
        plain=int(plain * (base + batch * sum(slopes) + heads)),
        view_pool=pool if frozen else 0,
        warmup=process + state + pool + features + int(cached * heads) if pool else 0,
        process=process,
        anchor_image=int(plain * traced.anchor(view_shapes[0][0]) / TRACED),
    )


def scratch_bytes(device: torch.device, precision: str) -> int:
    """What products keep for themselves."""
    return int(BF16_SCRATCH) if precision == "bf16" and device.type == "cpu" else 0


def _elsewhere(refiner: Refiner, shards: int) -> int:
    """Bytes of blocks spread over ``shards`` that other processes hold; three whole blocks are here at a time."""
    if shards == 1:
        return 0
    blocks = [[(p.nbytes, p.requires_grad) for p in block.parameters()] for block in refiner.backbone.model.blocks]
    state = sum(2 * size + 3 * size * trains for block in blocks for size, trains in block)
    return int(state * (1 - 1 / shards)) - 3 * max(sum(size for size, _ in block) for block in blocks)


class Planner:
    """What a refinement can do about its memory; ``process`` and ``pool``: see :func:`measure_needs`."""

    def __init__(self, refiner: Refiner, recipe: RefineRecipe, run: Run, process: int = 0, pool: int = 0) -> None:
        self.recipe, self.backbone, self.pool = recipe, refiner.backbone, pool
        self.batch = recipe.batch_size // world_size()  # of a process
        way: dict[str, Any] = {"precision": run.precision, "shards": shards_of(recipe), "process": process}
        # of a number of images and ``checkpointing``; a trace takes seconds
        self.needs = cache(partial(measure_needs, refiner, recipe.views.shapes, pool=pool, **way))

    def as_asked(self, free: float) -> Choice:
        """The recipe's own setting; graphs, where it leaves their number open, as ``free`` bytes allow."""
        micro, kept = self.recipe.micro_batch, self.recipe.checkpointing
        needs = self.needs(self.batch, checkpointing=kept)
        if micro is None or micro >= self.batch:
            return Choice(needs, micro, 0, kept, "as the recipe says")
        return self._cached(needs, [micro], kept, free * (1 - RESERVE), "as the recipe says: ")

    def fitting(self, budget: float, limit: str = "--memory-budget") -> Choice:
        """The cheapest setting that fits into ``budget`` bytes: plain, plain with selective checkpointing, cached with
        as many graphs as fit, cached with checkpointing.

        What the recipe sets is kept. Raises InputError when nothing fits, with what would; ``limit`` names the budget.
        """
        usable, asked, micro = budget * (1 - RESERVE), self.recipe.checkpointing, self.recipe.micro_batch
        layer, whole = batch_dependent_layer(self.backbone), self.needs(self.batch, checkpointing=asked).whole()
        if micro is None:
            # selective checkpointing leaves more than half
            able = self.backbone.runner is not None and not self.recipe.compile
            worth = able and not asked and not layer and whole < 2 * usable
            ways: tuple[Checkpointing, ...] = (asked, "selective") if worth else (asked,)
            for kept in ways:
                needs = self.needs(self.batch, checkpointing=kept)
                if needs.whole() <= usable:
                    words = f"the plain step fits into {format_bytes(budget)}"
                    words += ", norms and GELU computed twice" if kept == "selective" else ""
                    return Choice(needs, None, 0, kept, words)
        if layer:
            raise InputError(
                f"{limit} {format_bytes(budget)}: the step needs {format_bytes(whole / (1 - RESERVE))}, and the "
                f"encoder's layer {layer} makes the outputs of an image depend on the other images of the batch, so "
                "micro-batches would change the training; set a smaller batch_size"
            )
        for kept in dict.fromkeys((asked, True)):
            needs = self.needs(self.batch, checkpointing=kept)
            fits = needs.largest_micro_batch(usable)
            halves = [even_parts(max(1, fits >> halved), self.batch) for halved in range(fits.bit_length())]
            sizes = [size for size in ([micro] if micro else halves) if size <= fits]
            if self.recipe.kept_graphs != "auto":
                sizes = [size for size in sizes if needs.cached(size, self.recipe.graphs) <= usable][:1]
            if sizes:
                return self._cached(needs, sizes[:3], kept, usable, f"for {format_bytes(budget)} the ")
        raise self._refused(budget, limit)

    def _refused(self, budget: float, limit: str) -> InputError:
        """The line for what fits no way, with what would."""
        batch, usable, micro, graphs = self.batch, budget * (1 - RESERVE), self.recipe.micro_batch, self.recipe.graphs
        least = self.needs(batch, checkpointing=True)
        room, halves = least.state + least.process < usable, (batch >> n for n in range(1, batch.bit_length() - 1))
        smaller = ((size, self.needs(size, checkpointing=True)) for size in halves if room and batch % size == 0)
        fits = (size for size, needs in smaller if needs.cached(min(micro or 1, size), graphs) <= usable)
        fitting = next(fits, None)
        other = f"--set batch_size={self.recipe.batch_size * fitting // batch}, " if fitting else ""
        needed = least.cached(micro or 1, graphs) / (1 - RESERVE)
        parts = {"weights, optimizer and queues": least.state, "the heads on the whole batch": least.heads}
        parts |= {"the view pool (view_pool)": self.pool, "Python, its libraries and the images": least.process}
        return InputError(
            f"{limit} {format_bytes(budget)}: the step needs {format_bytes(needed)} even with micro_batch={micro or 1} "
            f"and checkpointing ({', '.join(f'{format_bytes(size)} {name}' for name, size in parts.items() if size)}); "
            f"give {other}--memory-budget {math.ceil(needed / 1e6)}MB if the machine has as much, or "
            "--set frozen_blocks=..., fewer --head-blocks or more processes"
        )

    def _cached(self, needs: Needs, sizes: Sequence[int], kept: Checkpointing, usable: float, words: str) -> Choice:
        """The cached step with the micro-batch of ``sizes`` (large ones first) by which most graphs can be kept."""
        auto, groups = self.recipe.kept_graphs == "auto", len(needs.image_graphs)

        def count(size: int) -> int:
            most = -(-needs.batch // size) * groups
            return needs.most_graphs(size, usable) if auto else min(self.recipe.graphs, most)

        micro = max(sizes, key=lambda size: needs.graphs(size, count(size)))
        graphs, parts = count(micro), -(-needs.batch // micro)
        words += f"cached step of {parts} micro-batches, {graphs} of {parts * groups} graphs kept: "
        words += "for the others one more forward pass of the trained blocks"
        words += ", and for all one for checkpointing" if kept is True else ""
        return Choice(needs, micro, graphs, kept, words)


def shards_of(recipe: RefineRecipe) -> int:
    """Processes that share the weights of the encoder's blocks."""
    return shard_count() if recipe.shard else 1


def even_parts(micro_batch: int, batch: int) -> int:
    """The smallest micro-batch that needs no more passes than ``micro_batch`` does: its parts are about equal."""
    return -(-batch // -(-batch // micro_batch))


def parse_budget(text: str, device: torch.device) -> float:
    """``"24GB"``, ``"80 GiB"`` or ``"auto"`` (what the device has free now) in bytes; raises InputError."""
    if text.strip().lower() == "auto":
        free = free_memory(device)
        if free == math.inf:
            raise InputError("--memory-budget auto: this system does not tell its free memory; write an amount")
        # what is taken already is part of what is planned
        return free + (torch.cuda.memory_reserved(device) if device.type == "cuda" else 0)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)\s*", text.upper())
    if not match or float(match[1]) == 0:
        raise InputError(f"--memory-budget {text!r}: not an amount of memory; write for example 24GB, or auto")
    return float(match[1]) * UNITS[match[2]]


def format_bytes(count: float) -> str:
    """``"23.4 GB"``."""
    return ByteSize(count).human_readable(decimal=True, separator=" ")
