"""Joining the processes that torchrun (or SLURM through it) started."""

from __future__ import annotations

import atexit
import os

import torch
import torch.distributed as dist

from mim_refiner.errors import InputError


def join_processes(device: torch.device) -> torch.device:
    """Join the process group that torchrun's environment describes, and return this process's own device.

    Changes nothing in a process that was started alone. Raises InputError when a machine has fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise InputError(
                f"{local + 1} processes were started on a machine with {torch.cuda.device_count()} GPUs; "
                "lower torchrun's --nproc-per-node, or use --device cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # CPU tensors by gloo: flags are agreed on without waiting for the GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    return device


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
