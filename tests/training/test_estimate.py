"""What is told of a run before it starts: against measured steps, and nothing of the run is touched by it."""

from __future__ import annotations

import math
import os
import re
import time
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import TrainLoader
from mim_refiner.data.photometric import BatchPhotometric
from mim_refiner.data.sources import open_source
from mim_refiner.data.views import ViewSpec
from mim_refiner.errors import InputError
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.models.mae import MaskedAutoencoder
from mim_refiner.training import estimate
from mim_refiner.training.estimate import (
    Estimate,
    PhaseCost,
    format_hours,
    machine_is_busy,
    pretrain_estimate,
    pretrain_needs,
    refine_phases,
)
from mim_refiner.training.memory import RESERVE, WASTE, Choice, Needs
from mim_refiner.training.pretrain import forward_backward
from mim_refiner.training.recipe import override
from mim_refiner.training.recipes import refine_recipe, tiny_mae
from mim_refiner.training.refine import make_refiner, view_specs
from mim_refiner.training.resolve import resolve
from mim_refiner.training.traces import LiveBytes


class TokenNorm(torch.nn.BatchNorm1d):
    def forward(self, tokens):
        return super().forward(tokens.transpose(1, 2)).transpose(1, 2)


@pytest.fixture
def parts(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", images=images)
    view = ViewSpec("mae", 32, jitter_prob=0.0, gray_prob=0.0)
    backbone = Backbone.wrap(create_vit("vit_w32_d2_h2_p8", image_size=32))
    recipe = tiny_mae().model_copy(update={"batch_size": 16})
    loader = TrainLoader(ImageSet(open_source(str(tmp_path / "noise.npz"))), [view], 16, 0)
    mae = MaskedAutoencoder(backbone.model, decoder_dim=16, decoder_depth=1, decoder_heads=2).initialize()
    return mae, recipe, loader, BatchPhotometric(view, backbone.info.mean, backbone.info.std)


def test_nothing_of_the_run_is_touched(parts):
    mae, recipe, loader, photometric = parts
    before = {name: tensor.clone() for name, tensor in mae.state_dict().items()}
    drawn = torch.get_rng_state()
    fitted, cost = pretrain_estimate(mae, recipe, loader, photometric, math.inf, Run())
    assert fitted == recipe
    assert mae.training is True
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(before[name], tensor) for name, tensor in mae.state_dict().items())
    assert all(parameter.grad is None for parameter in mae.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in mae.parameters())
    assert cost.phases["pre-training"].steps == 200
    assert cost.phases["pre-training"].operations > 1e6
    assert "of" not in cost.line.partition("memory:")[2]  # nobody knows what is free


def test_one_thread_is_advised_where_several_wait_for_each_other(parts, monkeypatch):
    """Seen beside a busy process: 39 hours told for 9 minutes. The threads of the run itself are left as they are."""
    mae, recipe, loader, photometric = parts
    now, before, first, slower = [0.0], torch.get_num_threads(), loader.first, 1.0
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def counted(images):
        now[0] += 36 * images * (slower if torch.get_num_threads() > 1 else 1)
        return first(images)

    monkeypatch.setattr(loader, "first", counted)
    try:
        for threads, slower, told in ((2, 16.0, True), (2, 0.5, False), (1, 1.0, False)):  # noqa: B007
            torch.set_num_threads(threads)
            _, cost = pretrain_estimate(mae, recipe, loader, photometric, math.inf, Run())
            assert ("on one thread about 32 hours, with OMP_NUM_THREADS=1" in cost.line) == told, cost.line
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_busy_machine_is_told_and_its_own_work_is_not_the_load(parts, monkeypatch):
    mae, recipe, loader, photometric = parts
    told = " (the machine was busy when this was timed; it may be quicker)"
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    # the load average, seconds of the processor that this process has taken
    for load, used, expected in ((1.5, 10.0, True), (0.6, 10.0, False), (4.5, 900.0, False), (5.2, 900.0, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 9.0, 9.0), raising=False)
        monkeypatch.setattr(time, "process_time", lambda used=used: used)
        assert machine_is_busy(loader, Run()) == expected, (load, used)
    _, cost = pretrain_estimate(mae, recipe, loader, photometric, math.inf, Run())
    assert f"about {format_hours(cost.hours)}{told}; memory:" in cost.line
    assert cost.record()["time"].endswith(told)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(os, "getloadavg", lambda: (3.5, 9.0, 9.0), raising=False)
    assert not machine_is_busy(loader, Run())  # a core is left for this one
    monkeypatch.setattr(os, "getloadavg", Mock(side_effect=OSError))
    assert not machine_is_busy(loader, Run())
    monkeypatch.delattr(os, "getloadavg")
    _, cost = pretrain_estimate(mae, recipe, loader, photometric, math.inf, Run())
    assert "busy" not in cost.line


