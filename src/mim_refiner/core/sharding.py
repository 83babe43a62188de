"""Encoder weights spread over processes (FSDP2): each holds a part, blocks are gathered whole only while they run.

Outside a forward or backward pass a sharded parameter is a DTensor; its gradient, moments and average have its parts.
Checkpoints hold whole tensors, so a run may be resumed with another number of processes, or without sharding.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from mim_refiner.core.collectives import broadcast_state, world_size


def shard(root: nn.Module, blocks: Sequence[nn.Module], *, method: str) -> None:
    """Spread the parameters of ``blocks`` over the processes, in place; the rest of ``root`` stays whole everywhere.

    ``method``: name of the method of ``root`` that runs the blocks. All processes must make the same passes, also those
    without gradients: torch prefetches in the order of the passes it has seen. Gradients of sharded parameters come
    averaged over the processes. On several nodes each node holds all parts: only gradients travel between nodes.
    """
    broadcast_state([root])
    mesh = _mesh(next(root.parameters()).device)
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    whole = {parameter for parameter in root.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(root, mesh=mesh, ignored_params=whole)
    register_fsdp_forward_method(root, method)


def is_sharded(module: nn.Module) -> bool:
    """Whether :func:`shard` was applied to the module."""
    return isinstance(module, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with whole tensors; sharded ones are copied to the CPU. Every process must call it."""
    return {name: _whole(tensor) for name, tensor in module.state_dict().items()}


def load_full_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors, of which every process takes its part."""
    own = module.state_dict()
    module.load_state_dict({name: _like(tensor, own.get(name)) for name, tensor in state.items()})


def full_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state dict with whole tensors. Every process must call it."""
    found = optimizer.state_dict()
    return {**found, "state": {index: _each(_whole, values) for index, values in found["state"].items()}}


def load_full_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what :func:`full_optimizer_state` gave; every process takes its part before it reaches the device."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {index: _each(partial(_like, other=parameters[index]), values) for index, values in state["state"].items()}
    optimizer.load_state_dict({**state, "state": parts})


def shard_count() -> int:
    """Into how many parts :func:`shard` cuts: one for every process of a node, as torchrun started them."""
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    return on_node if world_size() % on_node == 0 else world_size()


def _mesh(device: torch.device) -> DeviceMesh:
    """All processes in a row, or a row for every node."""
    nodes, parts = world_size() // shard_count(), shard_count()
    if nodes == 1:
        return init_device_mesh(device.type, (parts,))
    return init_device_mesh(device.type, (nodes, parts), mesh_dim_names=("nodes", "processes"))


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def _like(tensor: Tensor, other: Tensor | None) -> Tensor:
    if not isinstance(other, DTensor) or tensor.shape != other.shape:  # a step count stays as it is
        return tensor
    return distribute_tensor(tensor.to(other.dtype), other.device_mesh, other.placements, src_data_rank=None)


def _each(change: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: change(value) if isinstance(value, Tensor) else value for key, value in values.items()}
