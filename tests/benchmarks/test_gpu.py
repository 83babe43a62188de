"""``benchmarks/gpu.py --dry-run``: every part at toy size on the CPU, as it will run where a GPU is."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quick import HERE, quickly
from safetensors.torch import load_file

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    with quickly():
        yield gpu


@pytest.fixture
def options(gpu: Any, tmp_path: Path) -> argparse.Namespace:
    parsed = gpu.parse(["--dry-run", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")])
    parsed.out.mkdir()
    return parsed


@pytest.fixture
def forked_commands(gpu: Any, forked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands that parts start are forks, one at a time."""
    import gpu_train

    def start(words: list[str], **_: object) -> Any:
        assert words[1:3] == ["-m", "mim_refiner"]
        return Waiting(forked(f"{HERE}import sys\nfrom mim_refiner.cli.app import main\nsys.exit(main({words[3:]!r}))"))

    fake = SimpleNamespace(Popen=start, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(gpu_train, "subprocess", fake)


class Waiting:
    """A forked command with the one method that is called otherwise than Popen's."""

    def __init__(self, started: Any) -> None:
        self.started = started

    def wait(self, seconds: float) -> int | None:
        return self.started.returncode

    def __getattr__(self, name: str) -> Any:
        return getattr(self.started, name)


def read(options: argparse.Namespace, part: str) -> dict[str, Any]:
    return json.loads((options.out / f"{part}.json").read_text())


def test_check_compares_everything_and_finds_no_difference(gpu: Any, options: argparse.Namespace) -> None:
    gpu.run_part("check", options, 60)
    found = read(options, "check")
    assert found["finished"]
    assert found["failed"] == []
    names = " ".join(found["checks"])
    for word in (
        "golden loss",
        "golden queue",
        "golden k-NN",
        "photometrics",
        "cached against plain",
        "resumed on the",
    ):
        assert word in names


def test_a_difference_is_named_and_what_was_found_before_it_is_kept(
    gpu: Any, options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_check

    def wrong(train_x: torch.Tensor, train_y: torch.Tensor, test_x: torch.Tensor, **given: Any) -> torch.Tensor:
        return torch.zeros(len(test_x), dtype=torch.long) + int(test_x.shape[0] == 500)

    monkeypatch.setattr(gpu_check, "knn_predict", wrong)
    monkeypatch.setattr(gpu_check, "check_resume", lambda checks, device: None)
    with pytest.raises(AssertionError, match="golden k-NN"):
        gpu.run_part("check", options, 60)
    found = read(options, "check")
    assert not found["finished"]
    assert found["failed"] == ["golden k-NN"]
    assert "golden k-NN" in found["error"]
    assert found["passed"] > 10


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own
def test_vit_measures_plain_cached_checkpointed_and_compiled_steps(gpu: Any, options: argparse.Namespace) -> None:
    gpu.run_part("vit_b", options, 300)
    found = read(options, "vit_b")
    assert found["finished"]
    assert set(found["steps"]) == {
        "plain, largest batch", "cached, 16", "cached, 16, graphs kept", "cached, 8", "selective, 8",
        "checkpointing, 8", "plain, largest batch, compiled", "cached, 16, compiled",
    }  # fmt: skip
    for line in found["steps"].values():
        assert line["images_per_s"] == pytest.approx(line["batch"] / line["seconds"])
        assert 0 < line["share_of_matrix_rate"] < 1
        assert line["planned_bytes"] > 1e5
    assert found["graphs"]["fallbacks"] == {}


def test_a_part_whose_box_is_over_measures_no_more(gpu: Any, options: argparse.Namespace) -> None:
    gpu.run_part("vit_b", options, 0)
    assert {"skipped": "the box is over"} in read(options, "vit_b")["steps"].values()


def test_profile_tells_the_dearest_and_the_number_of_operators(gpu: Any, options: argparse.Namespace) -> None:
    gpu.run_part("profile", options, 60)
    found = read(options, "profile")
    step = found["vit_l, batch 8, cached by 4"]
    assert step["operators"] > 500
    assert step["dearest"][0]["ms"] >= step["dearest"][-1]["ms"] > 0
    assert step["launches"] == 0  # no GPU here


@pytest.mark.slow
@pytest.mark.usefixtures("forked_commands")
def test_small_measures_the_command_with_its_data(gpu: Any, options: argparse.Namespace) -> None:
    """As the process of the part itself is called."""
    words = ["--dry-run", "--out", str(options.out), "--work", str(options.work), "--child", "small"]
    assert gpu.main([*words, "--box", "small=250"]) == 0
    found = read(options, "small")
    assert found["finished"]
    assert found["steps"]["refine with data, 16"]["phase"] == "refinement"
    assert found["steps"]["refine with data, 16"]["images_per_s"] > 1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("forked_commands")
def test_training_goes_on_where_its_box_ended_and_its_weights_become_an_encoder(
    gpu: Any, options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_train

    options.decoders = "1x16"
    stop = gpu_train.Command.stop

    def at_once(self: Any, end: float, lines: int) -> dict[str, Any]:  # in place of watching: the stage is over
        while self.running and not self.metrics():
            pass
        stop(self)
        return {}

    with monkeypatch.context() as patched:
        patched.setattr(gpu_train.Command, "speed", at_once)
        gpu.run_part("train", options, 2000)
    assert "mae: run the same call again" in read(options, "train")["unfinished"]
    assert not list(options.out.glob("*.safetensors"))
    gpu.run_part("train", options, 2000)
    found = read(options, "train")
    assert found["unfinished"] == ""
    epochs = [line["epoch"] for line in found["mae-1x16"]["curve"]]
    assert epochs == sorted(epochs)
    assert epochs[-1] == 2
    metrics = {(record["metric"], record["block"]) for record in found["evaluation-1x16"]}
    assert {("knn_top1", 0), ("knn_top1", 1), ("linear_top1", 1)} <= metrics

    import mim_refiner

    gpu_train.unpack(options.out, tmp_path / "encoders")
    ours = load_file(options.work / "refined-1x16" / "export" / "model.safetensors")
    backbone = mim_refiner.load_backbone(str(tmp_path / "encoders" / "refined-1x16"))
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, ours[name].bfloat16().float()), name
    assert backbone.info.family == "mae"
    gpu.run_part("train", options, 1)  # nothing is left to do
    assert read(options, "train")["unfinished"] == ""


def test_pack_and_keep_cut_data_into_pieces_without_loss(gpu: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        bytes([number]) * 1000 + torch.randint(256, (1000,), dtype=torch.uint8).numpy().tobytes()
        for number in range(90)
    ]
    for number in range(2):
        part = pa.table({"image": rows[45 * number : 45 * number + 45], "label": list(range(45))})
        pq.write_table(part.replace_schema_metadata({"class_names": "[]"}), tmp_path / f"some_train-{number}.parquet")
    pieces = gpu.pack(str(tmp_path / "some_train-*.parquet"), tmp_path / "pieces", 0.05)
    assert len(pieces) > 1
    assert all(piece.stat().st_size < 60_000 for piece in pieces)
    folder = gpu.keep(pieces[:1], tmp_path / "work")
    gpu.keep(pieces[1:], tmp_path / "work")
    kept = pa.concat_tables(pq.read_table(piece) for piece in sorted(folder.glob("train-*.parquet")))
    assert kept["image"].to_pylist() == rows
    assert kept.schema.metadata[b"class_names"] == b"[]"


def test_a_part_that_outlives_its_box_is_ended(gpu: Any, options: argparse.Namespace, capfd: Any) -> None:
    words = ["--dry-run", "--out", str(options.out), "--work", str(options.work)]
    assert not gpu.run_apart("check", options, words, 0.05)
    assert "are over" in capfd.readouterr().err


def test_a_part_that_has_finished_and_not_left_yet_ended_well(
    gpu: Any, options: argparse.Namespace, tmp_path: Path, monkeypatch: Any
) -> None:
    script, file = tmp_path / "part.py", options.out / "small.json"
    script.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(gpu, "__file__", str(script))
    file.write_text('{"finished": true}')
    for written, well in ((0.0, False), (time.time() + 60, True)):  # by an earlier call; by this one
        os.utime(file, (written, written))
        assert gpu.run_apart("small", options, [], 0.05) is well


def test_whether_a_part_ended_well_is_told(
    gpu: Any, options: argparse.Namespace, tmp_path: Path, monkeypatch: Any
) -> None:
    script = tmp_path / "part.py"
    call = ["--child", "small", "--box", f"small={gpu.BOXES['small']}"]
    script.write_text(f"import sys; sys.exit(sys.argv[-4:] != {call})")
    monkeypatch.setattr(gpu, "__file__", str(script))
    words = ["--dry-run", "--out", str(options.out), "--work", str(options.work), "--parts"]
    assert gpu.main([*words, "small"]) == 0
    assert gpu.main([*words, "small,check"]) == 1


def test_what_a_run_leaves_in_the_checkout_is_ignored_by_git(gpu: Any) -> None:
    options, ignored = gpu.parse([]), (BENCHMARKS.parent / ".gitignore").read_text().splitlines()
    assert {f"{options.out}/", f"{options.work}/"} <= set(ignored)


def test_unknown_parts_are_refused(gpu: Any) -> None:
    with pytest.raises(SystemExit, match="unknown vit_x"):
        gpu.main(["--parts", "check,vit_x"])
