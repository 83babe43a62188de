"""What a GPU would refuse or wait for, found without one: steps on tensors without data that claim to be on it.

Such tensors know their device: one on the wrong device raises FakeTensorDeviceMismatchError, a number that the host
asks for DataDependentOutputException. What they let pass is a copy to the device, so copies are counted. And the
operations of a step are counted: a GPU that runs a small encoder spends its time on starting them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from mim_refiner.core import neighbors
from mim_refiner.core.run import Run
from mim_refiner.data import photometric
from mim_refiner.data.photometric import BatchPhotometric, augment
from mim_refiner.data.views import multi_crop_views
from mim_refiner.models import heads
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.heads import HeadConfig
from mim_refiner.models.refiner import Refiner
from mim_refiner.training import refine
from mim_refiner.training.loop import step_generator
from mim_refiner.training.metric_log import metrics_of

CUDA = torch.device("cuda")
OPERATIONS = 1672  # of a step of ``tiny_run``, views of tensors apart: lower it when it falls, never raise it


class Seen(TorchDispatchMode):
    """Counts operations, and copies from the host to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[str(func)] += not func.is_view
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and result.device.type == "cuda":
            self.sent += 1
        return result


@contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors made inside have no data; what the host plans with is real."""
    for name in ("draw_params", "_plan"):
        planned = getattr(photometric, name)

        def really(*arguments: Any, planned: Callable[..., Any] = planned) -> Any:
            with unset_fake_temporarily():
                return planned(*arguments)

        monkeypatch.setattr(photometric, name, really)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


STEPS = {
    "small": ("vit_w192_d12_h3_p4", 32, 16, 4, 4, HeadConfig(1024, 2048, 128, 16_384), 64),
    "ViT-L/16": ("vit_large_patch16_224", 224, 96, 10, 8, HeadConfig(2048, 4096, 256, 65_536), 16),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_the_forward_pass_of_a_step_neither_waits_nor_mixes_devices(
    name: str, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture, large, little, locals_, heads, config, batch = STEPS[name]
    specs = [view for view in multi_crop_views(large, little, locals_) for _ in range(view.count)]
    photometrics = [BatchPhotometric(view, (0.5, 0.4, 0.3), (0.2, 0.2, 0.3)) for view in specs]
    crops = [torch.zeros(batch, 3, view.size, view.size, dtype=torch.uint8) for view in specs]
    generator, ids = torch.Generator().manual_seed(0), torch.arange(batch)
    with torch.device("meta"):
        backbone = Backbone.wrap(create_vit(architecture, image_size=large))
        depth = backbone.info.depth
        refiner = Refiner(backbone, range(depth - heads, depth), config, pooling="cls")
    with pretend_gpu(monkeypatch), Seen() as seen:
        memo = {id(p): nn.Parameter(torch.empty(p.shape, device=CUDA)) for p in refiner.parameters()}
        memo |= {id(b): torch.empty(b.shape, dtype=b.dtype, device=CUDA) for b in refiner.buffers()}
        refiner = copy.deepcopy(refiner, memo)
        refiner.freeze_encoder() if frozen else refiner.unfreeze_encoder()
        refiner.set_top_k(20)
        seen.sent = 0
        views = augment(crops, photometrics, generator, CUDA)
        there = ids.to(CUDA)
        choices = refiner.draw_choices(there, generator)
        sent, seen.sent = seen.sent, 0
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = refiner.head_losses(refiner.features(views), there, choices=choices)
        metrics = metrics_of(output, there, torch.zeros(1000, dtype=torch.long, device=CUDA))
    assert all(value.device.type == "cuda" for value in (output.loss, *metrics.values()))
    assert sent == len(crops) + 1 + 1 + 1  # the views, what they drew, the ids, what the heads drew
    assert seen.sent == 0  # a CUDA graph could hold the rest


def test_a_wait_a_copy_and_a_wrong_device_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_gpu(monkeypatch), Seen() as seen:
        there = torch.zeros(3, device=CUDA)
        torch.ones(3).to(CUDA)
        with pytest.raises(DataDependentOutputException):
            there.sum().item()
        with pytest.raises(RuntimeError, match=r"found two different devices|device"):
            there + torch.ones(3)
    assert seen.sent == 1


@pytest.mark.skipif(not torch.__version__.startswith("2.15"), reason="another torch splits operations otherwise")
def test_the_operations_of_a_step_become_no_more(tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (heads, neighbors):  # as on a GPU
        monkeypatch.setattr(module, "ONE_BY_ONE", set())
    job = tiny_run()
    refinement, refiner = job.refinement, job.refiner
    optimizer = refine.begin_refinement(refinement)
    counts = []
    with closing(job.loader.epoch(0)) as batches:
        for step, batch in zip(range(2), batches, strict=False):
            generator = step_generator(0, 1, step)
            with Seen() as seen:
                optimizer.zero_grad(set_to_none=True)
                views, ids = refine.make_views(refinement, batch, generator)
                refine.forward_backward(refiner, views, ids, generator, Run())
                optimizer.step()
                refinement.ema.update(refiner.backbone, 0.9)
            counts.append(sum(seen.operations.values()))
    assert counts[1] <= OPERATIONS
