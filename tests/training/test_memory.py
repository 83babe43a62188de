"""The planner's expectations against measured peaks, and what it picks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from mim_refiner.core.run import Run
from mim_refiner.errors import InputError, RecipeError
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.heads import HeadConfig
from mim_refiner.models.refiner import DenseAnchor, Refiner
from mim_refiner.training import memory
from mim_refiner.training.memory import (
    RESERVE,
    Choice,
    Needs,
    Planner,
    even_parts,
    format_bytes,
    measure_needs,
    parse_budget,
)
from mim_refiner.training.recipe import RefineRecipe, Views, override
from mim_refiner.training.refine import anchor_backward, forward_backward
from mim_refiner.training.traces import LiveBytes
from mim_refiner.types import Checkpointing

CPU = torch.device("cpu")


def make(arch: str = "vit_w64_d4_h2_p8", image: int = 32, **options: object) -> Refiner:
    torch.manual_seed(0)
    backbone = Backbone.wrap(create_vit(arch, image_size=image))
    refiner = Refiner(backbone, (2, 3), HeadConfig(64, 64, 32, 256), pooling="cls", **options)
    refiner.unfreeze_encoder()
    return refiner


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes as they are traced, without what an allocator and products add."""
    monkeypatch.setitem(memory.WASTE, "cpu", (1.0, 1.0))
    monkeypatch.setattr(memory, "BF16_SCRATCH", 0)


@pytest.mark.parametrize("shared", [False, True])
def test_the_trace_leaves_no_tables_without_numbers_behind(shared: bool) -> None:
    tables = {"use_rel_pos_bias": not shared, "use_shared_rel_pos_bias": shared}
    size = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 40, "num_classes": 0}
    backbone = Backbone.wrap(timm.create_model("beit_base_patch16_224", **size, **tables))
    refiner = Refiner(backbone, (1,), HeadConfig(16, 16, 8, 32), pooling="cls")
    measure_needs(refiner, [(40, 2), (24, 2)], 4, precision="fp32")
    [output] = backbone.forward_blocks(torch.zeros(1, 3, 24, 24), [-1])
    assert output.cls is not None
    assert type(output.cls) is torch.Tensor
    assert bool(torch.isfinite(output.cls).all())


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
    assert refiner.backbone.checkpointing is False


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        "vit_w192_d6_h3_p4 32 16 16 0 fp32",
        "vit_w192_d6_h3_p4 32 16 16 4 fp32",
        "vit_w192_d6_h3_p4 32 16 16 4 fp32 --kept 5",
    ],
)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of resident memory from Linux")
def test_expected_peaks_are_within_15_percent_of_measured_ones(shape: str, forked_file: Callable[..., Any]) -> None:
    ((code, said, errors),) = forked_file(Path(__file__).with_name("peak_memory.py"), shape.split())
    assert code == 0, errors
    result = json.loads(said)
    assert result["expected"] == pytest.approx(result["measured"], rel=0.15), result


ROOM = 1 / (1 - RESERVE) + 1e-6


def asked(local_views: int = 4, size: int = 32, **settings: object) -> RefineRecipe:
    views = Views(global_size=size, local_size=16, num_local=local_views)
    return RefineRecipe(name="test", batch_size=32, views=views, **settings)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Callable[[Checkpointing], Needs]:
    """Traces, each made once."""
    refiner, made = make(), cache(measure_needs)
    shapes = tuple(asked().views.shapes)

    def needs(kept: Checkpointing = False) -> Needs:
        return made(refiner, shapes, 32, precision="fp32", checkpointing=kept)

    monkeypatch.setattr(memory, "measure_needs", lambda *_, checkpointing, **__: needs(checkpointing))
    return needs


def pick(budget: float, **settings: object) -> Choice:
    return Planner(make(), asked(**settings), Run()).fitting(budget * ROOM)


def test_the_cheapest_setting_that_fits_is_picked(traced: Callable[..., Needs]) -> None:
    needs, selective = traced(), traced("selective")
    assert needs.cached(1) < needs.cached(8) < selective.whole() < needs.whole()
    assert pick(needs.whole()).settings == {"micro_batch": None, "kept_graphs": 0, "checkpointing": False}
    lighter = pick(needs.whole() - 1000)
    assert (lighter.micro_batch, lighter.checkpointing, lighter.peak) == (None, "selective", selective.whole())
    assert pick(needs.whole() - 1000, compile=True).micro_batch is not None
    smaller = pick(needs.cached(9), kept_graphs=0)
    assert (smaller.micro_batch, smaller.checkpointing) == (8, False)  # four equal parts of 32, not 9 + 9 + 9 + 5
    assert smaller.peak == needs.cached(8)
    assert pick(needs.whole(), micro_batch=4).micro_batch == 4
    with pytest.raises(InputError, match=r"even with micro_batch=1 and checkpointing.*frozen_blocks") as caught:
        pick(needs.state)
    assert "\n" not in str(caught.value)


