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
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mim_refiner.core import neighbors, search
from mim_refiner.core.collectives import Rows, use_rows
from mim_refiner.core.ema import ExponentialMovingAverage
from mim_refiner.core.guidance import Guide
from mim_refiner.core.optim import adamw, parameter_groups, set_learning_rate
from mim_refiner.core.run import Run
from mim_refiner.core.search import Bank
from mim_refiner.data import domain, photometric
from mim_refiner.data.domain import DomainSpec, hashed_normal
from mim_refiner.data.photometric import BatchPhotometric, augment
from mim_refiner.data.views import multi_crop_views
from mim_refiner.models import heads
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.heads import HeadConfig, RefinerHead
from mim_refiner.models.refiner import DenseAnchor, Refiner
from mim_refiner.models.stochastic import draw_by_row
from mim_refiner.training import refine, sweep
from mim_refiner.training.loop import step_generator
from mim_refiner.training.metric_log import MetricLog, metrics_of
from mim_refiner.training.refine import anchor_backward
from mim_refiner.training.view_pool import ViewPool

CUDA = torch.device("cuda")
OPERATIONS = 1672  # of a step of ``tiny_run``, views of tensors apart: lower it when it falls, never raise it


class Seen(TorchDispatchMode):
    """Counts operations, and copies from the host to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.sent = self.fetched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[str(func)] += not func.is_view
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
            ways = source.device.type, result.device.type
            self.sent += ways == ("cpu", "cuda")
            self.fetched += ways == ("cuda", "cpu")
        return result


def really(planned: Callable[..., Any]) -> Callable[..., Any]:
    """What the host does with data, done with data."""

    def done(*arguments: Any, **options: Any) -> Any:
        with unset_fake_temporarily():
            return planned(*arguments, **options)

    return done


@contextmanager
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors made inside have no data; what the host plans with is real."""
    for name in ("draw_params", "_plan"):
        monkeypatch.setattr(photometric, name, really(getattr(photometric, name)))
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)  # such tensors have none
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


STEPS = {
    "small": ("vit_w192_d12_h3_p4", 32, 16, 4, 4, HeadConfig(1024, 2048, 128, 16_384), 64),
    "tiny": ("vit_w32_d4_h2_p8", 32, 16, 2, 2, HeadConfig(32, 32, 16, 64), 8),
    "ViT-L/16": ("vit_large_patch16_224", 224, 96, 10, 8, HeadConfig(2048, 4096, 256, 65_536), 16),
}


def on_gpu(module: Any) -> Any:
    """A copy on the device; to be made while it is pretended."""
    memo = {id(p): nn.Parameter(torch.empty(p.shape, device=CUDA), p.requires_grad) for p in module.parameters()}
    memo |= {id(b): torch.empty(b.shape, dtype=b.dtype, device=CUDA) for b in module.buffers()}
    return copy.deepcopy(module, memo)


def made(name: str, frozen_blocks: int = 0) -> tuple[Refiner, list[torch.Tensor], list[BatchPhotometric]]:
    """The refiner of ``STEPS``, without data; crops and photometrics of its views."""
    architecture, large, little, locals_, heads, config, batch = STEPS[name]
    specs = [view for view in multi_crop_views(large, little, locals_) for _ in range(view.count)]
    photometrics = [BatchPhotometric(view, (0.5, 0.4, 0.3), (0.2, 0.2, 0.3)) for view in specs]
    crops = [torch.zeros(batch, 3, view.size, view.size, dtype=torch.uint8) for view in specs]
    with torch.device("meta"):
        backbone = Backbone.wrap(create_vit(architecture, image_size=large))
        depth = backbone.info.depth
        blocks = range(depth - heads, depth)
        refiner = Refiner(backbone, blocks, config, pooling="cls", frozen_blocks=frozen_blocks)
    return refiner, crops, photometrics


