"""Kills, signals, full disks, dying loader processes and processes in number: what a run must survive."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mim_refiner.errors import InputError
from mim_refiner.training.memory import RESERVE, format_bytes

KILLS = int(os.environ.get("MIM_REFINER_KILLS", "5"))  # 20 for the long form


def weights(run: Path) -> bytes:
    return (run / "export" / "model.safetensors").read_bytes()


def test_a_run_ends_well_without_a_folder_for_temporary_files(mae, unlabelled, cli, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError("no usable temporary directory")

    monkeypatch.setattr("mim_refiner.commands.refine.tempfile.TemporaryDirectory", full)
    outcome = cli.call(*cli.refine(unlabelled, mae.export, tmp_path / "out"))
    assert outcome.code == 0, outcome.err
    assert weights(tmp_path / "out")


@pytest.mark.slow
def test_random_kills_cost_nothing(mae, unlabelled, cli, finish, tmp_path):
    """SIGKILL at random moments of real runs; the last attempt ends with the bits of a run that nobody disturbed."""
    settings = ("checkpoint_every=2", "log_every=1", f"refinement.epochs={4 + KILLS}", "guard.every=5")
    words = [*cli.refine(unlabelled, mae.export, tmp_path / "killed", *settings), "--quiet"]
    draw = random.Random(1)
    hits = sum(kill_at_random(cli.start(*words), tmp_path / "killed" / "metrics.jsonl", draw) for _ in range(KILLS))
    assert hits >= KILLS - 1, "the runs were over before they could be killed"
    last = cli.start(*words)
    assert last.returncode == 0, last.said()
    undisturbed = finish(cli.refine(unlabelled, mae.export, tmp_path / "undisturbed", *settings))
    assert weights(tmp_path / "killed") == weights(undisturbed.path)
    records = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    expected = undisturbed.metrics()
    for record in (*records, *expected):
        del record["images_per_s"]
    assert records == expected
    assert (tmp_path / "killed" / "guard.json").read_text() == (undisturbed.path / "guard.json").read_text()


def kill_at_random(process, log: Path, draw: random.Random) -> bool:
    """Kill it after some steps of its own and a random while; False if it was over before."""

    def logged() -> int:
        return log.read_bytes().count(b"\n") if log.exists() else 0

    more, pause, before = draw.randint(0, 4), draw.random(), logged()
    while more and logged() < before + more and process.poll() is None:
        before = min(before, logged())  # lines of steps that will be run again are dropped
        time.sleep(0.002)
    time.sleep(pause * (0.03 if more else 1.0))
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    return process.returncode == -signal.SIGKILL


def test_a_stop_signal_while_measuring_exits_130_too(monkeypatch, mae, unlabelled, cli, tmp_path):
    from mim_refiner.commands import refine

    def conclude(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(refine, "conclude", conclude)
    before = signal.getsignal(signal.SIGTERM)
    outcome = cli.call(*cli.refine(unlabelled, mae.export, tmp_path / "run"))
    assert outcome.code == 130, outcome.err
    assert outcome.err.splitlines()[-1] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_full_disk_is_one_line_and_the_checkpoint_before_it_stays(mae, unlabelled, cli, tmp_path):
    """A limit on the size of files refuses the write as a full disk does, inside torch's and safetensors' writers."""
    out = tmp_path / "run"
    words = cli.refine(unlabelled, mae.export, out, "checkpoint_every=2")
    code = """
import resource, signal
from mim_refiner.training.state import RunFolder as R
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = R.save

def limited(self, position, *rest):
    limit = 30_000 if position.total_step >= 4 else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return save(self, position, *rest)