def test_what_a_view_pool_takes_is_not_free() -> None:
    refiner, recipe = make(frozen_blocks=2), asked()
    needs = measure_needs(refiner, recipe.views.shapes, 32, precision="fp32")
    pool = needs.whole() - needs.cached(8)
    assert Planner(refiner, recipe, Run()).fitting(needs.whole() * ROOM).micro_batch is None
    beside = Planner(refiner, recipe, Run(), pool=pool).fitting(needs.whole() * ROOM)
    assert beside.micro_batch is not None
    assert beside.needs.view_pool == pool < beside.peak <= needs.whole()
    free = needs.cached(16, 2) * ROOM
    kept = [
        Planner(refiner, asked(micro_batch=16), Run(), pool=taken).as_asked(free).kept_graphs for taken in (0, pool)
    ]
    assert kept[1] < kept[0]
    with pytest.raises(InputError, match=r"MB the view pool \(view_pool\)") as caught:
        Planner(refiner, recipe, Run(), pool=needs.whole()).fitting(needs.whole() * ROOM)
    assert "\n" not in str(caught.value)


def test_a_view_pool_of_the_warm_up_alone_is_gone_when_the_encoder_moves() -> None:
    shapes, way = asked().views.shapes, {"precision": "fp32"}
    needs, small, large = (measure_needs(make(), shapes, 32, pool=pool, **way) for pool in (0, 1000, 10**9))
    assert needs.whole() == small.whole() < large.whole()
    assert large.whole() == large.cached(1) == large.state + large.features // 2 + large.heads + 10**9
    assert large.largest_micro_batch(large.warmup - 1) == 0 < large.largest_micro_batch(large.warmup)


