"""Two processes take the step that one takes: float64, random layers, drawn neighbours, plain, cached and sharded."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from mim_refiner.core.collectives import average_gradients, process_rows
from mim_refiner.core.ema import ExponentialMovingAverage
from mim_refiner.core.optim import adamw, parameter_groups
from mim_refiner.core.run import Run
from mim_refiner.core.sharding import (
    full_optimizer_state,
    full_state,
    load_full_optimizer_state,
    load_full_state,
    local,
)
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.heads import HeadConfig
from mim_refiner.models.refiner import Refiner
from mim_refiner.training.refine import forward_backward

BATCH = 12  # of all processes
SIZES = (16, 16, 8, 8, 8)


def three_steps(micro_batch: int | None, frozen_blocks: int, way: str = "") -> dict[str, Tensor]:
    """This process's part of three steps: losses, gradients of the first; parameters, buffers, average at the end.

    way: "sharded", or "checkpointing" for that on top; halfway everything goes through whole states and back.
    """
    torch.manual_seed(0)
    vit = create_vit("vit_w32_d4_h2_p8", image_size=16, drop_path_rate=0.4)
    config = HeadConfig(24, 24, 16, 30)
    refiner = Refiner(Backbone.wrap(vit), (2, 3), config, pooling="cls", frozen_blocks=frozen_blocks).double()
    refiner.unfreeze_encoder()
    refiner.set_top_k(5)
    ema = ExponentialMovingAverage(refiner.backbone)
    if way:
        refiner.backbone.shard_blocks()
        ema.module.shard_blocks()  # type: ignore[operator]
        refiner.backbone.model.set_grad_checkpointing(way == "checkpointing")
    optimizer = adamw(parameter_groups(refiner.named_parameters(), weight_decay=0.05), (0.9, 0.95))
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    rows = process_rows(BATCH // torch.distributed.get_world_size() if torch.distributed.is_initialized() else BATCH)
    mine = slice(rows.start, rows.stop)
    result: dict[str, Tensor] = {}
    for step in range(3):
        draws = torch.Generator().manual_seed(100 + step)
        views = [torch.randn(BATCH, 3, size, size, generator=draws, dtype=torch.float64)[mine] for size in SIZES]
        torch.manual_seed(7 + step)
        sample_ids = (torch.arange(BATCH) + 5 * step)[mine]
        optimizer.zero_grad(set_to_none=True)
        output = forward_backward(refiner, views, sample_ids, torch.Generator().manual_seed(step), Run(), micro_batch)
        average_gradients(refiner.parameters())
        result[f"loss{step}"] = output.loss.detach()
        if step == 0:
            grads = {f"grad/{name}": p.grad for name, p in refiner.named_parameters() if p.grad is not None}
            result |= {key: g.full_tensor() if isinstance(g, DTensor) else g.clone() for key, g in grads.items()}
        optimizer.step()
        ema.update(refiner.backbone, 0.9)
        if way and step == 1:
            with torch.no_grad():  # as online k-NN does
                refiner.backbone.forward_blocks(torch.zeros(2, 3, 16, 16, dtype=torch.float64))
            states, moments = [full_state(module) for module in (refiner, ema)], full_optimizer_state(optimizer)
            assert not any(isinstance(t, DTensor) for state in states for t in state.values())
            for module, state in zip((refiner, ema), copy.deepcopy(states), strict=True):
                with torch.no_grad():
                    for parameter in module.parameters():
                        local(parameter).zero_()
                load_full_state(module, state)
            optimizer = adamw(parameter_groups(refiner.named_parameters(), weight_decay=0.05), (0.9, 0.95))
            load_full_optimizer_state(optimizer, copy.deepcopy(moments))
    result |= {f"state/{name}": tensor for name, tensor in full_state(refiner).items()}
    return result | {f"average/{name}": tensor for name, tensor in full_state(ema).items()}


@pytest.mark.parametrize(
    ("processes", "micro_batch", "frozen_blocks", "way"),
    [
        (2, 0, 1, ""),
        (2, 4, 1, ""),
        (2, 0, 0, "sharded"),
        (2, 4, 1, "sharded"),
        (2, 4, 0, "checkpointing"),
        (4, 0, 1, "two nodes"),
    ],
)
def test_processes_equal_one(processes: int, micro_batch: int, frozen_blocks: int, way: str, tmp_path: Path) -> None:
    worker = str(Path(__file__).with_name("distributed_worker.py"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment |= {"LOCAL_WORLD_SIZE": "2"}
    outs = [tmp_path / f"rank{rank}.safetensors" for rank in range(processes)]
    setting = [str(processes), str(micro_batch), str(frozen_blocks), way]
    started = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), str(tmp_path / "store"), str(out), *setting],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    for process in started:
        output, _ = process.communicate(timeout=250)
        assert process.returncode == 0, output
    one, (first, *others) = three_steps(None, frozen_blocks), [load_file(out) for out in outs]
    assert all(one.keys() == found.keys() for found in (first, *others))
    for name, expected in one.items():
        if name.startswith("loss"):
            mean = sum((other[name] for other in others), first[name]) / processes
            torch.testing.assert_close(mean, expected, rtol=1e-10, atol=0)
        else:
            tolerance = 1e-10 if name.startswith("grad/") else 1e-9
            torch.testing.assert_close(first[name], expected, rtol=tolerance, atol=tolerance, msg=name)
            assert all(torch.equal(first[name], other[name]) for other in others), name
