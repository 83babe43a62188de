"""A pool of views: the losses of the run without it where it holds that run's views, and what it draws later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mim_refiner.core.run import Run
from mim_refiner.data.loaders import TrainLoader
from mim_refiner.errors import InputError
from mim_refiner.training import loop, refine, view_pool
from mim_refiner.training.metric_log import metrics_of
from mim_refiner.training.recipe import RefineRecipe
from mim_refiner.training.view_pool import ViewPool, make_pool, pool_bytes, pooled_epochs, refuse_pool

MakeRun = Callable[..., Any]


def _losses(make: MakeRun, folder: Path, frozen: int, **settings: Any) -> list[float]:
    """Of an epoch of either phase."""
    run = make(drop_path=0.0)
    run.refiner.frozen_blocks = frozen
    recipe = run.refinement.recipe
    short = {name: getattr(recipe, name).model_copy(update={"epochs": 1}) for name in ("warmup", "refinement")}
    return [record["loss"] for record in run.run(folder, frozen_blocks=frozen, **short, **settings)]


@pytest.mark.parametrize(("frozen", "micro_batch"), [(0, None), (1, None), (1, 4)])
def test_a_pool_of_all_views_gives_the_losses_of_the_run_without(
    tiny_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen: int, micro_batch: int | None
) -> None:
    plain = _losses(tiny_run, tmp_path / "plain", frozen, micro_batch=micro_batch)
    assert len(plain) == 8
    rounded = _losses(tiny_run, tmp_path / "rounded", frozen, micro_batch=micro_batch, view_pool=2)
    assert rounded != plain
    assert rounded == pytest.approx(plain, rel=2e-2)  # another neighbour is the nearest now and then

    def unrounded(recipe: RefineRecipe, loader: TrainLoader, seed: int) -> ViewPool:
        return ViewPool(pooled_epochs(recipe), loader.steps_per_epoch, recipe.batch_size, seed, torch.float32)

    monkeypatch.setattr(refine, "make_pool", unrounded)
    assert _losses(tiny_run, tmp_path / "exact", frozen, micro_batch=micro_batch, view_pool=2) == plain


def test_the_frozen_part_runs_once_for_each_view_and_a_cut_run_resumes_to_the_bit(
    tiny_run: MakeRun, tmp_path: Path
) -> None:
    settings = {"frozen_blocks": 1, "view_pool": 2}
    calls: list[int] = []
    runs = [tiny_run() for _ in range(3)]
    for run in runs:
        run.refiner.frozen_blocks = 1
        run.refiner.backbone.model.blocks[0].register_forward_hook(lambda *call: calls.append(len(call[2])))
    metrics = runs[0].run(tmp_path / "whole", **settings)
    assert sum(calls) == 2 * 64 * 4  # epochs, images, views
    assert len(metrics) == 20
    with pytest.raises(KeyboardInterrupt):
        runs[1].run(tmp_path / "cut", stop_after=16, **settings)
    runs[2].run(tmp_path / "cut", **settings)
    for name, tensor in runs[2].refiner.state_dict().items():
        assert torch.equal(tensor, runs[0].refiner.state_dict()[name]), name


@pytest.mark.parametrize(("seconds", "batches"), [(1.0, 8), (9.0, 7), (100.0, 1)])
def test_a_pool_takes_its_share_of_a_limited_phase_and_is_then_what_it_has(
    tiny_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, batches: int
) -> None:
    run, now, pools = tiny_run(), [0.0], []

    def slow(*views: Any) -> Any:
        now[0] += seconds
        return frozen_views(*views)

    frozen_views, make_pool = refine.frozen_views, refine.make_pool
    monkeypatch.setattr(refine, "frozen_views", slow)
    monkeypatch.setattr(refine, "monotonic", lambda: now[0])
    monkeypatch.setattr(loop, "monotonic", lambda: now[0])
    monkeypatch.setattr(refine, "make_pool", lambda *given: pools.append(make_pool(*given)) or pools[0])
    run.refiner.frozen_blocks = 1
    warmup = run.refinement.recipe.warmup.model_copy(update={"max_seconds": 100.0})
    metrics = run.run(tmp_path / "run", frozen_blocks=1, view_pool=2, warmup=warmup)
    assert (pools[0].steps, len(pools[0].sample_ids)) == (batches, 16 * batches)
    assert now[0] == batches * seconds
    assert metrics[-1]["total_step"] == 20
    images = {int(i) for batch in pools[0].epoch(9) for i in batch.sample_ids}
    assert images == set(pools[0].sample_ids.tolist())  # whatever it holds, all of it is shown


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_pool_of_the_warm_up_alone_is_given_back(
    tiny_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen: int
) -> None:
    pools: list[ViewPool] = []
    held: list[int] = []  # at every step

    def made(*given: Any) -> ViewPool | None:
        pools.append(make_pool(*given))  # type: ignore[arg-type]
        return pools[-1]

    def metrics(*given: Any) -> Any:
        held.append(sum(kept.nbytes for kept in pools[0]._features))
        return metrics_of(*given)

    monkeypatch.setattr(refine, "make_pool", made)
    monkeypatch.setattr(refine, "metrics_of", metrics)
    run = tiny_run()
    run.refiner.frozen_blocks = frozen
    run.run(tmp_path / "run", frozen_blocks=frozen, view_pool=1)
    assert min(held[:8]) > 0
    assert [bool(size) for size in held[8:]] == 12 * [bool(frozen)]


def test_later_epochs_show_every_image_once_in_views_drawn_from_all_that_are_held() -> None:
    pool = ViewPool(3, 5, 4, 7, torch.float32)  # of 20 images, of which one is damaged: image 3 stands for it
    for epoch in range(3):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(epoch))
        order[order == 19] = 3
        for ids in order.split(4):
            pool.add([100.0 * epoch + 1000 * view + ids[:, None] for view in range(3)], ids)
    assert pool.full
    seen: list[list[int]] = []
    for epoch in range(3, 23):
        batches = list(pool.epoch(epoch))
        ids = torch.cat([batch.sample_ids for batch in batches])
        assert len(ids) == 20
        assert set(ids.tolist()) == set(range(19))
        features = [torch.cat(parts)[:, 0] for parts in zip(*(batch.views for batch in batches), strict=True)]
        for view, values in enumerate(features):
            assert torch.equal(values.remainder(100).long(), ids)
            assert torch.equal((values / 1000).long(), torch.full_like(ids, view))
        seen.append([int(value) // 100 % 10 for value in torch.cat(features)])
        again = list(pool.epoch(epoch, 3))
        assert all(torch.equal(a, b) for a, b in zip(again[0].views, batches[3].views, strict=True))
    counts = torch.tensor(seen).flatten().bincount(minlength=3)
    assert torch.allclose(counts / counts.sum(), torch.full((3,), 1 / 3), atol=0.05)
    assert seen[0] != seen[1]


def test_a_step_sends_its_row_numbers_in_one_copy() -> None:
    pool = ViewPool(1, 2, 4, seed=0)
    for _ in range(2):
        pool.add([torch.empty(4, 5, 3, device="meta") for _ in range(12)], torch.arange(4))
    sent: list[torch.device] = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            to = (kwargs or {}).get("device")
            if function is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and to is not None:
                sent.append(to)
            return function(*args, **(kwargs or {}))

    for epoch in (0, 1):
        sent.clear()
        with Note():
            batches = list(pool.epoch(epoch))
        assert [view.shape for view in batches[0].views] == [(4, 5, 3)] * 12
        assert sent == [torch.device("meta")] * 2


def test_features_beyond_half_precision_are_kept_as_its_largest_number() -> None:
    pool = ViewPool(1, 1, 2, seed=0)
    pool.add([torch.tensor([[1e6], [-1e6]])], torch.tensor([0, 1]))
    assert next(pool.epoch(0)).views[0].flatten().tolist() == [65504.0, -65504.0]


def test_a_pool_that_cannot_be_had_is_refused_in_one_line(tiny_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run()
    base = run.refinement.recipe
    recipe = base.model_copy(update={"frozen_blocks": 1, "view_pool": 100})
    refuse_pool(base, run.refiner, 64, Run())
    assert pooled_epochs(recipe) == 5
    tokens = 2 * (1 + 4) + 2 * (1 + 1)  # of the views of an image
    assert pool_bytes(recipe, run.refiner, 64) == 5 * 64 * tokens * 32 * 2
    assert pool_bytes(recipe.model_copy(update={"frozen_blocks": 0}), run.refiner, 64) == 2 * 64 * 4 * 2 * 32 * 2
    monkeypatch.setattr(view_pool, "free_memory", lambda device: 500_000.0)
    with pytest.raises(InputError, match=r"view_pool: the views of 5 epochs take .* set a smaller view_pool"):
        refuse_pool(recipe, run.refiner, 64, Run())
    still = base.warmup.model_copy(update={"epochs": 0})
    with pytest.raises(InputError, match=r"view_pool: no phase has a frozen part; set frozen_blocks"):
        refuse_pool(recipe.model_copy(update={"frozen_blocks": 0, "warmup": still}), run.refiner, 64, Run())
    monkeypatch.setattr(view_pool, "is_distributed", lambda: True)
    with pytest.raises(InputError, match=r"view_pool: works in one process only"):
        refuse_pool(recipe, run.refiner, 64, Run())
