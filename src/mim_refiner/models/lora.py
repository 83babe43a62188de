"""Low-rank adapters (LoRA, arXiv 2106.09685): the encoder's weights stay, and a few percent beside them are trained.

A linear layer's weight becomes W + (alpha / rank) B A with A [rank, in] and B [out, rank], B zero at the start. It is a
parametrization of torch, so that whatever reads ``layer.weight`` reads the sum, and merging is writing the sum down.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, remove_parametrizations

from mim_refiner.errors import InputError
from mim_refiner.models.backbone import Backbone

_INSIDE = ".parametrizations.weight.0."  # in the name of every adapter parameter


class LowRankChange(nn.Module):
    """A weight [out, in] and what is added to it."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.a = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.b = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.b @ self.a)


def add_lora(backbone: Backbone, targets: Sequence[str], rank: int, alpha: float, first_block: int = 0) -> None:
    """Adapt the linear layers named in ``targets`` of the blocks from ``first_block`` on; InputError where none is."""
    layers = {
        name: module
        for name, module in backbone.model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("blocks.") and int(name.split(".")[1]) >= first_block
    }
    for target in dict.fromkeys(targets):
        chosen = [module for name, module in layers.items() if name.split(".")[-1] == target]
        if not chosen:
            known = ", ".join(dict.fromkeys(name.split(".")[-1] for name in layers))
            hint = f"choose among {known}" if known else "this kind of encoder cannot be adapted, leave adapter out"
            if first_block and not known:
                hint = "freeze fewer blocks (frozen_blocks), or leave adapter out"
            which = f"no block from {first_block} on" if first_block else "no block"
            raise InputError(f"lora.targets: {which} has a linear layer {target!r}; {hint}")
        most = min(min(module.weight.shape) for module in chosen)
        if rank > most:
            raise InputError(
                f"lora.rank {rank}: the smaller side of the linear layers {target!r} is {most}, and no change of them "
                f"has a higher rank; set lora.rank to {most} at most (4 to 32 are usual)"
            )
        for module in chosen:
            register_parametrization(module, "weight", LowRankChange(module.weight, rank, alpha))


def adapted(backbone: Backbone) -> dict[str, Any]:
    """The parametrizations of the adapted layers' weights, by the layers' names in the encoder's model."""
    layers = {name: module for name, module in backbone.model.named_modules() if is_parametrized(module, "weight")}
    found: dict[str, Any] = {name: module.parametrizations.weight for name, module in layers.items()}
    return {name: parts for name, parts in found.items() if isinstance(parts[0], LowRankChange)}


def fixed_beside_lora(backbone: Backbone) -> Iterator[nn.Parameter]:
    """The parameters that do not train where adapters do: all others. None where there is no adapter."""
    if adapted(backbone):
        yield from (parameter for name, parameter in backbone.named_parameters() if _INSIDE not in name)


def lora_share(backbone: Backbone) -> float:
    """Adapter parameters as a share of the encoder's."""
    sizes = [(parameter.numel(), _INSIDE in name) for name, parameter in backbone.named_parameters()]
    return sum(size for size, inside in sizes if inside) / sum(size for size, inside in sizes if not inside)


@torch.no_grad()
def merge_lora(backbone: Backbone) -> None:
    """Write the sums into the weights; the encoder is then as if it had never been adapted."""
    for name in adapted(backbone):
        remove_parametrizations(backbone.model.get_submodule(name), "weight", leave_parametrized=True)