def test_a_view_pool_takes_the_time_of_the_threads_that_it_will_have(tmp_path, monkeypatch):
    """Threads are chosen by the clock in a phase with max_seconds alone; told was the least of both always."""
    np.savez(tmp_path / "noise.npz", images=np.zeros((8, 32, 32, 3), dtype=np.uint8))
    backbone = Backbone.wrap(create_vit("vit_w32_d4_h2_p8", image_size=32))
    recipe = resolve(override(refine_recipe(None, image_size=32, images=8), ["batch_size=8", "view_pool=1"]), backbone)
    refiner = make_refiner(backbone, recipe)
    loader = TrainLoader(ImageSet(open_source(str(tmp_path / "noise.npz"))), view_specs(recipe), 8, 0)
    monkeypatch.setattr(estimate, "measured", lambda step, **how: (3.0, 1.0, 2.0))
    found = refine_phases(refiner, recipe, loader, Run())["warm-up"]
    assert (found.before, found.before_alone) == (3.0, 2.0)
    steps = recipe.warmup.epochs
    assert found.hours() == (3 + 3 * steps) / 3600
    assert found.hours(alone=True) == (2 + 2 * steps) / 3600
    assert replace(found, limit=1000.0).hours() == (2 + 2 * steps) / 3600
    assert replace(found, limit=1.0).hours() == 1 / 3600


def test_seconds_are_those_of_the_whole_batch(parts, monkeypatch):
    """From a batch of two, eight or sixteen images alike: with a clock that counts images, to the digit."""
    mae, recipe, loader, photometric = parts
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    first = loader.first

    def counted(images):
        now[0] += 0.01 * images
        return first(images)

    monkeypatch.setattr(loader, "first", counted)
    for enough in (0.0, 0.05, 10.0):
        monkeypatch.setattr(estimate, "ENOUGH", enough)
        _, cost = pretrain_estimate(mae, recipe, loader, photometric, math.inf, Run())
        assert cost.phases["pre-training"].seconds == pytest.approx(0.16)
    assert cost.hours == pytest.approx(200 * 0.16 / 3600)


def test_bytes_are_those_of_a_step(parts):
    """The traces of fake tensors meet what the whole batch, and parts of it, really hold."""
    mae, _, loader, photometric = parts
    needs = pretrain_needs(mae, 16, 32, Run(), process=1000)
    gradients = sum(parameter.nbytes for parameter in mae.parameters() if parameter.requires_grad)
    assert needs.state == sum(tensor.nbytes for tensor in (*mae.parameters(), *mae.buffers())) + 3 * gradients
    images = photometric(loader.first(16).views[0], torch.Generator().manual_seed(0))
    assert needs.images == images.nbytes
    assert needs.whole() == 1000 + needs.state - gradients + needs.images + needs.plain
    held = {}
    for micro_batch in (16, 4):
        mae.zero_grad()
        with LiveBytes() as live:
            forward_backward(mae, images, torch.Generator().manual_seed(0), Run(), micro_batch)
        held[micro_batch] = live.peak
    assert needs.plain == pytest.approx(WASTE["cpu"][0] * held[16], rel=0.02)
    assert needs.cached(4) - needs.kept == pytest.approx(WASTE["cpu"][1] * (held[4] - gradients), rel=0.15)


