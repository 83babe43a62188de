from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from mim_refiner.errors import RunFolderError
from mim_refiner.files import atomic_file, atomic_folder, write_json
from mim_refiner.training import state
from mim_refiner.training.recipe import override
from mim_refiner.training.recipes import tiny
from mim_refiner.training.state import Position, RunFolder

RECIPE = {"name": "tiny", "heads": {"blocks": [1, 2]}, "batch_size": 8}


def open_run(path: Path, recipe: dict[str, object] | None = None, *, overwrite: bool = False) -> RunFolder:
    return RunFolder(path, recipe or RECIPE, overwrite=overwrite)


def make_module(value: float) -> nn.Module:
    module = nn.Linear(2, 2)
    nn.init.constant_(module.weight, value)
    return module


def test_save_and_restore_give_back_weights_optimizer_and_position(tmp_path: Path) -> None:
    run, module = open_run(tmp_path / "run"), make_module(3.0)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    run.save(Position(1, 5, 25), {"model": module}, optimizer)
    other = make_module(0.0)
    position, state = run.restore({"model": other})
    assert position == Position(1, 5, 25)
    assert run.notes == []
    assert torch.equal(other.weight, module.weight)
    assert state is not None
    assert torch.equal(state["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert (tmp_path / "run" / "checkpoints" / "last" / "state.json").exists()


@pytest.mark.parametrize("name", ["run-\udcff", "run\0"])
def test_a_path_that_safetensors_cannot_write_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunFolderError, match="not valid UTF-8 text; choose another --out"):
        open_run(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncate", "remove", "no_state", "other_step"])
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path: Path, damage: str) -> None:
    run = open_run(tmp_path / "run")
    run.save(Position(0, 1, 1), {"model": make_module(1.0)}, None)
    last = run.save(Position(0, 2, 2), {"model": make_module(2.0)}, None)
    if damage == "truncate":
        os.truncate(last / "model.safetensors", 20)
    elif damage == "other_step":
        state = last / "state.json"
        state.write_text(state.read_text().replace('"step": 2', '"step": 3'))
    else:
        (last / ("model.safetensors" if damage == "remove" else "state.json")).unlink()
    module = make_module(0.0)
    position, _ = run.restore({"model": module})
    assert position.total_step == 1
    assert module.weight[0, 0].item() == 1.0
    assert len(run.notes) == 1
    assert "step-000002 is damaged" in run.notes[0]


def test_moments_saved_on_another_device_load_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file says "cuda:1", as one of the second rank of a GPU run does, and this machine may have no such device."""
    run, module = open_run(tmp_path / "run"), make_module(3.0)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")
        run.save(Position(0, 1, 1), {"model": module}, optimizer)
    _, state = run.restore({"model": make_module(0.0)})
    assert state is not None
    moments = state["state"][0]["exp_avg"]
    assert moments.device == torch.device("cpu")
    assert torch.equal(moments, optimizer.state_dict()["state"][0]["exp_avg"])


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    for step in range(1, 5):
        run.save(Position(0, step, step), {"model": make_module(step)}, None)
    assert sorted(p.name for p in run.checkpoints.glob("step-*")) == ["step-000003", "step-000004"]
    assert run.last.resolve().name == "step-000004"


def test_a_run_of_more_than_a_million_steps_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    for step in (999_998, 999_999, 1_000_000):
        run.save(Position(0, step, step), {"model": make_module(1.0)}, None)
    assert sorted(p.name for p in run.checkpoints.glob("step-*")) == ["step-1000000", "step-999999"]
    assert run.restore({"model": make_module(0.0)})[0].total_step == 1_000_000


def test_metrics_after_the_restored_step_are_forgotten(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.save(Position(0, 2, 2), {"model": make_module(1.0)}, None)
    for step in (1, 2, 3):
        run.log({"total_step": step})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"total_step": 4')  # killed while writing
    run.restore({"model": make_module(0.0)})
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["total_step"] for line in lines] == [1, 2]


def test_the_same_recipe_resumes_and_another_is_refused_with_the_difference(tmp_path: Path) -> None:
    open_run(tmp_path / "run")
    assert open_run(tmp_path / "run").resumed
    changed = {**RECIPE, "batch_size": 16}
    with pytest.raises(RunFolderError, match="batch_size: 8 there, 16 now"):
        open_run(tmp_path / "run", changed)
    assert not open_run(tmp_path / "run", changed, overwrite=True).resumed


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="not a run folder"):
        open_run(tmp_path)
    with pytest.raises(RunFolderError, match="not a run folder"):
        open_run(tmp_path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_unwritable_place_is_one_clear_line(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(RunFolderError, match=f"{blocker} is a file; choose another --out"):
        open_run(blocker / "run")
    with pytest.raises(RunFolderError, match=f"{blocker} is a file; choose another --out"):
        state.refuse_place(blocker / "runs" / "out")  # before anything slow is done


def test_a_folder_that_takes_no_files_is_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda place, mode: Path(place) != tmp_path)
    with pytest.raises(RunFolderError, match=f"{tmp_path} cannot be written; choose another --out"):
        state.refuse_place(tmp_path / "new" / "run")
    monkeypatch.undo()
    state.refuse_place(tmp_path / "new" / "run")
    with pytest.raises(RunFolderError, match=r"cannot write the run folder \(File name too long\); choose a writable"):
        state.refuse_place(tmp_path / ("a" * 300))


def test_a_folder_that_cannot_be_looked_into_is_not_begun_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photo.jpg").touch()

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(RunFolderError, match="Permission denied"):
        open_run(tmp_path)
    assert os.listdir(tmp_path) == ["photo.jpg"]


def test_a_write_cut_short_is_a_full_disk(tmp_path: Path) -> None:
    with (
        pytest.raises(RunFolderError, match=r"the disk is full.; make room there, or choose"),
        atomic_file(tmp_path / "a.npy"),
    ):
        raise OSError("307200 requested and 211936 written")  # numpy's tofile
    with pytest.raises(RunFolderError, match=r"No space left on device.; make room there"), atomic_file(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_write_json_replaces_whole_files(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_settings_that_change_no_result_may_differ_on_resume(tmp_path: Path) -> None:
    first = {"micro_batch": None, "workers": 4, "checkpoint_every": 10, "guard": {"enabled": True, "patience": 2}}
    open_run(tmp_path / "run", {**RECIPE, **first})
    other = {"micro_batch": 2, "workers": 0, "checkpoint_every": 99, "guard": {"enabled": False, "patience": 9}}
    assert open_run(tmp_path / "run", {**RECIPE, **other}).resumed


SAME = {  # a run, and the same in other words
    "adapter off": (["adapter=none"], ["adapter=none", "lora.rank=4"]),
    "no guidance": (["guidance=none", "guidance_share=0.5"], ["guidance=none"]),
    "no colours": (["views.jitter_prob=0"], ["views.jitter_prob=0", "views.jitter=[0, 0, 0, 0]"]),
    "no neighbours": (["heads.swap_positive=false"], ["heads.swap_positive=false", "refinement.top_k=3"]),
    "each head": (["heads.blocks=[0, 1]"], ["heads.blocks=[0, 1]", "heads.temperature=[0.2, 0.2]"]),
    "a square": (["views.local_size=16"], ["views.local_size=16x16"]),
}
OTHER = {
    "adapter on": (["adapter=lora"], ["adapter=lora", "lora.rank=4"], "lora.rank: 8 there, 4 now"),
    "adapter gone": (["adapter=lora", "lora.rank=4"], ["adapter=none"], "adapter: lora there, none now"),
    "a sweep": (["sweep.temperatures=[0.1, 0.3]"], None, "heads.temperature: 0.2 there, 0.3 now"),
    "not each": (["heads.blocks=[0, 1]"], ["heads.blocks=[0, 1]", "heads.temperature=[0.2, 0.1]"], "heads.temperature"),
}


@pytest.mark.parametrize("name", [*SAME, *OTHER])
def test_the_same_run_in_other_words_is_no_other_recipe(tmp_path: Path, name: str) -> None:
    first, then, message = SAME[name] + ("",) if name in SAME else OTHER[name]
    one = override(tiny(), first)
    other = override(tiny(), then) if then else one.model_copy(deep=True)
    if not then:
        other.heads.temperature = 0.3  # as the sweep chose
    for made, again in ((one, other), (other, one)):
        open_run(tmp_path / "run", made.model_dump(mode="json"), overwrite=True)
        if message:
            with pytest.raises(RunFolderError, match="another recipe" if made is other else re.escape(message)):
                open_run(tmp_path / "run", again.model_dump(mode="json"))
        else:
            assert open_run(tmp_path / "run", again.model_dump(mode="json")).resumed


def test_skipped_batches_are_remembered(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    assert run.skipped == []
    run.skip(1, 17)
    assert open_run(tmp_path / "run").skipped == [(1, 17)]


def test_what_another_process_wrote_since_the_folder_was_looked_at_is_not_deleted_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = state.hold

    def late(folder: Path, holder: object) -> None:
        (folder / "metrics.jsonl").write_text("of another\n")
        hold(folder, holder)

    monkeypatch.setattr(state, "hold", late)
    open_run(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "of another\n"


def test_leftovers_of_a_killed_write_are_cleared_away(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    run.save(Position(0, 1, 1), {"model": make_module(1.0)}, None)
    (run.checkpoints / ".step-000002.tmp").mkdir()
    (run.checkpoints / ".step-000002.tmp" / "model.safetensors").write_bytes(b"half")
    (run.checkpoints / ".last.tmp").symlink_to("step-000002")
    open_run(tmp_path / "run")
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["last", "step-000001"]


def test_a_folder_that_a_killed_run_had_moved_aside_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two renames of a swap: the old one is whole, the new one has no name yet."""
    run = open_run(tmp_path / "run")
    with atomic_folder(run.checkpoints / "best") as folder:
        (folder / "encoder").write_text("old")
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.name.endswith(".new.tmp"):
            raise SystemExit(9)
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # a kill cleans nothing
        with pytest.raises(SystemExit), atomic_folder(run.checkpoints / "best") as folder:
            (folder / "encoder").write_text("new")
    assert not (run.checkpoints / "best").exists()
    open_run(tmp_path / "run")
    assert (run.checkpoints / "best" / "encoder").read_text() == "old"
    assert not list(run.checkpoints.glob(".*"))


@pytest.mark.parametrize(("overwrite", "advice"), [(False, "then the same command r"), (True, "without --overwrite r")])
def test_a_disk_that_refuses_is_one_clear_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool, advice: str
) -> None:
    from safetensors import SafetensorError

    run = open_run(tmp_path / "run", overwrite=overwrite)
    run.save(Position(0, 1, 1), {"model": make_module(1.0)}, None)
    for error in (
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: StorageFull"),
        RuntimeError("pos 4"),
    ):

        def refuse(tensors: object, path: Path, error: Exception = error) -> None:
            path.write_bytes(b"half")
            raise error

        monkeypatch.setattr(state, "save_file", refuse)
        with pytest.raises(RunFolderError, match=r"cannot write the checkpoint .*free space") as caught:
            run.save(Position(0, 2, 2), {"model": make_module(2.0)}, None)
        assert "\n" not in str(caught.value)
        assert f"{advice}esumes from the checkpoint before" in str(caught.value)
        assert sorted(path.name for path in run.checkpoints.iterdir()) == ["last", "step-000001"]
        assert run.last.resolve().name == "step-000001"


def test_the_seconds_of_a_run_are_those_of_all_its_processes(tmp_path):
    first = open_run(tmp_path / "run")
    first.began -= 100  # as if it had begun then
    first.save(Position(0, 1, 1), {"model": make_module(1.0)}, None)
    assert first.seconds == pytest.approx(100, abs=5)
    del first
    second = open_run(tmp_path / "run")
    second.began -= 10
    for _ in range(2):  # going back to the checkpoint once more counts nothing twice
        second.restore({"model": make_module(0.0)})
        assert second.seconds == pytest.approx(110, abs=5)
