"""Two processes take the step that one takes: float64, random layers, drawn neighbours, plain and cached."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mim_refiner.core.collectives import average_gradients
from mim_refiner.core.rows import process_rows
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.heads import HeadConfig
from mim_refiner.models.refiner import Refiner
from mim_refiner.training.optim import adamw, parameter_groups
from mim_refiner.training.step import forward_backward

BATCH = 12  # of all processes
SIZES = (16, 16, 8, 8, 8)


def three_steps(micro_batch: int | None) -> dict[str, Tensor]:
    """This process's part of three steps: losses, gradients of the first, parameters and buffers at the end."""
    torch.manual_seed(0)
    vit = create_vit("vit_w32_d4_h2_p8", image_size=16, drop_path_rate=0.4)
    refiner = Refiner(Backbone.wrap(vit), (2, 3), HeadConfig(24, 24, 16, 30), pooling="cls", frozen_blocks=1).double()
    refiner.unfreeze_encoder()
    refiner.set_top_k(5)
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
        losses = partial(
            refiner.head_losses,
            sample_ids=(torch.arange(BATCH) + 5 * step)[mine],
            num_global=2,
            temperature=0.2,
            generator=torch.Generator().manual_seed(step),
        )
        optimizer.zero_grad(set_to_none=True)
        output = forward_backward(refiner, views, losses, micro_batch=micro_batch)
        average_gradients(refiner.parameters())
        result[f"loss{step}"] = output.loss.detach()
        if step == 0:
            result |= {f"grad/{name}": p.grad.clone() for name, p in refiner.named_parameters() if p.grad is not None}
        optimizer.step()
    return result | {f"state/{name}": tensor for name, tensor in refiner.state_dict().items()}


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_two_processes_equal_one(micro_batch: int, tmp_path: Path) -> None:
    worker = str(Path(__file__).with_name("distributed_worker.py"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    outs = [tmp_path / f"rank{rank}.safetensors" for rank in range(2)]
    started = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), str(tmp_path / "store"), str(micro_batch), str(out)],
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
    one, (first, second) = three_steps(None), (load_file(out) for out in outs)
    assert one.keys() == first.keys() == second.keys()
    for name, expected in one.items():
        if name.startswith("loss"):
            torch.testing.assert_close((first[name] + second[name]) / 2, expected, rtol=1e-10, atol=0)
        else:
            tolerance = 1e-10 if name.startswith("grad/") else 1e-9
            torch.testing.assert_close(first[name], expected, rtol=tolerance, atol=tolerance, msg=name)
            assert torch.equal(first[name], second[name]), name
