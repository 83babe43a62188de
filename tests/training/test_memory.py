"""The planner's expectations against measured peaks, what it picks, and the cost model against traces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mim_refiner.errors import InputError
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.heads import HeadConfig
from mim_refiner.models.refiner import Refiner
from mim_refiner.training.cost import ENCODERS, EncoderShape, Workload
from mim_refiner.training.memory import (
    LiveBytes,
    Needs,
    choose,
    even_parts,
    format_bytes,
    measure_needs,
    parse_budget,
    refiner_like,
)

CPU = torch.device("cpu")


def make(arch: str = "vit_w64_d4_h2_p8", image: int = 32, **options: object) -> Refiner:
    torch.manual_seed(0)
    backbone = Backbone.wrap(create_vit(arch, image_size=image))
    refiner = Refiner(backbone, (2, 3), HeadConfig(64, 64, 32, 256), pooling="cls", **options)
    refiner.unfreeze_encoder()
    return refiner


def test_live_bytes_counts_what_is_alive_at_a_time() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1
        view = b.view(10, 100)
        del a
        assert live.now == 4000
        del b, view
        c = torch.zeros(500)
    assert live.peak == 8000
    assert live.now == 2000
    del c


def test_the_trace_leaves_the_model_as_it_is() -> None:
    refiner = make()
    before = {name: tensor.clone() for name, tensor in refiner.state_dict().items()}
    measure_needs(refiner, [(32, 2), (16, 4)], 8, precision="fp32")
    assert all(torch.equal(before[name], tensor) for name, tensor in refiner.state_dict().items())
    assert all(p.grad is None for p in refiner.parameters())
    assert not getattr(refiner.backbone.model, "grad_checkpointing", False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    ["vit_w192_d12_h3_p4 32 16 16 0 fp32", "vit_w192_d12_h3_p4 32 16 16 4 fp32", "vit_w384_d6_h6_p8 64 32 8 0 fp32"],
)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of resident memory from Linux")
def test_expected_peaks_are_within_15_percent_of_measured_ones(shape: str) -> None:
    script = Path(__file__).with_name("peak_memory.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, *shape.split()], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["expected"] == pytest.approx(result["measured"], rel=0.15), result


def test_the_cheapest_setting_that_fits_is_picked() -> None:
    refiner, shapes = make(), [(32, 2), (16, 4)]
    needs = measure_needs(refiner, shapes, 32, precision="fp32")
    assert needs.cached(1) < needs.cached(8) < needs.whole()
    room = 1 / 0.92 + 1e-6

    def pick(budget: float, **settings: object):
        return choose(refiner, shapes, 32, budget * room, precision="fp32", **settings)

    assert pick(needs.whole()).micro_batch is None
    smaller = pick(needs.cached(9))
    assert (smaller.micro_batch, smaller.checkpointing) == (8, False)  # four equal parts of 32, not 9 + 9 + 9 + 5
    assert smaller.peak == needs.cached(8)
    assert pick(needs.whole(), micro_batch=4).micro_batch == 4
    with pytest.raises(InputError, match=r"even with micro_batch=1 and checkpointing.*frozen_blocks") as caught:
        pick(needs.state)
    assert "\n" not in str(caught.value)


def test_checkpointing_is_picked_when_not_even_one_image_fits_without() -> None:
    refiner, shapes = make("vit_w64_d12_h2_p4", image=64), [(64, 2)]
    needs = measure_needs(refiner, shapes, 2, precision="fp32")
    checkpointed = measure_needs(refiner, shapes, 2, precision="fp32", checkpointing=True)
    assert checkpointed.encoder_image < 0.5 * needs.encoder_image
    budget = (checkpointed.cached(1) + needs.cached(1)) / 2 / 0.92
    picked = choose(refiner, shapes, 2, budget, precision="fp32")
    assert (picked.micro_batch, picked.checkpointing) == (1, True)


def test_frozen_blocks_need_less() -> None:
    whole = measure_needs(make(), [(32, 2)], 16, precision="fp32")
    frozen = measure_needs(make(frozen_blocks=2), [(32, 2)], 16, precision="fp32")
    assert frozen.encoder_image < 0.75 * whole.encoder_image
    assert frozen.state < whole.state
    assert frozen.prefix == 16 * 2 * 17 * 64 * 4


@pytest.mark.parametrize(
    ("text", "expected"), [("24GB", 24e9), ("80 GiB", 80 * 2**30), ("512mb", 512e6), ("1.5TB", 1.5e12)]
)
def test_budgets_are_read(text: str, expected: float) -> None:
    assert parse_budget(text, CPU) == expected


@pytest.mark.parametrize("text", ["", "24", "0GB", "many", "-3GB"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="24GB, or auto"):
        parse_budget(text, CPU)


def test_auto_reads_what_is_free() -> None:
    assert parse_budget("auto", CPU) > 1e6


def test_small_helpers() -> None:
    assert [even_parts(m, 32) for m in (1, 5, 9, 16, 31, 32)] == [1, 5, 8, 16, 16, 32]
    assert [format_bytes(count) for count in (2.34e10, 5e6, 1e3, 3e12)] == ["23.4 GB", "5.0 MB", "1.0 KB", "3.0 TB"]
    needs = Needs(10, 4, 1, 1, 0, 5, 2, 3, 50)
    assert needs.largest_micro_batch(30, 8) == 5
    assert needs.largest_micro_batch(10, 8) == 0
    assert (needs.whole(), replace(needs, plain=2).whole()) == (57, 11)


# --- the cost model


def test_parameters_are_those_of_the_model() -> None:
    for shape, arch, size in (
        (EncoderShape(64, 4, 2, 8, image_size=32), "vit_w64_d4_h2_p8", 32),
        (ENCODERS["ViT-B/16"], "vit_base_patch16_224", 224),
    ):
        with torch.device("meta"):
            model = create_vit(arch, image_size=size)
        assert shape.parameters == sum(p.numel() for p in model.parameters())
    refiner = make()
    job = Workload(EncoderShape(64, 4, 2, 8, image_size=32), 8, (2, 3), [(32, 2)], 64, 64, 32, 256)
    assert job.heads_parameters == sum(p.numel() for p in refiner.heads.parameters())


def test_operations_are_those_of_a_counted_step() -> None:
    shapes = [(32, 2), (16, 4)]
    job = Workload(EncoderShape(64, 4, 2, 8, image_size=32), 8, (2, 3), shapes, 64, 64, 32, 256)
    traced = refiner_like(make(), checkpointing=False)
    for size, count in shapes:
        # Not every torch counts its fused attention on a CPU.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            traced.encoder((size, count), "fp32", 8)
        one = Workload(job.encoder, 8, (2, 3), [(size, count)], 64, 64, 32, 256)
        assert one.operations()["encoder"] == pytest.approx(counter.get_total_flops(), rel=0.05)
    with FlopCounterMode(display=False) as counter:
        traced.heads(8, 6, "fp32")
    parts = job.operations()
    assert parts["heads"] + parts["negatives"] + parts["queue"] == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fused", [False, True])
def test_bytes_of_activations_are_those_of_a_trace(precision: str, fused: bool) -> None:
    refiner = make("vit_w192_d8_h3_p8", image=96)
    if not fused:
        refiner.backbone.use_math_attention()
    needs = measure_needs(refiner, [(96, 2)], 4, precision=precision, waste=1.0)
    shape = EncoderShape(192, 4, 3, 8, image_size=96)  # of its eight blocks the first four run
    expected = 2 * 4 * shape.block_bytes(shape.tokens(96), bf16=precision == "bf16", fused_attention=fused)
    assert expected == pytest.approx(needs.encoder_image, rel=0.2)


def test_the_published_case_is_what_its_users_report() -> None:
    """About 100 images of a ViT-L step fill an 80 GB GPU (MIM-Refiner issues 9 and 11)."""
    job = Workload(ENCODERS["ViT-L/16"], 100, range(16, 24), [(224, 2), (96, 10)])
    assert 50e9 < sum(job.memory().values()) < 100e9
    assert (
        sum(Workload(ENCODERS["ViT-L/16"], 1024, range(16, 24), [(224, 2), (96, 10)], micro_batch=32).memory().values())
        < 80e9
    )


def test_traffic_grows_with_processes_as_rings_do() -> None:
    job = Workload(ENCODERS["ViT-L/16"], 1024, range(16, 24), [(224, 2), (96, 10)], processes=8)
    alone = Workload(ENCODERS["ViT-L/16"], 1024, range(16, 24), [(224, 2), (96, 10)])
    assert set(alone.traffic().values()) == {0}
    assert job.traffic()["gradients"] == pytest.approx(2 * 7 / 8 * 4 * job.trained_parameters)


def test_sharded_blocks_need_an_eighth_and_travel_more() -> None:
    huge = [(224, 2), (98, 10)]
    whole = Workload(ENCODERS["ViT-2B/14"], 512, range(16, 24), huge, frozen_blocks=6, micro_batch=32, processes=8)
    shared = replace(whole, shards=8)
    kept = whole.memory()["parameters and optimizer"] - shared.memory()["parameters and optimizer"]
    block = ENCODERS["ViT-2B/14"].block_parameters
    assert kept == pytest.approx(7 / 8 * block * (18 * 16 + 6 * 4) - 3 * 4 * block)  # three are there whole at a time
    assert shared.traffic()["gradients of blocks"] == pytest.approx(2 * 2 * 18 * block * 4 * 7 / 8)
    assert shared.traffic()["gradients"] < 0.1 * whole.traffic()["gradients"]


def test_the_planner_counts_the_state_of_sharded_blocks() -> None:
    refiner = make("vit_w192_d8_h3_p8", image=96)
    whole, half = (measure_needs(refiner, [(96, 2)], 4, precision="fp32", shards=shards) for shards in (1, 2))
    blocks = sum(p.numel() for p in refiner.backbone.model.blocks.parameters()) * 4
    assert whole.state - half.state == pytest.approx(5 * blocks / 2 - 3 * blocks / 8)
