"""Run folders in other hands: two runs at once, moved and grown data, files damaged in any way, leftovers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from torch import nn

from mim_refiner.errors import RunFolderError
from mim_refiner.training.lock import LOCK
from mim_refiner.training.state import SKIPS, Position, RunFolder

RECIPE = {
    "name": "tiny",
    "data": "photos",
    "data_fingerprint": "aa",
    "data_images": 96,
    "model": "m",
    "model_sha256": "w",
}
HOLD = """
import time
from pathlib import Path
from mim_refiner.training.state import RunFolder
run = RunFolder({path!r}, {{"name": "tiny"}}, overwrite=False)
Path({path!r} + "-held").touch()
while Path({path!r} + "-held").exists():
    time.sleep(0.01)
"""


def open_run(path, recipe=None, *, overwrite=False, **changes):
    return RunFolder(path, {**(recipe or RECIPE), **changes}, overwrite=overwrite)


@pytest.fixture
def held(tmp_path, forked):
    """A run folder that another process writes into as long as the file beside it is there."""
    path = tmp_path / "run"
    process = forked(HOLD.format(path=str(path)))
    while not path.with_name("run-held").exists():
        assert process.poll() is None, process.said()
        time.sleep(0.01)
    yield path, process
    path.with_name("run-held").unlink(missing_ok=True)
    process.wait()


def test_a_second_run_in_the_same_folder_is_refused(held):
    path, process = held
    for overwrite in (False, True):
        with pytest.raises(RunFolderError, match=rf"a run is writing here \(process {process.pid} on .*, since 20"):
            RunFolder(path, {"name": "tiny"}, overwrite=overwrite)
    assert (path / "recipe.yaml").exists()
    path.with_name("run-held").unlink()
    process.wait()
    assert not (path / LOCK).exists()
    assert RunFolder(path, {"name": "tiny"}, overwrite=False).resumed


def test_the_lock_of_a_killed_run_is_stale(held):
    path, process = held
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (path / LOCK).exists()
    run = RunFolder(path, {"name": "tiny"}, overwrite=False)
    assert json.loads((path / LOCK).read_text())["process"] == os.getpid()
    del run
    assert not (path / LOCK).exists()


def test_a_folder_with_nothing_but_a_lock_is_new(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_text("")
    assert not open_run(tmp_path / "run").resumed


def test_the_data_are_known_by_fingerprint_and_not_by_path(tmp_path):
    open_run(tmp_path / "run")
    assert open_run(tmp_path / "run", data="/scratch/job2/photos/", model="./m", exclude="x.txt").resumed
    with pytest.raises(RunFolderError, match="the data has changed: 96 images then, 166 now"):
        open_run(tmp_path / "run", data_fingerprint="bb", data_images=166)
    with pytest.raises(RunFolderError, match="96 images then, 96 now, and they are not the same"):
        open_run(tmp_path / "run", data_fingerprint="bb")
    with pytest.raises(RunFolderError, match="the model has changed"):
        open_run(tmp_path / "run", model_sha256="v")


def test_leftovers_of_killed_writes_are_swept(tmp_path):
    run = open_run(tmp_path / "run")
    for name in (
        ".export.7.new.tmp",
        "checkpoints/.step-000001.9.old.tmp",
        "evaluation/.x",
    ):
        (run.path / name).mkdir(parents=True)
        (run.path / name / "file").write_text("half")
    for name in (".summary.json.77.tmp", "evaluation/.blocks.json.7.tmp"):
        (run.path / name).write_text("half")
    open_run(tmp_path / "run")
    assert {str(each.relative_to(run.path)) for each in run.path.rglob(".*")} <= {LOCK, "evaluation/.x"}


def saved(path) -> tuple[RunFolder, nn.Module]:
    run, module = open_run(path), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    for step in (1, 2):
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        run.log({"total_step": step, "loss": 1.0})
        run.save(Position(0, step, step), {"model": module}, optimizer)
    run.skip(0, 7)
    return run, module


@pytest.mark.parametrize(
    "line",
    [b"\0" * 30, b"{", b"[1]", b'{"total_step": "x"}', b'{"total_step": null}', b"\xff\xfe", b"[" * 9000, b"9" * 9000],
)  # fmt: skip
def test_a_damaged_line_of_the_log_costs_that_line(tmp_path, line):
    run, module = saved(tmp_path / "run")
    path = run.path / "metrics.jsonl"
    first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, line, second, b""]))
    run = open_run(tmp_path / "run")
    position, _ = run.restore({"model": module})
    assert position.total_step == 2
    assert run.notes == ["metrics.jsonl: left out: 1 damaged line"]
    assert path.read_bytes().splitlines() == [first, second]


@pytest.mark.parametrize("content", ["", "{", "7", "[[1]]", '[["a", 1]]', "[" * 9000, '{"a": 1}', "[1, 2]"])
def test_a_damaged_list_of_skipped_batches_costs_the_list(tmp_path, content):
    saved(tmp_path / "run")
    (tmp_path / "run" / SKIPS).write_text(content)
    run = open_run(tmp_path / "run")
    assert run.skipped == []
    assert "skipped_batches.json is damaged" in run.notes[0]


@pytest.mark.parametrize(
    "content", ["", "7", "- a", "\0", "{", "a: &x [*x]", "a: " + "[" * 9000, "a: !!python/name:os.system", b"\xff"]
)
def test_a_damaged_recipe_is_one_line(tmp_path, content):
    saved(tmp_path / "run")
    path = tmp_path / "run" / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunFolderError, match=r"recipe\.yaml: cannot be read .*--overwrite") as caught:
        open_run(tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not open_run(tmp_path / "run", overwrite=True).resumed


def test_any_damage_to_a_run_folder_is_survived_or_one_line(tmp_path, damaged, fuzz_rounds):
    _, module = saved(tmp_path / "whole")
    for seed in range(fuzz_rounds):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "run", symlinks=True)
        files = sorted(path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != LOCK)
        generator = np.random.default_rng(seed)
        path = files[int(generator.integers(0, len(files)))]
        path.write_bytes(damaged(path.read_bytes(), generator))
        try:
            position, _ = open_run(tmp_path / "run").restore({"model": module})
        except RunFolderError as error:
            assert path.name == "recipe.yaml", error  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert position.total_step >= 1


def test_a_checkpoint_of_another_model_is_one_line(tmp_path):
    saved(tmp_path / "run")
    with pytest.raises(RunFolderError, match=r"step-000002: cannot be read .*remove this checkpoint"):
        open_run(tmp_path / "run").restore({"model": nn.Linear(3, 3)})


def test_a_state_that_points_elsewhere_reads_nothing_else(tmp_path):
    _, module = saved(tmp_path / "run")
    from mim_refiner.training.state import _digest

    for name in ("/dev/zero", "../../recipe.yaml", "state.json/.."):
        state = tmp_path / "run/checkpoints/step-000002/state.json"
        content = json.loads(state.read_text())
        content.pop("digest")
        content["sha256"] = {name: "00"}
        state.write_text(json.dumps({**content, "digest": _digest(content)}))
        run = open_run(tmp_path / "run")
        position, _ = run.restore({"model": module})
        assert position.total_step == 1
        assert "step-000002 is damaged" in run.notes[0]