@pytest.mark.parametrize(("name", "frozen", "guided"), [
    ("small", False, None), ("small", True, None), ("ViT-L/16", False, None), ("ViT-L/16", True, None),
    ("tiny", False, "prefer"), ("tiny", False, "restrict"),
])  # fmt: skip
def test_the_forward_pass_of_a_step_neither_waits_nor_mixes_devices(
    name: str, frozen: bool, guided: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    refiner, crops, photometrics = made(name)
    generator, ids = torch.Generator().manual_seed(0), torch.arange(len(crops[0]))
    with pretend_gpu(monkeypatch), Seen() as seen:
        refiner = on_gpu(refiner)
        refiner.freeze_encoder() if frozen else refiner.unfreeze_encoder()
        refiner.set_top_k(20)
        labels = torch.zeros(1000, dtype=torch.long, device=CUDA)
        for block in refiner.blocks:
            refiner.head(block).queue.guide = Guide(labels, guided == "restrict") if guided else None
        seen.sent = seen.fetched = 0
        views = augment(crops, photometrics, generator, CUDA)
        there = ids.to(CUDA)
        choices = refiner.draw_choices(there, generator)
        sent, seen.sent = seen.sent, 0
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = refiner.head_losses(refiner.features(views), there, choices=choices)
        metrics = metrics_of(output, there, labels)
    assert all(value.device.type == "cuda" for value in (output.loss, *metrics.values()))
    assert sent == len(crops) + 1 + 1 + 1  # the views, what they drew, the ids, what the heads drew
    assert (seen.sent, seen.fetched) == (0, 0)  # a CUDA graph could hold the rest


def test_augmentations_of_every_domain_neither_wait_nor_mix_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = DomainSpec(rotate=10, gain=0.1, noise=0.1, mask_rows=0.2, mask_columns=0.2)
    views = [view for view in multi_crop_views(16, 8, 2, domain=spec) for _ in range(view.count)]
    photometrics = [BatchPhotometric(view, (0.5,) * 3, (0.2,) * 3) for view in views]
    crops = [torch.zeros(4, 3, view.size, view.size, dtype=torch.uint8) for view in views]
    draws = torch.Generator().manual_seed(0)
    monkeypatch.setattr(domain, "draw", really(domain.draw))
    with pretend_gpu(monkeypatch), Seen() as seen:
        made = augment(crops, photometrics, draws, CUDA)
    assert all(view.device.type == "cuda" for view in made)
    assert (seen.sent, seen.fetched) == (len(crops) + 1, 0)  # the views, and all that they drew


def test_random_layers_neither_wait_nor_mix_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        vit = create_vit("vit_w32_d2_h2_p8", image_size=16, drop_path_rate=0.3, proj_drop_rate=0.3, attn_drop_rate=0.3)
    draw_by_row(vit)
    with pretend_gpu(monkeypatch), Seen() as seen, use_rows(Rows(2, 4, 8)):
        vit = on_gpu(vit)
        seen.sent = seen.fetched = 0
        assert vit(torch.zeros(4, 3, 16, 16, device=CUDA)).device.type == "cuda"
    assert (seen.sent, seen.fetched) == (0, 0)


class Copies(TorchDispatchMode):
    """Counts copies from the host to a device that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.count += args[0].device.type == "cpu" and result.device.type == "meta"
        return result


VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32, "num_classes": 0}


@pytest.mark.parametrize(("name", "options", "rule"), [
    ("vit_tiny_patch16_224", {}, "timm"), ("vit_tiny_patch16_224", {}, "sincos"),
    ("vit_tiny_patch16_224", {}, "sinusoid"), ("vit_tiny_patch16_224", {}, "dino"),
    ("beit_base_patch16_224", {}, "timm"), ("beit_base_patch16_224", {}, "hf"),
    ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}, "timm"),
    ("eva02_tiny_patch14_224", {}, "timm"), ("vit_capi", {"reg_tokens": 4}, "timm"),
    ("vit_small_patch16_dinov3", {}, "timm"), ("vit_small_patch16_rope_mixed_224", {}, "timm"),
])  # fmt: skip
def test_tables_of_positions_go_to_the_device_once(name: str, options: dict[str, Any], rule: str) -> None:
    backbone = Backbone.wrap(timm.create_model(name, **VIT | options), position_rule=rule).to("meta")
    for number in range(2):
        with Copies() as copies:
            for side in (32, 16):
                images = torch.empty(2, 3, side, side, device="meta")
                backbone.run_blocks(backbone.embed(images), 0, 2, (1,), class_token_last=True)
        assert copies.count == 0 or number == 0, (number, copies.count)


@pytest.mark.parametrize("frozen_blocks", [0, 2])
def test_a_step_on_a_view_pool_neither_waits_nor_mixes_devices(
    frozen_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refiner, crops, photometrics = made("tiny", frozen_blocks)
    batch, pool = len(crops[0]), ViewPool(1, 2, len(crops[0]), seed=0)
    pool.sample_ids = torch.arange(2 * batch) % batch
    monkeypatch.setattr(pool, "_rows", really(pool._rows))
    with pretend_gpu(monkeypatch), Seen() as seen:
        refiner = on_gpu(refiner)
        refiner.unfreeze_encoder() if frozen_blocks else refiner.freeze_encoder()
        views = augment(crops, photometrics, torch.Generator().manual_seed(0), CUDA)
        seen.sent = seen.fetched = 0
        for _ in range(2):
            pool.add(refiner.frozen_features(views), torch.arange(batch))
        assert (seen.sent, seen.fetched) == (0, 0)
        for epoch in (0, 1):  # one as it was cut, one that is drawn
            for read in pool.epoch(epoch):
                output = refiner.head_losses(refiner.features(read.views), read.sample_ids)
                assert output.loss.device.type == "cuda"
                assert (seen.sent, seen.fetched) == (1, 0)  # the numbers of its rows
                seen.sent = 0


@pytest.mark.parametrize("frozen_blocks", [0, 2])
def test_the_anchors_part_of_a_step_neither_waits_nor_mixes_devices(
    frozen_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refiner, crops, photometrics = made("tiny", frozen_blocks)
    refiner.anchor = DenseAnchor(refiner.backbone, refiner.blocks)
    with pretend_gpu(monkeypatch), Seen() as seen:
        refiner = on_gpu(refiner)
        refiner.unfreeze_encoder()
        views = augment(crops, photometrics, torch.Generator().manual_seed(0), CUDA)
        seen.sent = seen.fetched = 0
        monkeypatch.setattr(torch, "randint", lambda *_, **__: 7)  # the host's seed of random layers
        for micro_batch in (None, 3):
            generator, run = torch.Generator().manual_seed(0), Run(CUDA, "bf16")
            distance = anchor_backward(refiner, views[:2], generator, run, 2.0, micro_batch)
            assert distance.device.type == "cuda"
    assert (seen.sent, seen.fetched) == (0, 0)


def test_what_follows_the_gradients_waits_for_a_log_line_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    refiner, _, _ = made("tiny", frozen_blocks=1)
    average = ExponentialMovingAverage(refiner.backbone)
    with pretend_gpu(monkeypatch), Seen() as seen:
        refiner = on_gpu(refiner)
        refiner.unfreeze_encoder()
        average, log = on_gpu(average), MetricLog(CUDA)
        optimizer = adamw(parameter_groups(refiner.named_parameters(), weight_decay=0.1), (0.9, 0.95))
        seen.sent = seen.fetched = 0
        for step in range(2):
            for parameter in refiner.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            log.add(step, torch.zeros((), device=CUDA), {"alignment/3": torch.zeros((), device=CUDA)}, 8)
            set_learning_rate(optimizer, 1e-3)
            optimizer.step()
            average.update(refiner.backbone, 0.99)
        assert (seen.sent, seen.fetched) == (0, 0)
        with pytest.raises(DataDependentOutputException):  # its numbers
            log.means()
        assert seen.fetched == 1  # all at once


def test_the_sweep_waits_once_and_mixes_no_devices(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny_run(drop_path=0.0)
    several = [RefinerHead(32, HeadConfig(32, 32, 16, 64), top_k=3) for _ in range(3)]
    one = Refiner(made.refiner.backbone, [2], HeadConfig(32, 32, 16, 64), pooling="cls+mean")
    one.freeze_encoder()
    with pretend_gpu(monkeypatch), Seen() as seen:
        one, several = on_gpu(one), [on_gpu(head) for head in several]
        labels = torch.zeros(64, dtype=torch.long, device=CUDA)
        seen.sent = seen.fetched = 0
        shown, hits = sweep._trained(made.recipe, one, several, [0, 1, 1], made.loader, Run(CUDA), labels)
    views, steps = 4, 8
    assert hits.shape == (3, *shown.shape) == (3, steps // 2 * made.recipe.batch_size)
    assert seen.sent == steps * (views + 1 + 1 + 1)  # views, what they drew, ids, what the heads drew
    assert seen.fetched == 1  # the hits


def test_a_wait_a_copy_and_a_wrong_device_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_gpu(monkeypatch), Seen() as seen:
        there = torch.zeros(3, device=CUDA)
        torch.ones(3).to(CUDA)
        with pytest.raises(DataDependentOutputException):
            there.sum().item()
        with pytest.raises(RuntimeError, match=r"found two different devices|device"):
            there + torch.ones(3)
    assert seen.sent == 1


def test_nothing_is_in_float64_on_an_apple_gpu() -> None:
    class NoDoubles(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            wrong = [x for x in tree_leaves(found) if isinstance(x, torch.Tensor) and x.dtype == torch.float64]
            assert all(x.device.type == "cpu" for x in wrong), func
            return found

    with FakeTensorMode(shape_env=ShapeEnv()), NoDoubles():
        rows = torch.empty(1000, 8, device="mps")
        bank = Bank.of(rows, standardize=True)
        query, best = torch.zeros(40, dtype=torch.long, device="mps"), torch.empty(40, device="mps")
        found = [bank.mean, bank.std, bank.prepare(rows), search._by_query(query, best)]
        found.append(hashed_normal(query, (3, 4, 4)))
    assert all(x is not None and x.device.type == "mps" for x in found)


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
                views, ids = refine.make_views(batch, refinement.photometrics, generator, Run())
                refine.forward_backward(refiner, views, ids, generator, Run())
                optimizer.step()
                refinement.ema.update(refiner.backbone, 0.9)
            counts.append(sum(seen.operations.values()))
    assert counts[1] <= OPERATIONS
