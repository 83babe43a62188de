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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mim_refiner.core.device import autocast, free_memory
from mim_refiner.errors import InputError
from mim_refiner.models.refiner import Refiner
from mim_refiner.types import ImageSize, height_width

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

    state: int  # weights, gradients, moments, average, queues
    gradients: int  # of the state: those of a plain step come as its activations go
    images: int  # the batch's views
    features: int  # inputs of the heads and their gradients
    prefix: int  # tokens after the frozen blocks, which a cached step keeps
    heads: int  # graph of the heads on the whole batch
    encoder_base: int  # of the encoder's pass: what does not grow with its images
    encoder_image: int  # and what an image (all its views of the larger kind) adds
    plain: int  # graph of everything at once

    def cached(self, micro_batch: int, kept_graphs: int = 0) -> int:
        """Peak of the cached step; of it the graphs that are kept, which stand beside the heads' or one more."""
        part = micro_batch * self.encoder_image
        most = max(self.heads, self.encoder_base + part) + kept_graphs * part
        return self.state + self.images + self.features + self.prefix + most

    def whole(self) -> int:
        """Peak of the plain step."""
        return self.state - self.gradients + self.images + max(self.plain, self.gradients)

    def largest_micro_batch(self, budget: float, batch: int) -> int:
        """Images that fit into a pass of the cached step, 0 if not even one."""
        room = budget - (self.state + self.images + self.features + self.prefix)
        if room < self.heads:
            return 0
        return max(0, min(batch, int((room - self.encoder_base) // max(1, self.encoder_image))))


@dataclass(frozen=True)
class Choice:
    """What the planner picked: both keys of the recipe, the peak in bytes it expects, and why."""

    micro_batch: int | None
    checkpointing: bool
    peak: int
    words: str


def measure_needs(
    refiner: Refiner,
    view_shapes: Sequence[tuple[ImageSize, int]],
    batch: int,
    *,
    precision: str,
    checkpointing: bool = False,
    shards: int = 1,
    waste: float | None = None,
) -> Needs:
    """Trace the step of ``batch`` images a process. view_shapes: (pixels, how many such views).

    ``shards``: processes that share the blocks' weights (core.sharding). ``waste`` multiplies what the allocator places
    anew every step; None: the device's own figures.
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
    return Needs(
        state=held + average + 3 * trainable + scratch - _elsewhere(trained.model, shards),
        images=sum(batch * count * channels * math.prod(height_width(size)) * 4 for size, count in view_shapes),
        features=2 * features,
        prefix=prefix if refiner.frozen_blocks else 0,
        gradients=0 if shards > 1 else trainable,
        heads=int(cached * heads_peak),
        encoder_base=int(cached * bases[largest]),
        encoder_image=int(cached * slopes[largest]),
        plain=int(plain * (bases[largest] + batch * sum(slopes) + heads_peak)),
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

    def __init__(self, refiner: Refiner, checkpointing: bool) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        memo: dict[int, Any] = {}
        for parameter in refiner.parameters():
            memo[id(parameter)] = nn.Parameter(self.mode.from_tensor(parameter.detach()), parameter.requires_grad)
        for buffer in refiner.buffers():
            memo[id(buffer)] = self.mode.from_tensor(buffer)
        self.model: Refiner = copy.deepcopy(refiner, memo)
        self.model.unfreeze_encoder()
        if checkpointing:
            self.model.backbone.model.set_grad_checkpointing(True)
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
            with autocast(precision, self.device):
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
                with autocast(precision, self.device):
                    output = self.model.head_losses(features, ids)
                output.loss.backward()
                del output
        return live.peak


def choose(
    refiner: Refiner,
    view_shapes: Sequence[tuple[ImageSize, int]],
    batch: int,
    budget: float,
    *,
    precision: str,
    micro_batch: int | None = None,
    checkpointing: bool = False,
    shards: int = 1,
) -> Choice:
    """The cheapest setting that fits into ``budget`` bytes: plain, then cached, then cached with checkpointing.

    What the recipe sets is kept. Raises InputError when nothing fits, with what would.
    """
    usable = budget * (1 - RESERVE)
    measure = partial(measure_needs, refiner, view_shapes, batch, precision=precision, shards=shards)
    needs = measure(checkpointing=checkpointing)
    if micro_batch is None and needs.whole() <= usable:
        return Choice(None, checkpointing, needs.whole(), "the plain step fits")
    for recompute in dict.fromkeys((checkpointing, True)):
        if recompute != checkpointing:
            needs = measure(checkpointing=True)
        fits = needs.largest_micro_batch(usable, batch if micro_batch is None else micro_batch)
        if fits >= (micro_batch or 1):
            fits = micro_batch or even_parts(fits, batch)
            words = f"cached step of {-(-batch // fits)} micro-batches: one more forward pass of the trained blocks"
            words += ", and one for checkpointing" if recompute else ""
            return Choice(fits, recompute, needs.cached(fits), words)
    smallest = needs.cached(micro_batch or 1)
    raise InputError(
        f"--memory-budget {format_bytes(budget)}: the step needs {format_bytes(smallest / (1 - RESERVE))} even with "
        f"micro_batch={micro_batch or 1} and checkpointing ({format_bytes(needs.state)} of it weights, optimizer and "
        f"queues, {format_bytes(needs.heads)} the heads on the whole batch); freeze blocks (frozen_blocks), use fewer "
        "heads or a smaller batch_size, or more processes"
    )


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
