"""Encoder weights spread over processes (FSDP2): each holds a part, blocks are gathered whole only while they run.

Outside a forward or backward pass a sharded parameter is a DTensor; its gradient, moments and average have its parts.
Checkpoints hold whole tensors, so a run may be resumed with another number of processes, or without sharding.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from mim_refiner.core.collectives import (
    broadcast_state,
    decide_on_rank_0,
    from_rank_0,
    is_distributed,
    rank,
    world_size,
)


def shard(root: nn.Module, blocks: Sequence[nn.Module], *, method: str, bf16: bool = False) -> None:
    """Spread the matrices of ``blocks`` over the processes, in place; the rest of ``root`` stays whole everywhere.

    ``method``: name of the method of ``root`` that runs the blocks. All processes must make the same passes, also those
    without gradients: torch prefetches in the order of the passes it has seen. Gradients of sharded parameters come
    averaged over the processes. On several nodes each node holds all parts: only gradients travel between nodes.
    ``bf16``: for passes under autocast; what travels, and what a block computes with, is cast once, by its owner, and
    autocast finds nothing left to cast. Vectors (norms, biases, scales) stay whole in fp32, as under autocast alone.
    """
    broadcast_state([root])
    kind, nodes, parts = next(root.parameters()).device.type, world_size() // shard_count(), shard_count()
    if nodes == 1:
        mesh = init_device_mesh(kind, (parts,))
    else:
        mesh = init_device_mesh(kind, (nodes, parts), mesh_dim_names=("nodes", "processes"))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32 if bf16 else None,
        cast_forward_inputs=False,
    )  # fmt: skip
    for block in blocks:
        vectors = {parameter for parameter in block.parameters() if parameter.ndim < 2}
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=vectors)
    whole = {parameter for parameter in root.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(root, mesh=mesh, mp_policy=policy, ignored_params=whole)
    register_fsdp_forward_method(root, method)


def is_sharded(module: nn.Module) -> bool:
    """Whether :func:`shard` was applied to the module."""
    return isinstance(module, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of whole tensors (sharded ones on the CPU) on rank 0; all call it, others hold one at a time."""
    state = {name: _whole(tensor) for name, tensor in module.state_dict().items()}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def load_full_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors that rank 0 gives (the others may pass anything), of which every process takes its part."""
    if not is_distributed():
        module.load_state_dict(state)
        return
    own = module.state_dict()
    shapes = {name: tensor.shape for name, tensor in own.items()}
    if decide_on_rank_0(lambda: shapes != {name: tensor.shape for name, tensor in state.items()}):
        raise ValueError(f"the state is not that of this {type(module).__name__}")
    for name, tensor in own.items():
        shape = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        given = state[name].to(tensor.dtype) if rank() == 0 else shape
        local(tensor).copy_(local(_part(given, tensor)))


def full_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state dict with whole tensors, on rank 0 alone; see :func:`full_state`."""
    found = optimizer.state_dict()
    whole = {index: _each(_whole, values) for index, values in found["state"].items()}
    return {**found, "state": whole} if rank() == 0 else {}


def load_full_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what :func:`full_optimizer_state` gave rank 0; see :func:`load_full_state`."""
    if is_distributed():  # what there is, without what the tensors hold; a single number, as of steps, stays
        shapes = {index: _each(lambda tensor: tensor.to("meta") if tensor.ndim else tensor, values)
                  for index, values in state.get("state", {}).items()}  # fmt: skip
        outline = from_rank_0({**state, "state": shapes})
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        parts = {
            index: _each(lambda tensor, like=parameters[index]: _part(tensor, like) if tensor.ndim else tensor, values)
            for index, values in (state if rank() == 0 else outline)["state"].items()
        }
        state = {**outline, "state": parts}
    optimizer.load_state_dict(state)


def shard_count() -> int:
    """Into how many parts :func:`shard` cuts: one for every process of a node, as torchrun started them."""
    on_node = processes_on_node()
    return on_node if world_size() % on_node == 0 else world_size()


def processes_on_node() -> int:
    """Processes on this machine, as torchrun says; without a word of it all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or world_size())


def _whole(tensor: Tensor) -> Tensor | None:
    """The whole tensor on rank 0, a sharded one on the CPU; None on the others."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if rank() > 0:
        return None
    return whole.cpu() if isinstance(tensor, DTensor) else whole


def _part(tensor: Tensor, like: Tensor) -> Tensor:
    """Rank 0's tensor on all, cut as ``like`` is; the others give one of its shape."""
    device = local(like).device
    whole = tensor.to(device) if rank() == 0 else torch.empty_like(tensor, device=device)
    dist.broadcast(whole, 0)
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _each(change: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: change(value) if isinstance(value, Tensor) else value for key, value in values.items()}
