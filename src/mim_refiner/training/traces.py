"""Bytes of a pass, found by tracing it on tensors without data.

A trace runs the real modules forward and backward on fake tensors and adds up the storages alive at a time: no
formula to keep in step with the model, no memory, and only as much time as it takes to name every operation.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mim_refiner.core.modules import device_of
from mim_refiner.core.run import Run
from mim_refiner.models.refiner import Refiner
from mim_refiner.types import Checkpointing, ImageSize, height_width

TRACED = 8  # images; peaks are lines in their number but for transients of single layers
Module = TypeVar("Module", bound=nn.Module)


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations inside the block make, while they live; ``peak`` is the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self._sizes:  # an output in a given one is a view, as of a weight
                self._sizes[key] = size
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


class Trace(Generic[Module]):
    """A copy ``module`` of a module, made of fake tensors; ``watched`` tells what its passes would hold.

    Gradients go as they come, and count as state: they are whole only when the activations are gone, so with few images
    a trace that kept them would see their peak and not that of the activations.
    """

    def __init__(self, module: Module) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.device = device_of(module)
        memo: dict[int, Any] = {id(buffer): self.mode.from_tensor(buffer) for buffer in module.buffers()}
        for parameter in module.parameters():
            memo[id(parameter)] = fake = nn.Parameter(self.mode.from_tensor(parameter.detach()))
            fake.register_post_accumulate_grad_hook(lambda own: setattr(own, "grad", None))
            fake.requires_grad_(parameter.requires_grad)
        self.module = copy.deepcopy(module, memo)

    @contextmanager
    def watched(self) -> Iterator[LiveBytes]:
        """What passes inside hold."""
        with self.mode, LiveBytes() as live:
            yield live

    def empty(self, *shape: int, **options: Any) -> Tensor:
        """A tensor to work on."""
        with self.mode:
            return torch.empty(*shape, device=self.device, **options)


class RefinerTrace(Trace[Refiner]):
    """Peak bytes of the forward and backward passes of a step of refinement, by part."""

    def __init__(self, refiner: Refiner, precision: str, checkpointing: Checkpointing = False) -> None:
        super().__init__(refiner)
        self.run = Run(self.device, precision)
        self.module.unfreeze_encoder()
        self.module.backbone.set_checkpointing(checkpointing)

    def encoder(self, shape: tuple[ImageSize, int], images: int) -> int:
        """Of the encoder on ``images`` images' views of one size."""
        size, count = shape
        with self.watched() as live:
            pixels = self._pixels(size, images * count)
            with self.run.autocast():
                values = list(self.module.pooled_blocks(self.module.frozen_prefix(pixels)).values())
            torch.autograd.backward(values, [torch.empty_like(value) for value in values])
        return live.peak

    def anchor(self, size: ImageSize) -> int:
        """Of the dense anchor on TRACED images' global views; 0 without one."""
        model, anchor = self.module, self.module.anchor
        if anchor is None:
            return 0
        with self.watched() as live:
            pixels = self._pixels(size, 2 * TRACED)
            with self.run.autocast():
                distance = anchor(model.backbone, model.frozen_prefix(pixels), model.frozen_blocks)
            distance.backward()
        return live.peak

    def heads(self, batch: int, views: int) -> int:
        """Of all heads on a batch."""
        width, blocks = self.module.backbone.info.embed_dim, self.module.blocks
        features = {block: self.empty(views, batch, width, requires_grad=True) for block in blocks}
        ids = self.empty(batch, dtype=torch.long)
        with self.watched() as live:
            with self.run.autocast():
                output = self.module.head_losses(features, ids)
            output.loss.backward()
        return live.peak

    def _pixels(self, size: ImageSize, count: int) -> Tensor:
        return self.empty(count, self.module.backbone.info.in_chans, *height_width(size))
