"""Two processes take the step that one takes: float64, random layers, drawn neighbours, plain, cached and sharded."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from mim_refiner.commands.inputs import channel_moments, normalize_by
from mim_refiner.core.collectives import average_gradients, process_rows, rank
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
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.source_base import ImageSource
from mim_refiner.errors import DataError
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.heads import HeadConfig
from mim_refiner.models.refiner import Refiner
from mim_refiner.training.refine import forward_backward

BATCH = 12  # of all processes
SIZES = (16, 16, 8, 8, 8)


class Setting(NamedTuple):
    """Of a group of processes; see :func:`three_steps`."""

    processes: int
    micro_batch: int
    frozen_blocks: int
    way: str


def three_steps(micro_batch: int, frozen_blocks: int, way: str) -> dict[str, Tensor]:
    """This process's part of three steps: losses, gradients of the first; parameters, buffers, average at the end.

    way: "sharded", or "checkpointing" for that on top; halfway everything goes through whole states and back.
    """
    is_first = rank() == 0
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
        refiner.backbone.set_checkpointing(way == "checkpointing")
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
        output = forward_backward(
            refiner, views, sample_ids, torch.Generator().manual_seed(step), Run(), micro_batch or None
        )
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
            assert is_first == all(states) == bool(moments)  # nobody else holds them
            assert not any(isinstance(t, DTensor) for state in states for t in state.values())
            for module, state in zip((refiner, ema), copy.deepcopy(states), strict=True):
                with torch.no_grad():
                    for parameter in module.parameters():
                        local(parameter).zero_()
                load_full_state(module, state)
            optimizer = adamw(parameter_groups(refiner.named_parameters(), weight_decay=0.05), (0.9, 0.95))
            load_full_optimizer_state(optimizer, copy.deepcopy(moments))
    for name, module in (("state", refiner), ("average", ema)):
        whole = full_state(module) or {k: v for k, v in module.state_dict().items() if not isinstance(v, DTensor)}
        result |= {f"{name}/{key}": tensor for key, tensor in whole.items()}
    return result


def bf16_step() -> dict[str, Tensor]:
    """Loss and gradients of a forward pass under autocast, with the blocks sharded where there are processes for it."""
    torch.manual_seed(0)
    backbone = Backbone.wrap(create_vit("vit_w32_d2_h2_p8", image_size=16))
    sharded = torch.distributed.is_initialized()
    if sharded:
        backbone.shard_blocks(bf16=True)
    qkv = backbone.model.blocks[0].attn.qkv
    qkv.register_forward_pre_hook(lambda layer, _: seen.append((layer.weight.dtype, layer.bias.dtype)))
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with CountedCasts() as casts, Run(precision="bf16").autocast():
        loss = backbone.forward_blocks(images, [-1])[0].patches.float().square().mean()
        if sharded:  # of the matrices none is left to cast: they came in bf16
            assert seen == [(torch.bfloat16, torch.float32)]
            assert casts.matrices == 0
    loss.backward()
    average_gradients(backbone.parameters())
    grads = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    whole = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}
    return {"loss": loss.detach(), "casts": torch.tensor(casts.matrices), **whole}


class Pictures(ImageSource):
    """Four pictures of one colour each; the first may be damaged."""

    description = "pictures"

    def __init__(self, damaged: bool) -> None:
        self.damaged = damaged

    def __len__(self) -> int:
        return 4

    def read(self, index: int) -> bytes:
        if self.damaged and index == 0:
            raise OSError("damaged")
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (60 * index, 10, 200)).save(file, "png")
        return file.getvalue()

    def name(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        return "pictures"


def moments() -> dict[str, Tensor]:
    """What an encoder normalises by after ``normalization=data``, where the second process cannot read a picture."""
    backbone = Backbone.wrap(create_vit("vit_w32_d2_h2_p8", image_size=16))
    normalize_by(ImageSet(Pictures(damaged=rank() == 1), cache=False), backbone)
    return {"mean": torch.tensor(backbone.info.mean), "std": torch.tensor(backbone.info.std)}


class CountedCasts(TorchDispatchMode):
    """Counts the matrices that are cast from float32 to bf16."""

    matrices = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.matrices += args[0].ndim == 2 and min(args[0].shape) >= 32
        return func(*args, **kwargs)


SETTINGS = [
    Setting(2, 0, 1, ""),
    Setting(2, 4, 1, ""),
    Setting(2, 0, 0, "sharded"),
    Setting(2, 4, 1, "sharded"),
    Setting(2, 4, 0, "checkpointing"),
    Setting(4, 0, 1, "two nodes"),
    Setting(2, 0, 0, "bf16"),
    Setting(2, 0, 0, "moments"),
]
BF16, MOMENTS = range(len(SETTINGS) - 2, len(SETTINGS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, forked_file: Callable[..., Any]) -> Path:
    """What the processes of all settings wrote."""
    out = tmp_path_factory.mktemp("gloo")
    worker = Path(__file__).with_name("distributed_worker.py")
    ((code, said, errors),) = forked_file(worker, [out, json.dumps(SETTINGS)], LOCAL_WORLD_SIZE=2)
    assert code == 0, said + errors
    return out


@pytest.mark.parametrize("number", range(BF16), ids=lambda number: "-".join(map(str, SETTINGS[number])))
def test_processes_equal_one(number: int, folder: Path) -> None:
    setting = SETTINGS[number]
    outs = [folder / f"{number}-{rank}.safetensors" for rank in range(setting.processes)]
    one, (first, *others) = three_steps(0, setting.frozen_blocks, ""), [load_file(out) for out in outs]
    assert one.keys() == first.keys()
    assert all(found.keys() == first.keys() for found in others) or setting.way
    for name, expected in one.items():
        if name.startswith("loss"):
            mean = sum((other[name] for other in others), first[name]) / setting.processes
            torch.testing.assert_close(mean, expected, rtol=1e-10, atol=0)
        else:
            tolerance = 1e-10 if name.startswith("grad/") else 1e-9
            torch.testing.assert_close(first[name], expected, rtol=tolerance, atol=tolerance, msg=name)
            assert all(torch.equal(first[name], other[name]) for other in others if name in other), name


def test_sharded_blocks_travel_and_compute_in_bf16(folder: Path) -> None:
    one, first, second = (
        bf16_step(),
        *(load_file(folder / f"{BF16}-{rank}.safetensors") for rank in (0, 1)),
    )
    assert one.pop("casts") == 8  # autocast's copies of four matrices of two blocks
    assert first.pop("casts") == second.pop("casts") == 0
    for name, expected in one.items():
        torch.testing.assert_close(first[name], expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
        assert torch.equal(first[name], second[name]), name


def test_processes_normalise_by_what_the_first_reads(folder: Path) -> None:
    one = moments()
    for number in (0, 1):
        for name, found in load_file(folder / f"{MOMENTS}-{number}.safetensors").items():
            assert torch.equal(found, one[name]), (number, name)
    with pytest.raises(DataError, match="1 of 4 images cannot be read"):  # what the second would have met
        channel_moments(ImageSet(Pictures(damaged=True), cache=False))