def test_what_does_not_fit_goes_in_parts_or_is_refused_with_the_settings_that_would(parts):
    mae, recipe, loader, photometric = parts
    _, cost = pretrain_estimate(mae, recipe, loader, photometric, math.inf, Run())
    needs = cost.picked.needs
    between = (needs.cached(5) + needs.cached(6)) / 2 / (1 - RESERVE)
    fitted, cut = pretrain_estimate(mae, recipe, loader, photometric, between, Run())
    assert fitted.micro_batch == 4  # four equal parts of 16
    assert cut.picked.peak == needs.cached(4) < between
    with pytest.raises(InputError, match=r"even for one image at a time.*decoder_depth") as caught:
        pretrain_estimate(mae, recipe, loader, photometric, needs.state, Run())
    assert "\n" not in str(caught.value)
    budget = 1e6 * int(re.search(r"--memory-budget (\d+)MB", str(caught.value))[1])
    assert pretrain_estimate(mae, recipe, loader, photometric, budget, Run())[1].picked.peak <= budget


def test_an_encoder_with_batch_norm_goes_in_no_parts(parts):
    mae, recipe, loader, photometric = parts
    mae.encoder.blocks[0].mlp.norm = TokenNorm(128)
    fitted, cost = pretrain_estimate(mae, recipe, loader, photometric, math.inf, Run())
    assert fitted.micro_batch is None
    between = cost.picked.needs.cached(8) / (1 - RESERVE)
    for settings, free in (({}, between), ({"micro_batch": 4}, math.inf)):
        with pytest.raises(InputError, match=r"TokenNorm.*smaller batch_size"):
            pretrain_estimate(mae, recipe.model_copy(update=settings), loader, photometric, free, Run())


def test_parts_have_the_gradients_of_the_whole_batch(parts):
    mae, _, loader, photometric = parts
    images = photometric(loader.first(16).views[0], torch.Generator().manual_seed(0))
    found = []
    for micro_batch in (None, 5):
        loss = forward_backward(mae, images, torch.Generator().manual_seed(1), Run(), micro_batch)
        found.append((loss, [parameter.grad.clone() for parameter in mae.parameters() if parameter.requires_grad]))
        mae.zero_grad()
    torch.testing.assert_close(found[1], found[0])


def test_the_line_names_the_setting_that_ends_within_an_hour():
    needs = Needs(64, 20 * 10**8, 10**8, 0, 0, 0, 8 * 10**8)
    picked, warm = Choice(needs, None, 0, False, ""), PhaseCost("warmup.epochs", math.inf, 2, 20, 90.0, 1.0)
    long = PhaseCost("refinement.epochs", math.inf, 30, 300, 120.0, 1.0)
    told = Estimate(600, 64, {"warm-up": warm, "refinement": long}, picked, 8e9)
    assert told.hours == pytest.approx(10.5)
    assert told.line == (
        "cost: 600 images, 2 epochs of warm-up and 30 epochs of refinement: about 10 hours; memory: about 2.7 GB of "
        "8.0 GB free; for about an hour: --set refinement.epochs=1 with another --out or --overwrite"
    )
    assert replace(long, limit=60.0).hours() == 1 / 60
    assert Estimate(600, 64, {"warm-up": warm}, picked, 8e9).advice == ""
    assert Estimate(600, 64, {}, picked, 8e9).line == (
        "cost: 600 images, time is not measured where weights are shared; memory: about 2.7 GB of 8.0 GB free"
    )
    assert [format_hours(hours) for hours in (1e-9, 0.004, 0.5, 3.21, 30, 100)] == [
        "a minute", "a minute", "30 minutes", "3.2 hours", "30 hours", "4.2 days",
    ]  # fmt: skip


