"""A step of a small encoder as a CUDA graph: its thousands of short kernels are started by one call.

Without one, the host starts them one by one, more slowly than a GPU works them off. A graph repeats the same kernels
on the same memory, so shapes must be constant and nothing in between may wait for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from mim_refiner.core.collectives import is_distributed
from mim_refiner.core.run import Run
from mim_refiner.errors import InputError
from mim_refiner.models.refiner import Refiner
from mim_refiner.training.recipe import RefineRecipe

WARM = 3  # calls before the graph, in which libraries choose their kernels and workspaces
SMALL = 384  # widest encoder for which "auto" takes a graph


def uses_graph(recipe: RefineRecipe, refiner: Refiner, run: Run) -> bool:
    """Whether the steps are a graph; raises InputError where they are to be one and cannot."""
    why = why_no_graph(recipe, refiner, run)
    if recipe.cuda_graphs == "on" and why:
        raise InputError(f"cuda_graphs=on: {why}; set it to off")
    small = recipe.cuda_graphs == "auto" and refiner.backbone.info.embed_dim <= SMALL
    return not why and (small or recipe.cuda_graphs == "on")


def why_no_graph(recipe: RefineRecipe, refiner: Refiner, run: Run) -> str:
    """Why a step cannot be a graph, in words; empty where it can."""
    cached = recipe.micro_batch is not None and recipe.micro_batch < recipe.batch_size
    reasons = {
        f"the device is {run.device.type}, and graphs are CUDA's": run.device.type != "cuda",
        "it is for one process, and there are several": is_distributed(),
        "the cached step (micro_batch) goes by random states of the host": cached,
        "checkpointing goes by random states of the host": bool(recipe.checkpointing),
        "the encoder is no plain ViT": not refiner.backbone.is_plain_vit,
    }
    return next((why for why, holds in reasons.items() if holds), "")


class Graphed:
    """``work``, a function of tensors (and lists and dictionaries of them) whose shapes stay the same, as a graph.

    It leaves gradients in the parameters of ``module``. What it returns is copied out of the graph's memory.
    """

    def __init__(self, work: Callable[..., Any], module: nn.Module) -> None:
        self.work, self.module, self.parameters = work, module, list(module.parameters())
        self.calls = 0

    def __call__(self, *given: Any) -> Any:
        """Call the work; gradients are to be None before."""
        self.calls += 1
        if self.calls <= WARM:
            return self._warm(given)
        if self.calls == WARM + 1:
            self.given = tree_map(torch.clone, given)
            self.replay, self.output = self._capture()
            self.gradients = [parameter.grad for parameter in self.parameters]
        torch._foreach_copy_(tree_leaves(self.given), tree_leaves(given))
        self.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return tree_map(torch.clone, self.output)

    def _warm(self, given: tuple[Any, ...]) -> Any:
        """A call on a stream beside, as the capture is one."""
        own, main = torch.cuda.Stream(), torch.cuda.current_stream()
        own.wait_stream(main)
        with torch.cuda.stream(own):
            output = self.work(*given)
        main.wait_stream(own)
        return output

    def _capture(self) -> tuple[Callable[[], None], Any]:
        """How to repeat the work on what lies in ``given``, and where its output will lie; computes nothing."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a loader's thread may use the GPU meanwhile
            output = self.work(*self.given)
        return graph.replay, output
