from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL
import pytest
import torch
from safetensors.torch import load_file

from mim_refiner.commands.measured_settings import settle
from mim_refiner.core.run import Run
from mim_refiner.errors import NonFiniteLossError
from mim_refiner.training import loop
from mim_refiner.training.loop import step_generator
from mim_refiner.training.metric_log import MetricLog
from mim_refiner.training.recipe import AnchorSettings, GuardSettings

GOLDEN = Path(__file__).parent / "golden_curve.json"
MakeRun = Callable[[], Any]


def platform() -> dict[str, str]:
    """What decides over the last bits of a float32 run: the kernels torch has, and those its libraries choose."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    model = " ".join(facts.get(key, "?") for key in ("vendor_id", "cpu family", "model"))
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(), "model": model}


@pytest.mark.parametrize("asked", [True, False])
def test_sharding_in_one_process_is_said_to_do_nothing(tiny_run: MakeRun, asked: bool) -> None:
    said: list[str] = []
    run, made = Run(reporter=SimpleNamespace(message=said.append)), tiny_run()  # type: ignore[arg-type]
    recipe = made.recipe.model_copy(update={"shard": asked, "anchor": AnchorSettings(weight=1.0)})
    settle(recipe, recipe, made.refiner.backbone, (made.loader.images,) * 2, run, None, True)
    assert len(said) == asked
    assert not asked or said[0].startswith("shard: one process holds all weights; start several")


def test_the_loss_curve_of_twenty_steps_is_bit_identical(tiny_run: MakeRun, tmp_path: Path) -> None:
    """To the bit on a kind of processor that the file knows, closely on every other.

    ``python tests/training/test_refine.py`` writes this processor's curve: for a new one, or (then delete the others)
    when the mathematics changes on purpose.
    """
    curves = json.loads(GOLDEN.read_text())
    losses = [record["loss"] for record in tiny_run().run(tmp_path / "run")]
    assert len(losses) == 20
    recorded = [curve["losses"] for curve in curves if curve["platform"] == platform()]
    if recorded:
        assert [loss.hex() for loss in losses] == recorded[0]
    # other kernels round differently; Pillow before 13 resizes a few pixels otherwise
    tolerance = 1e-3 if int(PIL.__version__.split(".")[0]) >= 13 else 1e-2
    for curve in curves:
        assert losses == pytest.approx([float.fromhex(text) for text in curve["losses"]], rel=tolerance)


@pytest.mark.parametrize("kill_at", [2, 5, 8, 9, 16])
def test_a_run_killed_anywhere_ends_with_the_weights_of_an_uninterrupted_one(
    tiny_run: MakeRun, tmp_path: Path, kill_at: int
) -> None:
    whole = tiny_run()
    expected = whole.run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        tiny_run().run(tmp_path / "cut", stop_after=kill_at)
    resumed = tiny_run()
    metrics = resumed.run(tmp_path / "cut")
    for ours, theirs in ((resumed.refiner, whole.refiner), (resumed.ema, whole.ema)):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name
    assert [(m["total_step"], m["loss"]) for m in metrics] == [(m["total_step"], m["loss"]) for m in expected]


def test_warmup_moves_only_the_heads_and_refinement_everything_but_the_position_table(
    tiny_run: MakeRun, tmp_path: Path
) -> None:
    run = tiny_run()
    start = {name: p.clone() for name, p in run.refiner.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        run.run(tmp_path / "run", stop_after=8)  # two epochs of four steps: the warm-up
    for name, parameter in run.refiner.named_parameters():
        assert torch.equal(parameter, start[name]) == name.startswith("backbone."), name
    assert all(p.grad is None for p in run.refiner.backbone.parameters())
    run.run(tmp_path / "run")
    still = [n for n, p in run.refiner.named_parameters() if n.startswith("backbone.") and torch.equal(p, start[n])]
    assert still == ["backbone.model.pos_embed"]


def test_metrics_hold_both_phases_rates_and_every_head(tiny_run: MakeRun, tmp_path: Path) -> None:
    metrics = tiny_run().run(tmp_path / "run")
    assert [m["phase"] for m in metrics] == ["warmup"] * 8 + ["refinement"] * 12
    for key in ("epoch", "step", "loss", "lr", "images_per_s"):
        assert all(key in m for m in metrics)
    for block in (1, 2):
        for key in ("loss", "alignment", "neighbor_similarity", "neighbor_age", "neighbor_accuracy"):
            assert all(f"{key}/{block}" in m for m in metrics)
    rates = [m["lr"] for m in metrics]
    peak = 2e-3 * 16 / 256
    assert rates[0] == pytest.approx(peak / 5)  # warm-up of four steps: (i + 1) / (W + 1)
    assert max(rates) == pytest.approx(peak)
    assert rates[-1] < rates[-2] < peak


@pytest.mark.parametrize(
    ("step_seconds", "taken"),
    [
        (lambda step: 0.9, list(range(12))),  # in time
        (lambda step: 2.0, [0, 1, 3, 5, 7, 9, 11]),  # twice as slow: every other step
        (lambda step: 1.0 if step < 6 else 3.0, [0, 1, 2, 3, 4, 5, 6, 8, 11]),  # slows down in mid-run
    ],
)
def test_a_phase_of_limited_time_leaves_steps_out_and_ends_with_its_schedule(
    tiny_run: MakeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step_seconds: Callable[[int], float],
    taken: list[int],
) -> None:
    run, now = tiny_run(), [0.0]
    monkeypatch.setattr(loop, "monotonic", lambda: now[0])

    def turn_the_clock(step: int) -> bool:
        now[0] += step_seconds(step - 8) if step >= 8 else 0.0
        return False

    run.spoil = turn_the_clock
    limited = run.refinement.recipe.refinement.model_copy(update={"max_seconds": 12.0})  # a second a step
    metrics = run.run(tmp_path / "run", refinement=limited)
    assert [step - 8 for step in run.steps[8:]] == taken
    assert run.steps[:8] == list(range(8))  # the warm-up has no limit
    assert now[0] <= 12 + step_seconds(11)
    assert [m["total_step"] for m in metrics] == list(range(1, 21))
    assert metrics[-1]["lr"] == tiny_run().run(tmp_path / "whole")[-1]["lr"]


def test_the_queue_carries_from_warmup_into_refinement(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run()
    with pytest.raises(KeyboardInterrupt):
        run.run(tmp_path / "run", stop_after=8)
    queue = run.refiner.heads["1"].queue
    before = queue.entries.clone()
    assert (queue.sample_ids >= 0).all()
    with pytest.raises(KeyboardInterrupt):
        run.run(tmp_path / "run", stop_after=9)
    changed = (queue.entries != before).any(dim=1).sum().item()
    assert changed == 16  # one batch, not a fresh queue
    assert queue.top_k == 4


@pytest.mark.parametrize("bad", [1, 4, 13])
def test_a_batch_of_nan_is_left_out_after_a_return_to_the_last_checkpoint(
    tiny_run: MakeRun, tmp_path: Path, bad: int
) -> None:
    run = tiny_run()
    run.spoil = lambda step: step == bad
    metrics = run.run(tmp_path / "run")
    back = bad - bad % 3 if bad < 8 else 8 + (bad - 8) - (bad - 8) % 3
    assert run.steps == [*range(bad + 1), *range(back, bad), *range(bad + 1, 20)]
    assert json.loads((tmp_path / "run" / "skipped_batches.json").read_text()) == [
        [bad // 8 and 1, bad if bad < 8 else bad - 8]
    ]
    assert [m["total_step"] for m in metrics] == list(range(1, 21))
    assert all(torch.isfinite(p).all() for p in run.refiner.parameters())


def test_a_run_that_left_a_batch_out_resumes_to_the_same_bits(tiny_run: MakeRun, tmp_path: Path) -> None:
    whole = tiny_run()
    whole.spoil = lambda step: step == 4
    whole.run(tmp_path / "whole")
    cut = tiny_run()
    cut.spoil = lambda step: step == 4
    with pytest.raises(KeyboardInterrupt):
        cut.run(tmp_path / "cut", stop_after=11)
    resumed = tiny_run()
    resumed.spoil = lambda step: step == 4
    resumed.run(tmp_path / "cut")
    for name, tensor in resumed.refiner.state_dict().items():
        assert torch.equal(tensor, whole.refiner.state_dict()[name]), name


def test_a_second_non_finite_loss_stops_before_the_weights_take_it(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run()
    run.spoil = lambda step: step in (4, 6)
    with pytest.raises(NonFiniteLossError, match=r"step 6 of warmup \(learning rate .*step-000006\)") as caught:
        run.run(tmp_path / "run")
    assert caught.value.exit_code == 2
    assert all(torch.isfinite(p).all() for p in run.refiner.parameters())


def test_a_stop_after_a_loss_of_nan_saves_no_spoiled_weights(tiny_run: MakeRun, tmp_path: Path) -> None:
    """The loss of step 9 is NaN and no log line has shown it when the signal comes."""

    def spoil(step: int) -> bool:
        if step == 9:
            signal.raise_signal(signal.SIGTERM)
        return step == 9

    run = tiny_run()
    run.spoil = spoil
    with pytest.raises(KeyboardInterrupt):
        run.run(tmp_path / "run", log_every=100)
    files = [*(tmp_path / "run" / "checkpoints" / "last").glob("*.safetensors")]
    assert files
    assert all(value.isfinite().all() for file in files for value in load_file(file).values())


@pytest.mark.parametrize(("bad", "found"), [(8, 9), (9, 9), (13, 13), (14, 15)])
def test_a_loss_of_nan_is_found_before_the_guard_looks_and_nobody_waits_in_between(
    tiny_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int, found: int
) -> None:
    """The guard, which looks after every second step, would stop the run for features that are not finite.

    The flag of bad losses lies on the device: it is read before a log line, a look or a checkpoint, and not at other
    steps, whatever the device is. So a GPU does what a CPU does.
    """
    reads: list[int] = []
    original = MetricLog.first_non_finite
    run = tiny_run()
    monkeypatch.setattr(MetricLog, "first_non_finite", lambda log: [reads.append(run.steps[-1]), original(log)][1])
    run.spoil = lambda step: step == bad
    guard = GuardSettings(every=2, images=20)
    run.run(tmp_path / "run", guard=guard, log_every=100, checkpoint_every=100)
    assert run.steps == [*range(found + 1), *(step for step in range(8, 20) if step != bad)]
    assert reads == [7, *range(9, found + 1, 2), *(step - (step == bad) for step in range(9, 20, 2))]
    assert json.loads((tmp_path / "run" / "guard.json").read_text())["stopped"] is None


def test_draws_of_a_step_depend_on_seed_phase_and_step_alone() -> None:
    def draw(*key: int) -> torch.Tensor:
        return torch.rand(3, generator=step_generator(*key))

    assert torch.equal(draw(0, 1, 2), draw(0, 1, 2))
    assert len({tuple(draw(*key).tolist()) for key in ((0, 1, 2), (1, 1, 2), (0, 0, 2), (0, 1, 3))}) == 4
    step_generator(0, 1, 2)
    first = torch.rand(3)
    step_generator(0, 1, 2)
    assert torch.equal(first, torch.rand(3))  # the global generator, for drop-path and dropout


if __name__ == "__main__":
    import tempfile

    import numpy as np

    from conftest import TinyRun  # type: ignore[import-not-found]
    from mim_refiner.data.decode import ImageSet
    from mim_refiner.data.sources import open_source

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        coarse = np.random.default_rng(0).integers(0, 255, (64, 4, 4, 3), dtype=np.uint8)
        pixels = coarse.repeat(5, axis=1).repeat(5, axis=2)
        np.savez(Path(folder) / "images.npz", images=pixels, labels=np.arange(64) % 4)
        metrics = TinyRun(ImageSet(open_source(Path(folder) / "images.npz"))).run(Path(folder) / "run")
    curves = [curve for curve in json.loads(GOLDEN.read_text()) if curve["platform"] != platform()]
    curves.append({"platform": platform(), "losses": [record["loss"].hex() for record in metrics]})
    GOLDEN.write_text(json.dumps(curves, indent=1) + "\n")
