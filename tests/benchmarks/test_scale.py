"""The tables of docs/scale.md: operations against counts, memory against traces, and what is known of the published
case.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mim_refiner.commands import plan
from mim_refiner.core.run import Run
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.heads import HeadConfig
from mim_refiner.models.refiner import Refiner
from mim_refiner.training import memory
from mim_refiner.training.memory import measure_needs
from mim_refiner.training.recipe import RefineRecipe
from mim_refiner.training.traces import RefinerTrace

LARGE, HUGE = [(224, 2), (96, 10)], [(224, 2), (98, 10)]


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import scale

    yield scale
    sys.modules.pop("scale")


def make() -> Refiner:
    backbone = Backbone.wrap(create_vit("vit_w64_d4_h2_p8", image_size=32))
    refiner = Refiner(backbone, (2, 3), HeadConfig(64, 64, 32, 256), pooling="cls")
    refiner.unfreeze_encoder()
    return refiner


def test_parameters_are_those_of_the_model(scale: Any) -> None:
    for shape, arch, size in (
        (scale.EncoderShape(64, 4, 2, 8, image_size=32), "vit_w64_d4_h2_p8", 32),
        (scale.EncoderShape(768, 12, 12, 16), "vit_base_patch16_224", 224),
    ):
        with torch.device("meta"):
            model = create_vit(arch, image_size=size)
        assert shape.parameters == sum(p.numel() for p in model.parameters())
    refiner = make()
    job = scale.Workload(scale.EncoderShape(64, 4, 2, 8, image_size=32), 8, (2, 3), [(32, 2)], 64, 64, 32, 256)
    assert job.heads_parameters == sum(p.numel() for p in refiner.heads.parameters())


def test_operations_are_those_of_a_counted_step(scale: Any) -> None:
    shapes = [(32, 2), (16, 4)]
    job = scale.Workload(scale.EncoderShape(64, 4, 2, 8, image_size=32), 8, (2, 3), shapes, 64, 64, 32, 256)
    traced = RefinerTrace(make(), "fp32")
    for size, count in shapes:
        # Not every torch counts its fused attention on a CPU.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            traced.encoder((size, count), 8)
        one = scale.Workload(job.encoder, 8, (2, 3), [(size, count)], 64, 64, 32, 256)
        assert one.operations()["encoder"] == pytest.approx(counter.get_total_flops(), rel=0.05)
    with FlopCounterMode(display=False) as counter:
        traced.heads(8, 6)
    parts = job.operations()
    passes = [
        replace(job, micro_batch=2, kept_graphs=kept).operations()["encoder"] / parts["encoder"] for kept in (0, 4, 8)
    ]
    assert passes == [pytest.approx(4 / 3), pytest.approx(1.15, abs=0.05), 1]
    both = replace(job, micro_batch=2, checkpointing=True)
    assert both.operations()["encoder"] == pytest.approx(5 / 3 * parts["encoder"])
    assert replace(job, checkpointing="selective").operations() == parts
    assert parts["heads"] + parts["negatives"] + parts["queue"] == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fused", [False, True])
def test_bytes_of_activations_are_those_of_a_trace(
    scale: Any, precision: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(memory.WASTE, "cpu", (1.0, 1.0))
    backbone = Backbone.wrap(create_vit("vit_w192_d8_h3_p8", image_size=96))
    if not fused:
        backbone.use_math_attention()
    refiner = Refiner(backbone, (2, 3), HeadConfig(64, 64, 32, 256), pooling="cls")
    needs = measure_needs(refiner, [(96, 2)], 4, precision=precision)
    shape = scale.EncoderShape(192, 4, 3, 8, image_size=96)  # of its eight blocks the first four run
    found = scale.block_bytes(shape, shape.tokens(96), bf16=precision == "bf16", fused_attention=fused)
    assert 2 * 4 * found == pytest.approx(needs.encoder_image, rel=0.2)


def test_the_published_case_is_what_its_users_report(scale: Any) -> None:
    """About 100 images of a ViT-L step fill an 80 GB GPU (MIM-Refiner issues 9 and 11)."""
    job = scale.Workload(scale.ENCODERS["ViT-L/16"], 100, range(16, 24), LARGE)
    assert 50e9 < sum(scale.memory(job).values()) < 100e9
    assert sum(scale.memory(replace(job, batch=1024, micro_batch=32)).values()) < 80e9


def test_traffic_grows_with_processes_as_rings_do(scale: Any) -> None:
    alone = scale.Workload(scale.ENCODERS["ViT-L/16"], 1024, range(16, 24), LARGE)
    job = replace(alone, processes=8)
    assert set(alone.traffic().values()) == {0}
    assert job.traffic()["gradients"] == pytest.approx(2 * 7 / 8 * 4 * job.trained_parameters)


def test_the_plan_of_a_run_tells_the_same_traffic(scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "world_size", lambda: 8)
    recipe, encoder = RefineRecipe(name="x", batch_size=32), scale.EncoderShape(64, 4, 2, 8, image_size=32)
    recipe.views.global_size, recipe.views.local_size, recipe.views.num_local = 32, 16, 4
    recipe.heads.out_dim, recipe.micro_batch = 32, 2
    job = scale.Workload(encoder, 32, (2, 3), [(32, 2), (16, 4)], 64, 64, 32, micro_batch=2, processes=8, bf16=False)
    for shards in (1, 8):
        monkeypatch.setattr(plan, "shards_of", lambda recipe, shards=shards: shards)
        told, paper = plan.traffic_of(recipe, make(), Run()).sent(), replace(job, shards=shards).traffic()
        assert told.keys() == paper.keys()
        for name in told:  # a table of positions does not train
            assert told[name] == pytest.approx(paper[name], rel=0.03), name


def test_sharded_blocks_need_an_eighth_and_travel_more(scale: Any) -> None:
    encoder = scale.ENCODERS["ViT-2B/14"]
    whole = scale.Workload(encoder, 512, range(16, 24), HUGE, frozen_blocks=6, micro_batch=32, processes=8)
    shared, block = replace(whole, shards=8), encoder.block_parameters
    kept = (scale.memory(job)["parameters and optimizer"] for job in (whole, shared))
    saved = 7 / 8 * block * (18 * 16 + 6 * 4) - 3 * 4 * block  # three are there whole at a time
    assert next(kept) - next(kept) == pytest.approx(saved)
    assert shared.traffic()["gradients of blocks"] == pytest.approx(2 * 2 * 18 * block * 4 * 7 / 8)
    assert shared.traffic()["gradients"] < 0.1 * whole.traffic()["gradients"]
