"""The memory planner: what a step will need, found by tracing it on tensors without data, and what then fits.

The trace runs the real modules forward and backward on fake tensors and adds up the storages alive at a time: no
formula to keep in step with the model, no memory, and only as much time as it takes to name every operation.
"""

from __future__ import annotations

import copy
import math
import re
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mim_refiner.core.device import free_memory
from mim_refiner.core.run import Run
from mim_refiner.errors import InputError
from mim_refiner.models.refiner import Refiner
from mim_refiner.models.stochastic import batch_dependent_layer
from mim_refiner.training.recipe import RefineRecipe
from mim_refiner.types import Checkpointing, ImageSize, height_width

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
RESERVE = 0.08  # of the budget, for what libraries keep
TRACED = 8  # images; peaks are lines in their number but for transients of single layers
# Activations and transients take more than their own bytes, by the gaps between blocks of changing size: in a plain
# step, and in a cached one, whose passes follow each other. glibc's heap: measured (docs/scale.md); CUDA's: assumed.
WASTE = {"cpu": (1.09, 1.3), "cuda": (1.1, 1.1)}
BF16_SCRATCH = 80e6  # that products in bf16 keep on a CPU: measured, about the same for all sizes


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations inside the block make, while they live; ``peak`` is the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # an output in a given storage is a view, for example of a weight
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