R.save = limited
"""
    (full,) = cli.processes([*words, "--quiet"], 1, code=code)
    assert full.code == 2, full.err
    assert full.err.count("\n") == 1
    assert "cannot write the checkpoint" in full.err
    assert "free space" in full.err
    assert not list((out / "checkpoints").glob(".*"))
    assert (out / "checkpoints" / "last").resolve().name == "step-000002"
    resumed = cli.call(*words)
    assert resumed.code == 0, resumed.err
    assert "resuming after step 2" in resumed.err


def test_a_killed_loader_process_is_replaced(mae, unlabelled, cli, refined, finish, tmp_path, monkeypatch):
    from mim_refiner.data.loaders import TrainLoader
    from mim_refiner.training import refine as training

    loaders: list[TrainLoader] = []
    make = TrainLoader.__init__
    monkeypatch.setattr(TrainLoader, "__init__", lambda self, *a, **k: (loaders.append(self), make(self, *a, **k))[1])
    original, killed = training.step_generator, []

    def generator(seed: int, phase: int, step: int) -> torch.Generator:
        if (phase, step) == (0, 1) and not killed:
            for worker in loaders[0]._loader._iterator._workers:
                killed.append(worker.pid)
                worker.kill()
        return original(seed, phase, step)

    monkeypatch.setattr(training, "step_generator", generator)
    outcome = cli.call(*cli.refine(unlabelled, mae.export, tmp_path / "run", "workers=1"))
    assert outcome.code == 0, outcome.err
    assert killed
    assert "a loader process was killed (out of memory?)" in outcome.err
    assert "starting the loader anew" in outcome.err
    undisturbed = finish(cli.refine(unlabelled, mae.export, tmp_path / "undisturbed"))
    assert weights(tmp_path / "run") == weights(undisturbed.path)


def test_a_hanging_loader_process_is_replaced_and_at_last_given_up(mae, unlabelled, cli, tmp_path, monkeypatch):
    from mim_refiner.commands import refine
    from mim_refiner.data import loaders

    priced = refine.with_cost

    def then_hang(*arguments):
        cost = priced(*arguments)
        monkeypatch.setattr(loaders, "crop_batch", lambda *a, **k: signal.pause())
        return cost

    monkeypatch.setattr(refine, "with_cost", then_hang)
    words = cli.refine(
        unlabelled, mae.export, tmp_path / "run", "workers=1", "loader_timeout=0.2", "guard.enabled=false"
    )
    outcome = cli.call(*words)
    assert outcome.code == 2, outcome.err
    assert outcome.err.count("starting the loader anew") == 3
    assert outcome.err.splitlines()[-1].startswith("error: a loader process gave no batch in time")


def test_images_that_vanish_stop_the_run_with_a_checkpoint(mae, cli, tmp_path, monkeypatch):
    from mim_refiner.commands import refine
    from mim_refiner.data.decode import ImageSet
    from mim_refiner.errors import DataError

    data = cli.write_shapes(tmp_path / "data", flat=True)
    original, calls, armed = ImageSet.load_resolved, [], []

    def vanishing(self: ImageSet, index: int, reduction: object):
        calls.append(index)
        if armed and len(calls) > 8 * 5 + 3 and len(calls) < 10_000:
            raise DataError(f"{data}: more than 10 % of the images are unreadable; the disk may be gone")
        return original(self, index, reduction)

    words = cli.refine(data, mae.export, tmp_path / "run", "guard.enabled=false", "checkpoint_every=100")
    priced = refine.with_cost

    def then_count(*arguments):
        cost = priced(*arguments)
        calls.clear()
        armed.append(1)
        return cost

    with monkeypatch.context() as patch:
        patch.setattr(ImageSet, "load_resolved", vanishing)
        patch.setattr(refine, "with_cost", then_count)
        outcome = cli.call(*words, "--quiet")
    assert outcome.code == 2, outcome.err
    assert outcome.err.count("\n") == 1
    assert (tmp_path / "run" / "checkpoints" / "last").resolve().name == "step-000005"
    resumed = cli.call(*words)
    assert resumed.code == 0, resumed.err
    assert "resuming after step 5" in resumed.err


TOGETHER = ("checkpoint_every=2", "keep_checkpoints=99", "log_every=1", "batch_size=16", "refinement.top_k=4")


@pytest.fixture(scope="module")
def single(mae, shapes, cli, finish, tmp_path_factory):
    """What several processes do, done by one."""
    return finish(cli.refine(shapes, mae.export, tmp_path_factory.mktemp("runs") / "single", *TOGETHER))


@pytest.mark.slow
def test_two_processes_refine_as_one_and_one_goes_on_for_two(mae, shapes, cli, single, tmp_path):
    """The same losses and weights up to rounding; then a run of two processes is resumed by one, and the reverse."""
    out = tmp_path / "two"
    words = [*cli.refine(shapes, mae.export, out, *TOGETHER, "micro_batch=3"), "--json"]
    first, second = cli.processes(words)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert first.json.keys() >= {"before", "after", "verdict", "recommendation", "seconds"}
    assert (second.out, second.err) == ("", "")
    compare_runs(single.path, out, mae.export)

    elastic = cut_back(out, tmp_path / "elastic")
    again = cli.call(*[str(elastic) if word == str(out) else word for word in words])
    assert again.code == 0, again.err
    assert "resuming after step 3" in again.err
    compare_runs(single.path, elastic, mae.export)

    wider = cut_back(single.path, tmp_path / "wider")
    first, second = cli.processes(cli.refine(shapes, mae.export, wider, *TOGETHER))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "resuming after step 3" in first.err
    compare_runs(single.path, wider, mae.export)


@pytest.mark.slow
def test_sharded_weights_refine_as_whole_ones_and_their_checkpoints_are_whole(mae, shapes, cli, single, tmp_path):
    """FSDP2: two processes that share the weights; another two that do not share them go on from the middle."""
    words = cli.refine(shapes, mae.export, tmp_path / "shared", *TOGETHER, "shard=true", "guard.every=2")
    for outcome in cli.processes(words):
        assert outcome.code == 0, outcome.err
    compare_runs(single.path, tmp_path / "shared", mae.export)
    assert json.loads((tmp_path / "shared" / "guard.json").read_text())["history"]

    whole = cut_back(tmp_path / "shared", tmp_path / "whole")
    words = cli.refine(shapes, mae.export, whole, *TOGETHER, "guard.every=2")
    first, second = cli.processes(words)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "resuming after step 3" in first.err
    compare_runs(single.path, whole, mae.export)


@pytest.mark.slow
def test_two_processes_evaluate_as_one(mae, cli, tmp_path):
    """Each computes its part of the features, with an unreadable image in one of them; rank 0 writes."""
    data = cli.write_shapes(tmp_path / "data")
    (data / "circle" / "circle-03.png").write_bytes(b"not an image")
    words = ["evaluate", "--model", mae.export, "--data", data, "--protocols", "knn,linear,rank", "--device", "cpu"]
    words += ["--set", "linear.epochs=2", "--cache", "off", "--json"]
    one = cli.call(*words, "--out", tmp_path / "one")
    assert one.code == 0, one.err
    counting = f"""