def test_a_cached_step_is_measured_as_one_on_however_few_images(tmp_path, monkeypatch):
    np.savez(tmp_path / "noise.npz", images=np.zeros((16, 32, 32, 3), dtype=np.uint8))
    backbone = Backbone.wrap(create_vit("vit_w32_d4_h2_p8", image_size=32))
    recipe = resolve(override(refine_recipe(None, image_size=32, images=16), ["batch_size=16"]), backbone)
    refiner = make_refiner(backbone, recipe)
    loader = TrainLoader(ImageSet(open_source(str(tmp_path / "noise.npz"))), view_specs(recipe), 16, 0)
    taken, whole_step = [], estimate.forward_backward

    def step(refiner, views, ids, generator, run, micro_batch=None, kept=0):
        taken.append((len(ids), micro_batch, kept))
        return whole_step(refiner, views, ids, generator, run, micro_batch, kept)

    monkeypatch.setattr(estimate, "forward_backward", step)
    monkeypatch.setattr(estimate, "ENOUGH", 0.0)  # two images are measured
    operations = {}
    for micro_batch, graphs in ((None, 0), (12, 0), (4, 0), (4, 4), (4, 8)):
        taken.clear()
        settings = {"micro_batch": micro_batch, "kept_graphs": graphs}
        changed = recipe.model_copy(update=settings)
        operations[micro_batch, graphs] = refine_phases(refiner, changed, loader, Run())["refinement"].operations
        assert {each for each in taken if each[1]} == ({(2, 1, graphs // 2)} if micro_batch else set())
    plain = operations[None, 0]
    assert operations[12, 0] == operations[4, 0] > 1.1 * plain
    assert operations[4, 0] > operations[4, 4] > operations[4, 8] == plain


def test_few_images_go_in_parts_as_the_whole_batch_does():
    recipe = override(refine_recipe(None, image_size=32), ["batch_size=64"])
    for micro_batch in (1, 3, 16, 63):
        for graphs in (0, 1, 7, 2 * -(-64 // micro_batch)):
            for images in (2, 5, 8, 33, 64):
                changed = recipe.model_copy(update={"micro_batch": micro_batch, "kept_graphs": graphs})
                own, kept = estimate.parts_of(changed, images)
                assert 1 <= own < images
                parts = -(-images // own)
                assert kept / parts == pytest.approx(graphs / -(-64 // micro_batch), abs=1 / parts)
                assert images < 64 or (own, kept) == (micro_batch, graphs)


def test_the_anchors_pass_and_the_view_pool_cost_time(tmp_path, monkeypatch):
    np.savez(tmp_path / "noise.npz", images=np.zeros((8, 32, 32, 3), dtype=np.uint8))
    monkeypatch.setattr(estimate, "ENOUGH", 0.0)  # two images are measured
    found = {}
    for name, settings in (("plain", []), ("anchor", ["anchor.weight=1"]), ("pool", ["view_pool=1"])):
        backbone = Backbone.wrap(create_vit("vit_w32_d4_h2_p8", image_size=32))
        recipe = override(refine_recipe(None, image_size=32, images=8), ["batch_size=8", *settings])
        recipe = resolve(recipe, backbone)
        refiner = make_refiner(backbone, recipe)
        loader = TrainLoader(ImageSet(open_source(str(tmp_path / "noise.npz"))), view_specs(recipe), 8, 0)
        found[name] = refine_phases(refiner, recipe, loader, Run())
    plain, anchor, pool = ([phase.operations for phase in phases.values()] for phases in found.values())
    assert anchor[0] == plain[0]
    assert anchor[1] > 1.1 * plain[1]
    assert pool[0] < 0.9 * plain[0]  # the heads alone
    assert pool[1] == plain[1]  # no block is frozen
    assert found["pool"]["warm-up"].before > 0 == found["pool"]["refinement"].before