def test_what_is_refused_names_settings_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both the budget and the batch that the line names are let in."""
    refiner, process, made = make(), 10**9, cache(measure_needs)
    shapes = tuple(asked().views.shapes)
    monkeypatch.setattr(memory, "measure_needs", lambda _, __, batch, **how: made(refiner, shapes, batch, **how))
    smallest = made(refiner, shapes, 4, checkpointing=True, precision="fp32", shards=1, process=process).cached(1)

    def fitting(budget: float, batch: int = 32) -> Choice:
        recipe = asked().model_copy(update={"batch_size": batch})
        return Planner(refiner, recipe, Run(), process).fitting(budget)

    with pytest.raises(InputError, match=r"1\.0 GB Python, its libraries and the images") as caught:
        fitting(smallest * ROOM)
    line = str(caught.value)
    size = int(re.search(r"--set batch_size=(\d+)", line)[1])
    assert size == 4
    assert fitting(smallest * ROOM, size).peak <= smallest
    budget = parse_budget(re.search(r"--memory-budget (\d+MB)", line)[1], CPU)
    assert fitting(budget).peak <= budget
    with pytest.raises(InputError, match="give --memory-budget") as caught:  # no batch is small enough
        fitting(1e9)


@pytest.mark.usefixtures("exact")
def test_the_anchors_pass_is_counted_beside_the_gradients() -> None:
    refiner = make()
    refiner.anchor = DenseAnchor(refiner.backbone, [-1])
    needs = measure_needs(refiner, [(32, 2)], 16, precision="fp32")
    views = [torch.randn(16, 3, 32, 32) for _ in range(2)]
    with LiveBytes() as live:
        anchor_backward(refiner, views, torch.Generator().manual_seed(0), Run(), 1.0)
    gradients = sum(p.nbytes for p in refiner.backbone.parameters() if p.requires_grad)
    assert 16 * needs.anchor_image == pytest.approx(live.peak - gradients, rel=0.25)
    assert replace(needs, plain=0).whole() == needs.state + needs.images + 16 * needs.anchor_image


def test_no_more_graphs_are_kept_than_there_are(traced: Callable[..., Needs]) -> None:
    picked = Planner(make(), asked(micro_batch=8, kept_graphs=100), Run()).as_asked(0)
    assert picked.kept_graphs == 8  # four parts of two sizes
    assert "8 of 8 graphs kept" in picked.words


def test_an_encoder_with_batch_norm_gets_the_plain_step_or_none(traced: Callable[..., Needs]) -> None:
    refiner, whole = make(), traced().whole()
    refiner.backbone.model.norm = torch.nn.BatchNorm1d(64)
    planner = Planner(refiner, asked(), Run())
    picked = planner.fitting(whole * ROOM)
    assert picked.settings == {"micro_batch": None, "kept_graphs": 0, "checkpointing": False}
    with pytest.raises(InputError, match=r"^free memory .*model.norm \(BatchNorm1d\).*smaller batch_size") as caught:
        planner.fitting((whole - 1000) * ROOM, "free memory")
    assert "\n" not in str(caught.value)


def test_as_many_graphs_are_kept_as_fit(traced: Callable[..., Needs]) -> None:
    needs = traced()
    whole, local = needs.image_graphs
    assert [needs.graphs(8, count) for count in (0, 1, 4, 5, 8, 9)] == [
        0, 8 * whole, 32 * whole, 32 * whole + 8 * local, 32 * (whole + local), 32 * (whole + local)
    ]  # fmt: skip
    for count in range(9):
        free = needs.cached(8, count)
        for found in (
            Planner(make(), asked(micro_batch=8), Run()).as_asked(free * ROOM),
            pick(free, micro_batch=8),
        ):
            assert found.kept_graphs >= count
            assert found.peak <= free + 1
            assert needs.cached(8, found.kept_graphs + 1) > free or found.kept_graphs == 8
    assert Planner(make(), asked(micro_batch=8), Run()).as_asked(0).kept_graphs == 0
    fixed = pick(needs.cached(4, 5), kept_graphs=5)
    assert fixed.kept_graphs == 5
    assert fixed.peak <= needs.cached(4, 5) + 1
    # smaller micro-batches fill the memory better
    budget = needs.cached(8, 3)
    filled, large = pick(budget), even_parts(needs.largest_micro_batch(budget), 32)
    assert filled.micro_batch < large
    assert needs.graphs(filled.micro_batch, filled.kept_graphs) > needs.graphs(large, needs.most_graphs(large, budget))


def test_checkpointing_is_picked_when_not_even_one_image_fits_without() -> None:
    refiner, recipe = make("vit_w64_d12_h2_p4", image=64), asked(0, size=64)
    needs = measure_needs(refiner, recipe.views.shapes, 2, precision="fp32")
    checkpointed = measure_needs(refiner, recipe.views.shapes, 2, precision="fp32", checkpointing=True)
    assert checkpointed.encoder_image < 0.5 * needs.encoder_image
    budget = (checkpointed.cached(1) + needs.cached(1)) / 2 * ROOM
    picked = Planner(refiner, recipe.model_copy(update={"batch_size": 2}), Run()).fitting(budget)
    assert (picked.micro_batch, picked.checkpointing) == (1, True)


@pytest.mark.usefixtures("exact")
def test_selective_checkpointing_holds_less_and_the_trace_tells_how_much() -> None:
    shapes, peaks = [(32, 2), (16, 4)], {}
    for kept in (False, "selective"):
        refiner = make("vit_w64_d4_h2_p4")
        refiner.backbone.use_math_attention()
        needs = measure_needs(refiner, shapes, 4, precision="bf16", checkpointing=kept)
        refiner.backbone.set_checkpointing(kept)
        views = [torch.randn(4, 3, size, size) for size, count in shapes for _ in range(count)]
        with LiveBytes() as live:
            forward_backward(refiner, views, torch.arange(4), None, Run(precision="bf16"))
        peaks[kept] = live.peak
        assert needs.plain == pytest.approx(live.peak, rel=0.2), kept
    assert peaks["selective"] < 0.75 * peaks[False]


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
    needs = Needs(8, 10, 4, 1, 2, 3, 50, features=1, heads=5, image_graphs=(3,))
    more = replace(needs, process=100)
    assert (more.whole(), more.cached(2), more.largest_micro_batch(130)) == (157, needs.cached(2) + 100, 5)
    assert needs.largest_micro_batch(30) == 5
    assert needs.largest_micro_batch(10) == 0
    assert (needs.whole(), replace(needs, plain=2).whole()) == (57, 11)


def test_the_planner_counts_the_state_of_sharded_blocks() -> None:
    refiner = make("vit_w192_d8_h3_p8", image=96)
    whole, half = (measure_needs(refiner, [(96, 2)], 4, precision="fp32", shards=shards) for shards in (1, 2))
    blocks = sum(p.numel() for p in refiner.backbone.model.blocks.parameters()) * 4
    assert whole.state - half.state == pytest.approx(5 * blocks / 2 - 3 * blocks / 8)


def test_selective_checkpointing_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(RecipeError, match=r"checkpointing: .*compiled blocks choose.*set it or compile to false"):
        override(asked(), ["compile=true", "checkpointing=selective"])
    backbone = make().backbone
    backbone.runner = None  # as of a hierarchical encoder
    with pytest.raises(InputError, match=r"checkpointing=selective: .* does not run block by block; use true"):
        backbone.set_checkpointing("selective")