from mim_refiner.evaluation import features
batches = features.eval_batches

def counted(images, size, batch, *, indices):
    with open(f"{tmp_path}/seen-{{rank}}", "a") as log:
        print(len(indices), file=log)
    return batches(images, size, batch, indices=indices)

features.eval_batches = counted
"""
    first, second = cli.processes([*words, "--out", tmp_path / "two-{rank}"], code=counting)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert second.out == ""
    assert [set((tmp_path / f"seen-{rank}").read_text().split()) for rank in (0, 1)] == [{str(cli.images // 2)}] * 2
    assert [(row["metric"], row["value"]) for row in first.json["results"]] == [
        (row["metric"], pytest.approx(row["value"], abs=1e-4)) for row in one.json["results"]
    ]
    names = [sorted(file.name for file in (tmp_path / out / "evaluation").iterdir()) for out in ("one", "two-0")]
    assert names[0] == names[1] != []
    assert not (tmp_path / "two-1").exists()


@pytest.mark.slow
def test_two_processes_pretrain_to_the_end(shapes, cli, tmp_path):
    """Both are asked for the last k-NN, of which each computes a part, and one of them writes it."""
    outcomes = cli.processes(cli.pretrain(shapes, tmp_path / "two"))
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].err + outcomes[1].err
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert "knn_top1" in summary["after"]


def cut_back(run: Path, out: Path) -> Path:
    """A copy of a finished run as it was after step 3."""
    shutil.copytree(run, out, symlinks=True)
    shutil.rmtree(out / "export")
    for folder in (out / "checkpoints").glob("step-*"):
        if folder.name > "step-000003":
            shutil.rmtree(folder)
    return out


def compare_runs(one: Path, other: Path, start: Path) -> None:
    """Losses step by step, and how far the weights have moved, up to float32 rounding that AdamW amplifies."""
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    assert (
        [record["total_step"] for record in logs[0]]
        == [record["total_step"] for record in logs[1]]
        == list(range(1, 7))
    )
    for ours, theirs in zip(*logs, strict=True):
        for key in ("loss", "alignment/2", "neighbor_similarity/2", "neighbor_age/2"):
            # the alignment is nearly zero: what rounding does to it is to be compared with its range of one
            assert theirs[key] == pytest.approx(ours[key], rel=2e-4, abs=1e-5), key
        if "knn_top1" in ours:
            assert theirs["knn_top1"] == pytest.approx(ours["knn_top1"], abs=0.12)  # one of nine test images
    before, a, b = (load_file(folder / "model.safetensors") for folder in (start, one / "export", other / "export"))
    for name, tensor in a.items():
        if tensor.ndim > 1 and not torch.equal(tensor, before[name]):
            assert (b[name] - tensor).norm() < 0.02 * (tensor - before[name]).norm(), name


def test_plan_prints_and_writes_nothing(mae, unlabelled, cli, tmp_path):
    words = cli.refine(unlabelled, mae.export, tmp_path / "run")
    outcome = cli.call(*words, "--plan", "--json", "--memory-budget", "64GB")
    assert outcome.code == 0, outcome.err
    plan = outcome.json["plan"]
    assert plan["setting"]["micro_batch"] is None
    assert plan["setting"]["kept_graphs"] == 0
    assert plan["cuda_graph"] is False
    assert {name: phase["steps"] for name, phase in plan["phases"].items()} == {"warm-up": 6, "refinement": 6}
    assert plan["hours"] == pytest.approx(sum(6 * phase["seconds"] for phase in plan["phases"].values()) / 3600)
    assert plan["phases"]["refinement"]["operations"] > 1.5 * plan["phases"]["warm-up"]["operations"] > 0
    assert plan["bytes"]["peak"] == plan["bytes"]["plain_step"] > plan["bytes"]["process"] > 1e8
    assert plan["views_are_cut"].startswith("on the CPU")
    assert not (tmp_path / "run").exists()
    shown = cli.call(*words, "--plan").out
    assert [line.split()[0] for line in shown.splitlines()[:4]] == ["images", "warm-up", "refinement", "in"]
    assert "verdict" in shown
    nothing_frozen = cli.refine(unlabelled, mae.export, tmp_path / "run", "view_pool=2", "warmup.epochs=0")
    refused = cli.call(*nothing_frozen, "--plan", "--quiet")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "view_pool: no phase has a frozen part; set frozen_blocks" in refused.err


def test_doctor_plan_budget_and_the_first_line_tell_one_number(mae, unlabelled, cli, tmp_path, monkeypatch):
    """Of one configuration; the run ends where its training would begin."""
    words = cli.refine(unlabelled, mae.export, tmp_path / "run")
    plans = [cli.call(*words, "--plan", "--json", *more).json["plan"] for more in ((), ("--memory-budget", "64GB"))]
    peak = plans[0]["bytes"]["peak"]
    assert plans[1]["bytes"]["peak"] == peak

    def end(*_):
        raise InputError("far enough")

    monkeypatch.setattr("mim_refiner.commands.refine.build", end)
    assert f"memory: about {format_bytes(peak)} of " in cli.call(*words).err
    settings = [words[place + 1].split("=") for place, word in enumerate(words) if word == "--set"]
    tree: dict = {"name": "tiny"}
    for key, value in settings:
        *above, last = key.split(".")
        (tree.setdefault(above[0], {}) if above else tree)[last] = int(value)
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    arguments = ["--data", unlabelled, "--model", mae.export, "--recipe", tmp_path / "recipe.yaml", "--device", "cpu"]
    told = cli.call("doctor", *arguments, "--json").json["model"]
    assert told["training_memory_gb"] == round(peak / 1e9, 2)
    assert told["free_memory_gb"] == pytest.approx(plans[0]["bytes"]["free"] / 1e9, rel=0.5)


def test_a_budget_picks_a_micro_batch_that_changes_nothing_else(mae, unlabelled, cli, tmp_path, refined):
    import yaml

    words = cli.refine(unlabelled, mae.export, tmp_path / "run")
    refused = cli.call(*words, "--memory-budget", "100KB", "--quiet")
    assert refused.code == 2
    assert "the step needs" in refused.err
    assert not (tmp_path / "run").exists()
    expected = cli.call(*words, "--plan", "--json").json["plan"]["bytes"]
    budget = (expected["plain_step"] + 2 * expected["one_image_at_a_time"]) / 3 / (1 - RESERVE)
    outcome = cli.call(*words, "--memory-budget", f"{budget / 1e3:.3f}KB")
    assert outcome.code == 0, outcome.err
    assert "cached step of" in outcome.err
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["micro_batch"] in range(1, 8)
    ours, theirs = (load_file(run / "export" / "model.safetensors") for run in (tmp_path / "run", refined.path))
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=2e-3), name
    again = cli.call(*words)  # resumes without the budget
    assert again.code == 0, again.err


def test_micro_batches_of_an_encoder_with_batch_norm_are_refused(unlabelled, cli, tmp_path, monkeypatch):
    from torch import nn

    from mim_refiner.commands import refine
    from mim_refiner.models.backbone import Backbone, create_vit

    model = create_vit(cli.arch, image_size=16)
    model.norm = nn.BatchNorm1d(32)
    monkeypatch.setattr(refine, "load_backbone", lambda source: Backbone.wrap(model))
    outcome = cli.call(*cli.refine(unlabelled, "x", tmp_path / "run", "micro_batch=4"), "--quiet")
    assert outcome.code == 2, outcome.err
    assert "depend on the other images" in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_rate_a_hundred_times_too_high_is_stopped_and_the_best_state_exported(mae, shapes, cli, tmp_path):
    words = ("refinement.epochs=12", "refinement.layer_decay=1.0", "guard.every=6", "knn_every=0")
    normal = cli.call(*cli.refine(shapes, mae.export, tmp_path / "normal", *words, "refinement.base_lr=0.03"))
    assert normal.code == 0, normal.err
    assert json.loads((tmp_path / "normal" / "guard.json").read_text())["stopped"] is None
    out = tmp_path / "spoiled"
    spoiled = cli.call(*cli.refine(shapes, mae.export, out, *words, "refinement.base_lr=3"), "--quiet")
    assert spoiled.code == 3, spoiled.err
    assert spoiled.err.count("\n") == 1
    assert "the guard stopped the run" in spoiled.err or "non-finite loss" in spoiled.err
    kept = json.loads((out / "guard.json").read_text())
    summary = json.loads((out / "summary.json").read_text())
    assert summary["stopped"] in spoiled.err
    assert summary["verdict"]["next"][0].startswith("smaller steps: --set refinement.base_lr=")  # not: a longer run
    assert summary["weights"]["exported"] == "best"  # whatever the recipe's export_weights
    assert f"| Exported weights | {summary['weights']['reason']} |" in (out / "export" / "README.md").read_text()
    exported, start = load_file(out / "export" / "model.safetensors"), load_file(mae.export / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in exported.values())
    if kept["best_step"] == 0:
        assert all(torch.equal(exported[name], tensor) for name, tensor in start.items())
