"""Bytes of a pass, found by tracing it on tensors without data.

A trace runs the real modules forward and backward on fake tensors and adds up the storages alive at a time: no
formula to keep in step with the model, no memory, and only as much time as it takes to name every operation.
"""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


def fake_like(module: Module, mode: FakeTensorMode) -> Module:
    """A copy of a module made of fake tensors, whose passes can be traced."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(mode.from_tensor(parameter.detach()), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = mode.from_tensor(buffer)
    return copy.deepcopy(module, memo)


def drop_gradients(module: nn.Module) -> None:
    """Gradients go as they come, and count as state. They are whole only when the activations are gone, so with few
    images a trace that kept them would see their peak and not that of the activations.
    """
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda own: setattr(own, "grad", None))


class refiner_like:  # noqa: N801  (reads as a function)
    """A copy of a refiner made of fake tensors."""

    def __init__(self, refiner: Refiner, checkpointing: Checkpointing) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.model = fake_like(refiner, self.mode)
        self.model.unfreeze_encoder()
        self.model.backbone.set_checkpointing(checkpointing)
        self.device = next(refiner.parameters()).device
        drop_gradients(self.model)

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

    def anchor(self, size: ImageSize, precision: str) -> int:
        """Peak bytes of the dense anchor's forward and backward pass on TRACED images' global views."""
        assert self.model.anchor is not None
        with self.mode, LiveBytes() as live:
            channels = self.model.backbone.info.in_chans
            pixels = torch.empty(2 * TRACED, channels, *height_width(size), device=self.device)
            with Run(self.device, precision).autocast():
                prefix = self.model.frozen_prefix(pixels)
                distance = self.model.anchor(self.model.backbone, prefix, self.model.frozen_blocks)
            distance.backward()
            del distance, prefix, pixels
        return live.peak

    def heads(self, batch: int, views: int, precision: str) -> int:
        """Peak bytes of forward and backward pass of all heads on a batch."""
        dim = self.model.backbone.info.embed_dim
        with self.mode:
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
