"""The command line in several processes."""

from __future__ import annotations

import pytest
import torch
import yaml


def evaluate(model: object, data: object, out: object) -> list[object]:
    words = ["evaluate", "--model", model, "--data", data, "--out", out, "--protocols", "knn,rank", "--device", "cpu"]
    return [*words, "--cache", "off", "--json"]


@pytest.mark.slow
def test_an_evaluation_of_other_data_in_one_process_is_refused(mae, shapes, unlabelled, cli, tmp_path):
    (tmp_path / "data-0").symlink_to(shapes)
    cli.write_shapes(tmp_path / "data-1")
    (tmp_path / "data-1" / "circle" / "circle-00.png").unlink()
    outcomes = cli.processes(evaluate(mae.export, tmp_path / "data-{rank}", tmp_path / "out"))
    assert [outcome.code for outcome in outcomes] == [2, 2]
    lines = {outcome.err.splitlines()[-1] for outcome in outcomes}
    assert len(lines) == 1
    assert lines.pop().startswith("error: the processes differ (data: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_verb_for_one_process_is_done_by_the_first(mae, shapes, cli, tmp_path):
    """The others would write the same files at the same time."""
    words = [
        "embed",
        "--model",
        mae.export,
        "--data",
        shapes,
        "--out",
        tmp_path / "features-{rank}.npy",
        "--device",
        "cpu",
    ]
    first, second = cli.processes(words)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert (second.out, second.err) == ("", "")
    assert (tmp_path / "features-0.npy").exists()
    assert not (tmp_path / "features-1.npy").exists()


def test_a_torn_environment_is_one_line(mae, shapes, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    outcome = cli.call(*evaluate(mae.export, shapes, tmp_path / "out"))
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "RANK and MASTER_ADDR and MASTER_PORT are not set" in outcome.err
    assert not torch.distributed.is_initialized()


# --- training: three processes, of which one meets something

SETTINGS = ("batch_size=12", "checkpoint_every=2", "log_every=1", "knn_every=0", "guard.every=2")  # 4 steps a phase

# Runs in every process first: process 1 does {what} when it begins step 2 of the refinement.
AT_A_STEP = """
import os, signal, time
from mim_refiner.training import refine
original = refine.step_generator

def generator(seed, phase, step):
    if (rank, phase, step) == (1, 1, 2):
        {what}
    return original(seed, phase, step)

refine.step_generator = generator
"""


def last_step(run) -> str:
    return (run / "checkpoints" / "last").resolve().name


def end_together(outcomes, code=2) -> str:
    """The one line that all end with."""
    assert [outcome.code for outcome in outcomes] == [code] * len(outcomes), [outcome.err for outcome in outcomes]
    (line,) = {outcome.err.splitlines()[-1] for outcome in outcomes}
    assert not any("Traceback" in outcome.err for outcome in outcomes)
    assert all(outcome.err.count("\n") == 1 for outcome in outcomes[1:])  # others than the first say nothing else
    return line


def goes_on(outcomes, step) -> None:
    """The same command again ended well, from that step on."""
    assert [outcome.code for outcome in outcomes] == [0] * len(outcomes), outcomes[0].err
    assert f"resuming after step {step}" in outcomes[0].err


@pytest.mark.slow
def test_images_that_one_process_cannot_read_end_all_with_a_checkpoint(mae, unlabelled, cli, tmp_path):
    code = """
from mim_refiner.data.decode import ImageSet
from mim_refiner.errors import DataError
load, calls, armed = ImageSet.load_resolved, [], []

def vanishing(self, *arguments):
    calls.append(1)
    if rank == 1 and armed and len(calls) > 4 * 5:
        raise DataError("the disk of process 1 is gone; mount it")
    return load(self, *arguments)

ImageSet.load_resolved = vanishing
from mim_refiner.commands import refine
priced = refine.with_cost
refine.with_cost = lambda *arguments: (priced(*arguments), calls.clear(), armed.append(1))[0]
"""
    words = cli.refine(
        unlabelled, mae.export, tmp_path / "run", *SETTINGS, "checkpoint_every=100", "guard.enabled=false"
    )
    line = end_together(cli.processes(words, 3, code=code))
    assert line == "error: the disk of process 1 is gone; mount it"
    assert last_step(tmp_path / "run") == "step-000005"
    goes_on([cli.call(*words)], 5)  # in one process: their number is free


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_rerun_resumes(mae, unlabelled, cli, tmp_path):
    words = cli.refine(unlabelled, mae.export, tmp_path / "run", *SETTINGS)
    code = AT_A_STEP.format(what="os.kill(os.getpid(), signal.SIGKILL)")
    first, killed, third = cli.processes(words, 3, code=code, MIM_REFINER_PROCESS_TIMEOUT=15)
    assert "gives no sign of life for 15 s (MIM_REFINER_PROCESS_TIMEOUT)" in first.err  # told at the start
    assert killed.code == -9
    line = end_together([first, third])
    assert line.startswith("error: process 1 of 3 (")
    assert "is gone or gives no sign of life" in line
    assert last_step(tmp_path / "run") == "step-000006"
    goes_on(cli.processes(words, 3), 6)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_with_one_checkpoint(mae, unlabelled, cli, tmp_path):
    words = cli.refine(unlabelled, mae.export, tmp_path / "run", *SETTINGS, "checkpoint_every=100")
    code = AT_A_STEP.format(what="os.kill(os.getpid(), signal.SIGTERM)")
    assert end_together(cli.processes(words, 3, code=code), 130) == "interrupted"
    assert last_step(tmp_path / "run") == "step-000007"
    goes_on([cli.call(*words)], 7)


@pytest.mark.slow
def test_another_recipe_in_one_process_is_refused(mae, unlabelled, cli, tmp_path):
    words = cli.refine(unlabelled, mae.export, tmp_path / "run", *SETTINGS, "refinement.epochs=1{rank}")
    line = end_together(cli.processes(words, 3))
    assert line == (
        "error: the processes differ (refinement.epochs: 10 on process 0, 11 on process 1); start all of them with the "
        "same command"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_each_process_would_decide_otherwise_is_decided_once(mae, unlabelled, cli, tmp_path):
    """Free memory, head placement and the folder to resume from differ in process 1; the run goes on as one."""
    code = """
from mim_refiner.commands import measured_settings, plan
from mim_refiner.training.state import RunFolder
place = measured_settings.place_heads

def placed(*arguments, **options):
    return place(*arguments, **options) | {"blocks": [1 + rank]}

measured_settings.place_heads = placed
plan.parse_budget, plan.process_bytes = lambda text, device: (8e9, 3e6)[rank], lambda: 0
plan.MEASURING = 0
if rank == 1:
    RunFolder._saved = lambda self: []  # a file system that lags behind
"""
    settings = ("batch_size=16", "checkpoint_every=2", "log_every=1")
    words = cli.refine(unlabelled, mae.export, tmp_path / "run", *settings)
    words += ["--head-blocks", "auto", "--memory-budget", "auto"]
    stopping = code + AT_A_STEP.format(what="os.kill(os.getpid(), signal.SIGTERM)")
    end_together(cli.processes(words, code=stopping), 130)
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["heads"]["blocks"] == [1]
    assert recipe["micro_batch"] or recipe["checkpointing"]  # the smaller memory decided
    goes_on(cli.processes(words, code=code), 6)
