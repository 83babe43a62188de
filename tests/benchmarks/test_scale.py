"""The tables of docs/scale.md: their memory against traces, and what is known of the published case."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.heads import HeadConfig
from mim_refiner.models.refiner import Refiner
from mim_refiner.training.cost import EncoderShape, Workload
from mim_refiner.training.memory import measure_needs

LARGE, HUGE = [(224, 2), (96, 10)], [(224, 2), (98, 10)]


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import scale

    yield scale
    sys.modules.pop("scale")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fused", [False, True])
def test_bytes_of_activations_are_those_of_a_trace(scale: Any, precision: str, fused: bool) -> None:
    backbone = Backbone.wrap(create_vit("vit_w192_d8_h3_p8", image_size=96))
    if not fused:
        backbone.use_math_attention()
    refiner = Refiner(backbone, (2, 3), HeadConfig(64, 64, 32, 256), pooling="cls")
    needs = measure_needs(refiner, [(96, 2)], 4, precision=precision, waste=1.0)
    shape = EncoderShape(192, 4, 3, 8, image_size=96)  # of its eight blocks the first four run
    found = scale.block_bytes(shape, shape.tokens(96), bf16=precision == "bf16", fused_attention=fused)
    assert 2 * 4 * found == pytest.approx(needs.encoder_image, rel=0.2)


def test_the_published_case_is_what_its_users_report(scale: Any) -> None:
    """About 100 images of a ViT-L step fill an 80 GB GPU (MIM-Refiner issues 9 and 11)."""
    job = Workload(scale.ENCODERS["ViT-L/16"], 100, range(16, 24), LARGE)
    assert 50e9 < sum(scale.memory(job).values()) < 100e9
    assert sum(scale.memory(replace(job, batch=1024, micro_batch=32)).values()) < 80e9


def test_traffic_grows_with_processes_as_rings_do(scale: Any) -> None:
    alone = Workload(scale.ENCODERS["ViT-L/16"], 1024, range(16, 24), LARGE)
    job = replace(alone, processes=8)
    assert set(alone.traffic().values()) == {0}
    assert job.traffic()["gradients"] == pytest.approx(2 * 7 / 8 * 4 * job.trained_parameters)


def test_sharded_blocks_need_an_eighth_and_travel_more(scale: Any) -> None:
    encoder = scale.ENCODERS["ViT-2B/14"]
    whole = Workload(encoder, 512, range(16, 24), HUGE, frozen_blocks=6, micro_batch=32, processes=8)
    shared, block = replace(whole, shards=8), encoder.block_parameters
    kept = (scale.memory(job)["parameters and optimizer"] for job in (whole, shared))
    saved = 7 / 8 * block * (18 * 16 + 6 * 4) - 3 * 4 * block  # three are there whole at a time
    assert next(kept) - next(kept) == pytest.approx(saved)
    assert shared.traffic()["gradients of blocks"] == pytest.approx(2 * 2 * 18 * block * 4 * 7 / 8)
    assert shared.traffic()["gradients"] < 0.1 * whole.traffic()["gradients"]