@dataclass(frozen=True)
class Needs:
    """Bytes of one process; ``encoder`` and ``heads`` are peaks above what is there before and after."""

    batch: int  # images
    state: int  # weights, gradients, moments, average, queues
    gradients: int  # of the state: those of a plain step come as its activations go
    images: int  # the batch's views
    features: int  # inputs of the heads and their gradients
    prefix: int  # tokens after the frozen blocks, which a cached step keeps
    heads: int  # graph of the heads on the whole batch
    encoder_base: int  # of the encoder's pass: what does not grow with its images
    encoder_image: int  # and what an image (all its views of the larger kind) adds
    image_graphs: tuple[int, ...]  # an image's graph through all its views of one size, in the order of the sizes
    plain: int  # graph of everything at once
    view_pool: int = 0  # beside all of it
    warmup: int = 0  # peak of the warm-up on a view pool that goes with it

    def graphs(self, micro_batch: int, count: int) -> int:
        """The graphs of the first ``count`` micro-batches."""
        parts = -(-self.batch // micro_batch)  # of every size of view
        kept = (min(max(0, count - parts * i) * micro_batch, self.batch) for i in range(len(self.image_graphs)))
        return sum(images * graph for images, graph in zip(kept, self.image_graphs, strict=True))

    def cached(self, micro_batch: int, kept_graphs: int = 0) -> int:
        """Peak of the cached step. Graphs that are kept stand beside the heads' and go before another is made."""
        kept = self.graphs(micro_batch, kept_graphs)
        most = max(self.heads + kept, self.encoder_base + max(kept, micro_batch * self.encoder_image))
        return max(self.warmup, self.state + self.view_pool + self.images + self.features + self.prefix + most)

    def most_graphs(self, micro_batch: int, budget: float) -> int:
        """How many micro-batches' graphs can be kept within ``budget``."""
        count = -(-self.batch // micro_batch) * len(self.image_graphs)
        while count and self.cached(micro_batch, count) > budget:
            count -= 1
        return count

    def whole(self) -> int:
        """Peak of the plain step."""
        step = self.state - self.gradients + self.images + max(self.plain, self.gradients)
        return max(self.warmup, step + self.view_pool)

    def largest_micro_batch(self, budget: float) -> int:
        """Images that fit into a pass of the cached step, 0 if not even one."""
        room = budget - (self.state + self.view_pool + self.images + self.features + self.prefix)
        if room < self.heads or self.warmup > budget:
            return 0
        return max(0, min(self.batch, int((room - self.encoder_base) // max(1, self.encoder_image))))


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
    waste: float | None = None,
    pool: int = 0,
) -> Needs:
    """Trace the step of ``batch`` images a process. view_shapes: (pixels, how many such views).

    ``shards``: processes that share the blocks' weights (core.sharding). ``waste`` multiplies what the allocator places
    anew every step; None: the device's own figures. ``pool``: bytes of the view pool, which without frozen blocks is
    gone when the encoder moves.
    """
    trained = refiner_like(refiner, checkpointing)
    views = sum(count for _, count in view_shapes)
    dim, heads, channels = refiner.backbone.info.embed_dim, len(refiner.blocks), refiner.backbone.info.in_chans
    trainable = sum(p.numel() * p.element_size() for p in trained.model.parameters() if p.requires_grad)
    held = sum(t.numel() * t.element_size() for t in (*refiner.parameters(), *refiner.buffers()))
    average = sum(p.numel() * p.element_size() for p in refiner.backbone.parameters())
    sizes = [trained.encoder(shape, precision, 1) for shape in view_shapes]
    several = [trained.encoder(shape, precision, TRACED) for shape in view_shapes]
    slopes = [(many - one) / (TRACED - 1) for one, many in zip(sizes, several, strict=True)]
    bases = [max(0.0, one - slope) for one, slope in zip(sizes, slopes, strict=True)]
    largest = max(range(len(slopes)), key=slopes.__getitem__)
    tokens = [trained.tokens(size) for size, _ in view_shapes]
    prefix = sum(batch * c * n * dim * 4 for (_, c), n in zip(view_shapes, tokens, strict=True))
    features = heads * batch * views * dim * 4
    heads_peak = trained.heads(batch, views, precision)
    plain, cached = WASTE.get(trained.device.type, WASTE["cuda"]) if waste is None else (waste, waste)
    scratch = int(BF16_SCRATCH) if precision == "bf16" and trained.device.type == "cpu" and waste is None else 0
    state = held + average + 3 * trainable + scratch - _elsewhere(trained.model, shards)
    return Needs(
        batch=batch,
        state=state,
        images=sum(batch * count * channels * math.prod(height_width(size)) * 4 for size, count in view_shapes),
        features=2 * features,
        prefix=prefix if refiner.frozen_blocks else 0,
        gradients=0 if shards > 1 else trainable,
        heads=int(cached * heads_peak),
        encoder_base=int(cached * bases[largest]),
        encoder_image=int(cached * slopes[largest]),
        image_graphs=tuple(int(plain * slope) for slope in slopes),
        plain=int(plain * (bases[largest] + batch * sum(slopes) + heads_peak)),
        view_pool=pool if refiner.frozen_blocks else 0,
        warmup=state + pool + features + int(cached * heads_peak) if pool else 0,
    )


def _elsewhere(refiner: Refiner, shards: int) -> int:
    """Bytes of blocks spread over ``shards`` that other processes hold; three whole blocks are here at a time."""
    if shards == 1:
        return 0
    sizes = [
        [(p.numel() * p.element_size(), p.requires_grad) for p in block.parameters()]
        for block in refiner.backbone.model.blocks
    ]
    state = sum(2 * size + 3 * size * trains for block in sizes for size, trains in block)
    return int(state * (1 - 1 / shards)) - 3 * max(sum(size for size, _ in block) for block in sizes)


class refiner_like:  # noqa: N801  (reads as a function)
    """A copy of a refiner made of fake tensors, whose passes can be traced."""

    def __init__(self, refiner: Refiner, checkpointing: Checkpointing) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        memo: dict[int, Any] = {}
        for parameter in refiner.parameters():
            memo[id(parameter)] = nn.Parameter(self.mode.from_tensor(parameter.detach()), parameter.requires_grad)
        for buffer in refiner.buffers():
            memo[id(buffer)] = self.mode.from_tensor(buffer)
        self.model: Refiner = copy.deepcopy(refiner, memo)
        self.model.unfreeze_encoder()
        self.model.backbone.set_checkpointing(checkpointing)
        self.device = next(refiner.parameters()).device
        # Gradients count as state. They are whole only when the activations are gone, so with few images a trace that
        # kept them would see their peak and not that of the activations.
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)

    def tokens(self, size: ImageSize) -> int:
        info = self.model.backbone.info
        sides = zip(height_width(size), info.patch_size, strict=True)
        return math.prod(side // patch for side, patch in sides) + info.num_prefix_tokens

    def encoder(self, shape: tuple[ImageSize, int], precision: str, images: int) -> int:
        """Peak bytes of forward and backward pass of the encoder on ``images`` images' views of one size."""
        size, count = shape
        with self.mode, LiveBytes() as live:
            pixels = torch.empty(
                images * count, self.model.backbone.info.in_chans, *height_width(size), device=self.device
            )
            with Run(self.device, precision).autocast():
                outputs = self.model.pooled_blocks(self.model.frozen_prefix(pixels))
            values = list(outputs.values())
            torch.autograd.backward(values, [torch.empty_like(value) for value in values])
            del outputs, values, pixels
        return live.peak

    def heads(self, batch: int, views: int, precision: str) -> int:
        """Peak bytes of forward and backward pass of all heads on a batch."""
        dim = self.model.backbone.info.embed_dim
        with self.mode, nullcontext():
            features = {
                block: torch.empty(views, batch, dim, device=self.device, requires_grad=True)
                for block in self.model.blocks
            }
            ids = torch.empty(batch, dtype=torch.long, device=self.device)
            with LiveBytes() as live:
                with Run(self.device, precision).autocast():
                    output = self.model.head_losses(features, ids)
                output.loss.backward()
                del output
        return live.peak


def as_asked(
    refiner: Refiner, recipe: RefineRecipe, batch: int, free: float, *, precision: str, shards: int = 1, pool: int = 0
) -> Choice:
    """The recipe's own setting; graphs, where it leaves their number open, as ``free`` bytes allow."""
    options: dict[str, Any] = {"precision": precision, "checkpointing": recipe.checkpointing, "shards": shards}
    needs = measure_needs(refiner, recipe.views.shapes, batch, pool=pool, **options)
    micro = recipe.micro_batch
    if micro is None or micro >= batch:
        return Choice(needs, micro, 0, recipe.checkpointing, "as the recipe says")
    return _cached(needs, recipe, [micro], recipe.checkpointing, free * (1 - RESERVE), "as the recipe says: ")


def choose(
    refiner: Refiner,
    recipe: RefineRecipe,
    batch: int,
    budget: float,
    *,
    precision: str,
    shards: int = 1,
    limit: str = "--memory-budget",
    pool: int = 0,
) -> Choice:
    """The cheapest setting that fits into ``budget`` bytes: plain, plain with selective checkpointing, cached with as
    many graphs as fit, cached with checkpointing.

    What the recipe sets is kept. Raises InputError when nothing fits, with what would; ``limit``: name of the budget.
    """
    usable, asked, micro = budget * (1 - RESERVE), recipe.checkpointing, recipe.micro_batch
    layer = batch_dependent_layer(refiner.backbone)

    @cache
    def needs(kept: Checkpointing) -> Needs:
        options: dict[str, Any] = {"precision": precision, "checkpointing": kept, "shards": shards, "pool": pool}
        return measure_needs(refiner, recipe.views.shapes, batch, **options)

    if micro is None:
        # selective checkpointing leaves more than half; its trace takes seconds
        able = refiner.backbone.runner is not None and not recipe.compile
        worth = able and not asked and not layer and needs(False).whole() < 2 * usable
        ways: tuple[Checkpointing, ...] = (asked, "selective") if worth else (asked,)
        for kept in ways:
            if needs(kept).whole() <= usable:
                words = f"the plain step fits into {format_bytes(budget)}"
                words += ", norms and GELU computed twice" if kept == "selective" else ""
                return Choice(needs(kept), None, 0, kept, words)
    if layer:
        raise InputError(
            f"{limit} {format_bytes(budget)}: the step needs {format_bytes(needs(asked).whole() / (1 - RESERVE))}, and "
            f"the encoder's layer {layer} makes the outputs of an image depend on the other images of the batch, so "
            "micro-batches would change the training; set a smaller batch_size"
        )
    for kept in dict.fromkeys((asked, True)):
        fits = needs(kept).largest_micro_batch(usable)
        halves = [even_parts(max(1, fits >> halved), batch) for halved in range(fits.bit_length())]
        sizes = [size for size in ([micro] if micro else halves) if size <= fits]
        if recipe.kept_graphs != "auto":
            sizes = [size for size in sizes if needs(kept).cached(size, recipe.graphs) <= usable][:1]
        if sizes:
            return _cached(needs(kept), recipe, sizes[:3], kept, usable, f"for {format_bytes(budget)} the ")
    beside = f", {format_bytes(pool)} the view pool (view_pool)" if pool else ""
    smallest = needs(True).cached(micro or 1, recipe.graphs)
    raise InputError(
        f"{limit} {format_bytes(budget)}: the step needs {format_bytes(smallest / (1 - RESERVE))} even with "
        f"micro_batch={micro or 1} and checkpointing ({format_bytes(needs(True).state)} of it weights, optimizer and "
        f"queues, {format_bytes(needs(True).heads)} the heads on the whole batch{beside}); freeze blocks "
        "(frozen_blocks), use fewer heads or a smaller batch_size, or more processes"
    )


def _cached(
    needs: Needs, recipe: RefineRecipe, sizes: Sequence[int], kept: Checkpointing, usable: float, words: str = ""
) -> Choice:
    """The cached step with the micro-batch of ``sizes`` (large ones first) by which most can be kept of the graphs."""

    def count(size: int) -> int:
        most = -(-needs.batch // size) * len(needs.image_graphs)
        return needs.most_graphs(size, usable) if recipe.kept_graphs == "auto" else min(recipe.graphs, most)

    micro = max(sizes, key=lambda size: needs.graphs(size, count(size)))
    graphs, parts = count(micro), -(-needs.batch // micro)
    words += f"cached step of {parts} micro-batches, {graphs} of {parts * len(needs.image_graphs)} graphs kept: "
    words += "for the others one more forward pass of the trained blocks"
    words += ", and for all one for checkpointing" if kept is True else ""
    return Choice(needs, micro, graphs, kept, words)


def even_parts(micro_batch: int, batch: int) -> int:
    """The smallest micro-batch that needs no more passes than ``micro_batch`` does: its parts are about equal."""
    return -(-batch // -(-batch // micro_batch))


def parse_budget(text: str, device: torch.device) -> float:
    """``"24GB"``, ``"80 GiB"`` or ``"auto"`` (what the device has free now) in bytes; raises InputError."""
    if text.strip().lower() == "auto":
        free = free_memory(device)
        if free == math.inf:
            raise InputError("--memory-budget auto: this system does not tell its free memory; write an amount")
        # what the weights take already is part of what is planned
        return free + (torch.cuda.memory_reserved(device) if device.type == "cuda" else 0)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)\s*", text.upper())
    if not match or float(match[1]) == 0:
        raise InputError(f"--memory-budget {text!r}: not an amount of memory; write for example 24GB, or auto")
    return float(match[1]) * UNITS[match[2]]


def format_bytes(count: float) -> str:
    """``"23.4 GB"``."""
    for unit in ("TB", "GB", "MB"):
        if count >= UNITS[unit]:
            return f"{count / UNITS[unit]:.1f} {unit}"
    return f"{count / 1e3:.1f} KB"


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
