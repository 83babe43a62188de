"""embed: the rows are the encoder's features, whatever the file; an interruption changes no byte."""

from __future__ import annotations

import csv
import errno
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from mim_refiner import embed
from mim_refiner.cli.app import main
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError, InputError, RunFolderError
from mim_refiner.evaluation import embedding
from mim_refiner.evaluation.features import extract_features
from mim_refiner.export.timm import export_timm
from mim_refiner.models.backbone import Backbone, create_vit
from mim_refiner.reporting import Reporter

COUNT = 43  # images; not a multiple of the batch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "vit"
    export_timm(Backbone.wrap(create_vit("vit_w32_d3_h4_p8", 16), family="mae", licence="MIT"), folder)
    return folder


def write_parquet(path: Path, count: int, *, group: int = 10, labels: bool = True) -> Path:
    rng = np.random.default_rng(0)
    images = [encode(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]
    columns: dict[str, Any] = {"image": pa.array(images, pa.binary())}
    if labels:
        columns["label"] = pa.array([number % 3 for number in range(count)], pa.int64())
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def encode(pixels: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("data") / "images.parquet", COUNT)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A folder of 30 images of which two are broken."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for number in range(30):
        content = encode(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        (folder / f"{number:02d}.png").write_bytes(b"broken" if number in (5, 29) else content)
    return folder


def read(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".safetensors":
        with safe_open(path, framework="numpy") as file:
            return file.get_tensor("features")
    return np.array(pq.read_table(path).column("features").to_pylist(), dtype=np.float32)


def expected(model: Path, data: Path, block: int, pooling: str, *, norm: bool = False) -> torch.Tensor:
    """The tested feature extraction of evaluate, or for patches the encoder itself, in the same batches of 8."""
    from mim_refiner import load_backbone
    from mim_refiner.data.loaders import eval_batches
    from mim_refiner.data.photometric import normalize

    backbone, images = load_backbone(model), ImageSet(open_source(str(data)))
    if pooling != "patches":
        features = extract_features(backbone, images, blocks=[block], poolings=[pooling], norm=norm, batch_size=8)
        return features[block, pooling]
    rows = []
    with torch.inference_mode():
        for batch, _ in eval_batches(images, 16, 8):
            inputs = normalize(batch, backbone.info.mean, backbone.info.std)
            rows.append(backbone.forward_blocks(inputs, [block], norm=norm)[0].patches)
    return torch.cat(rows)


@pytest.mark.parametrize("ending", [".parquet", ".npy", ".safetensors"])
@pytest.mark.parametrize(("block", "pooling", "norm"), [(-1, "cls", False), (1, "mean", True), (0, "patches", False)])
def test_rows_are_the_features_in_the_order_of_the_data(model, data, tmp_path, ending, block, pooling, norm):
    out = tmp_path / f"features{ending}"
    options: dict[str, Any] = {"block": block, "pooling": pooling, "norm": norm, "batch_size": 8}
    result = embed(model=str(model), data=str(data), out=str(out), device="cpu", **options)
    rows = read(out)
    torch.testing.assert_close(torch.from_numpy(rows), expected(model, data, block, pooling, norm=norm), rtol=0, atol=0)
    assert rows.shape == ((COUNT, 4, 32) if pooling == "patches" else (COUNT, 32))
    assert (result["rows"], result["unreadable"]) == (COUNT, 0)
    assert result["images_per_s"] > 0
    names = [path.name for path in sorted(tmp_path.iterdir())]
    beside = [] if ending == ".parquet" else [f"features{ending}.rows.csv"]
    assert names == [f"features{ending}", f"features{ending}.manifest.json", *beside]  # no parts left


def test_every_row_says_which_image_it_is(model, data, tmp_path):
    arguments: dict[str, Any] = {"model": str(model), "data": f"{data}[10:20]", "device": "cpu"}
    embed(out=str(tmp_path / "a.parquet"), **arguments)
    embed(out=str(tmp_path / "a.safetensors"), **arguments)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column("index").to_pylist() == list(range(10))
    assert table.column("name").to_pylist() == [f"images.parquet[{number}]" for number in range(10, 20)]
    assert table.column("label").to_pylist() == [number % 3 for number in range(10, 20)]
    with (tmp_path / "a.safetensors.rows.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[:2] == [["row", "index", "name", "label"], ["0", "0", "images.parquet[10]", "1"]]
    assert len(rows) == 11
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.get_tensor("index").tolist() == list(range(10))
        assert file.get_tensor("label").tolist() == [number % 3 for number in range(10, 20)]
        assert json.loads(file.metadata()["mim_refiner"])["pooling"] == "cls"


def test_the_manifest_says_what_the_rows_are(model, data, tmp_path):
    from mim_refiner import load_backbone
    from mim_refiner.core.identity import weights_sha256

    out = tmp_path / "a.parquet"
    result = embed(model=str(model), data=str(data), out=str(out), block=-2, norm=True, device="cpu")
    manifest = json.loads(Path(result["manifest"]).read_text())
    known = {
        "model_sha256": weights_sha256(load_backbone(model).model),
        "model": str(model),
        "family": "mae",
        "licence": "MIT",
        "block": 1,
        "pooling": "cls",
        "norm": True,
        "precision": "fp32",
        "dtype": "float32",
        "images": COUNT,
        "rows": COUNT,
        "shape": [COUNT, 32],
        "unreadable": [],
        "file": "a.parquet",
        "bytes": out.stat().st_size,
    }
    assert manifest | known == manifest
    assert manifest["transform"] | {"center_crop": 16, "interpolation": "bicubic"} == manifest["transform"]
    stored = json.loads(pq.read_schema(out).metadata[b"mim_refiner"])
    assert stored | {"block": 1, "model_sha256": known["model_sha256"]} == stored


def test_unreadable_images_have_no_row_and_are_listed(model, damaged, tmp_path):
    out = tmp_path / "a.npy"
    said: list[str] = []

    class Listener(Reporter):
        def message(self, text: str) -> None:
            said.append(text)

    result = embed(model=str(model), data=str(damaged), out=str(out), batch_size=2, device="cpu", reporter=Listener())
    assert (result["rows"], result["unreadable"]) == (28, 2)
    manifest = json.loads(Path(result["manifest"]).read_text())
    assert [(item["index"], item["name"]) for item in manifest["unreadable"]] == [(5, "05.png"), (29, "29.png")]
    with (tmp_path / "a.npy.rows.csv").open() as file:
        names = [row["name"] for row in csv.DictReader(file)]
    assert names == [f"{number:02d}.png" for number in range(30) if number not in (5, 29)]
    assert any("2 of 30 images" in text and "(05.png: not an image file" in text and "no row" in text for text in said)
    torch.testing.assert_close(torch.from_numpy(np.load(out)), expected(model, damaged, -1, "cls"), rtol=0, atol=1e-6)


KILLED = """
import os, signal
from mim_refiner.commands.embed import embed
from mim_refiner.reporting import Reporter

class Kill(Reporter):
    def progress(self, step, metrics):
        if step >= 24:  # 16 images are noted as finished, more are computed
            os.kill(os.getpid(), signal.SIGKILL)

embed(model={model!r}, data={data!r}, out={out!r}, batch_size=2, device="cpu", reporter=Kill())
"""


def test_killed_and_restarted_the_bytes_are_those_of_an_uninterrupted_run(model, damaged, tmp_path, forked):
    whole, out = tmp_path / "whole" / "f.parquet", tmp_path / "killed" / "f.parquet"
    words = ["--model", str(model), "--data", str(damaged), "--batch-size", "2", "--device", "cpu", "--quiet"]
    assert main(["embed", *words, "--out", str(whole)]) == 0
    killed = forked(KILLED.format(model=str(model), data=str(damaged), out=str(out)))
    assert killed.returncode == -signal.SIGKILL, killed.said()
    parts = out.with_name(out.name + ".parts")
    assert sorted(path.name for path in parts.iterdir()) == ["done.json", "features.npy", "settings.json"]
    assert json.loads((parts / "done.json").read_text())["done"] == 16
    assert not out.exists()
    seen: list[int] = []

    class Steps(Reporter):
        def progress(self, step: int, metrics: Any) -> None:
            seen.append(step)

    embed(model=str(model), data=str(damaged), out=str(out), batch_size=2, device="cpu", reporter=Steps())
    assert seen[0] == 18
    names = sorted(path.name for path in whole.parent.iterdir())
    assert sorted(path.name for path in out.parent.iterdir()) == names
    for name in names:
        assert (out.parent / name).read_bytes() == (whole.parent / name).read_bytes(), name


def test_a_finished_file_is_left_alone_and_other_settings_are_refused(model, data, tmp_path):
    out = tmp_path / "a.npy"
    arguments: dict[str, Any] = {"model": str(model), "data": str(data), "out": str(out), "device": "cpu"}
    embed(**arguments)
    before = out.stat().st_mtime_ns
    again = embed(**arguments)
    assert (out.stat().st_mtime_ns, again["images_per_s"], again["rows"]) == (before, None, COUNT)
    with pytest.raises(RunFolderError, match=r"other settings \(block: 2 there, 0 now.*--overwrite"):
        embed(**arguments, block=0)
    with pytest.raises(RunFolderError, match="data_fingerprint"):
        embed(**{**arguments, "data": f"{data}[:20]"})
    assert out.stat().st_mtime_ns == before
    assert embed(**arguments, block=0, overwrite=True)["block"] == 0
    (tmp_path / "foreign.npy").write_bytes(b"x")
    with pytest.raises(RunFolderError, match="is not the work of embed"):
        embed(**{**arguments, "out": str(tmp_path / "foreign.npy")})
    assert (tmp_path / "foreign.npy").read_bytes() == b"x"


def test_interrupted_parts_serve_the_same_settings_only(model, data, tmp_path):
    out = tmp_path / "a.safetensors"

    class Stop(Reporter):
        said = ""

        def progress(self, step: int, metrics: Any) -> None:
            if step >= 24:
                raise KeyboardInterrupt

        def message(self, text: str) -> None:
            self.said = text

    stop = Stop()
    arguments: dict[str, Any] = {"model": str(model), "data": str(data), "out": str(out), "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        embed(**arguments, batch_size=2, reporter=stop)
    assert stop.said == f"{out}.parts holds what is finished; the same command goes on from there"
    with pytest.raises(RunFolderError, match="batch_size: 2 there, 4 now"):
        embed(**arguments, batch_size=4)
    assert embed(**arguments, batch_size=2)["rows"] == COUNT
    continued = out.read_bytes()
    stop.said = ""
    with pytest.raises(KeyboardInterrupt):
        embed(**arguments, batch_size=2, overwrite=True, reporter=stop)
    assert "goes on from there" not in stop.said  # that command begins anew
    embed(**arguments, batch_size=2, overwrite=True)
    assert out.read_bytes() == continued


@pytest.mark.parametrize("damaged_file", ["features.npy", "done.json"])
def test_damaged_rows_are_computed_again(model, data, tmp_path, damaged_file):
    arguments: dict[str, Any] = {"model": str(model), "data": str(data), "device": "cpu", "batch_size": 2}

    class Stop(Reporter):
        def progress(self, step: int, metrics: Any) -> None:
            if step >= 40:
                raise KeyboardInterrupt

    out = tmp_path / "a.npy"
    with pytest.raises(KeyboardInterrupt):
        embed(out=str(out), **arguments, reporter=Stop())
    part = out.with_name("a.npy.parts") / damaged_file
    part.write_bytes(part.read_bytes()[:-40])
    embed(out=str(out), **arguments)
    torch.testing.assert_close(torch.from_numpy(np.load(out)), expected(model, data, -1, "cls"), rtol=0, atol=1e-6)


def test_memory_does_not_grow_with_the_data(model, tmp_path, monkeypatch):
    """What is held at once is counted, at two sizes: row groups and decoded images; rows are mapped to a file."""
    from mim_refiner.data.source_parquet import ParquetSource

    held: dict[str, int] = {}

    def most(count: int) -> dict[str, int]:
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            write_parquet(folder / f"{number:02d}.parquet", 32, group=8)
        sources: list[ParquetSource] = []
        seen = {"groups": 0, "cached": 0, "unmapped": 0}
        load, room, init = ParquetSource._group, embedding._room, ImageSet.__init__

        def counting_load(self: ParquetSource, group: int) -> Any:
            found = load(self, group)
            if self not in sources:
                sources.append(self)
            seen["groups"] = max(seen["groups"], sum(len(source._groups) for source in sources))
            return found

        def mapped(*arguments: Any) -> Any:
            rows = room(*arguments)
            seen["unmapped"] += not isinstance(rows, np.memmap)
            return rows

        def watched(self: ImageSet, *arguments: Any, **options: Any) -> None:
            init(self, *arguments, **options)
            seen["cached"] += self.cached

        monkeypatch.setattr(ParquetSource, "_group", counting_load)
        monkeypatch.setattr(embedding, "_room", mapped)
        monkeypatch.setattr(ImageSet, "__init__", watched)
        embed(model=str(model), data=str(folder), out=str(folder / "f.npy"), batch_size=4, device="cpu")
        monkeypatch.undo()
        assert len(np.load(folder / "f.npy")) == 32 * count
        return seen

    held = most(4)
    assert most(12) == held
    assert (held["cached"], held["unmapped"]) == (0, 0)


def test_a_full_disk_is_said_before_the_work_and_leaves_nothing(model, data, tmp_path, monkeypatch):
    taken = []

    def full(_descriptor: int, _start: int, size: int) -> None:
        taken.append(size)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(
        RunFolderError, match=r"for the features cannot be taken \(No space left on device\); make room"
    ):
        embed(model=model, data=data, out=tmp_path / "rows.npy", batch_size=4)
    assert taken[0] >= len(open_source(data)) * 4, "the whole file is asked for, not what the first batch fills"
    assert list(tmp_path.iterdir()) == []


def test_half_precision_file(model, data, tmp_path):
    out = tmp_path / "a.safetensors"
    embed(model=str(model), data=str(data), out=str(out), dtype="float16", device="cpu")
    rows = read(out)
    assert rows.dtype == np.float16
    torch.testing.assert_close(torch.from_numpy(rows).float(), expected(model, data, -1, "cls"), rtol=1e-3, atol=1e-3)


def test_bad_input(model, data, tmp_path, capsys):
    arguments: dict[str, Any] = {"model": str(model), "data": str(data), "device": "cpu"}
    for options, match in (
        ({"out": "a.csv"}, "unknown kind of file '.csv'; end it with .parquet, .npy or .safetensors"),
        (
            {
                "out": str(tmp_path),
            },
            "unknown kind of file",
        ),
        ({"out": "a.npy", "block": 3}, "block"),
        ({"out": "a.npy", "pooling": "max"}, "pooling 'max' is unknown"),
        ({"out": "a.npy", "dtype": "int8"}, "dtype 'int8' is unknown"),
        ({"out": "a.npy", "precision": "fp8"}, "--precision fp8"),
        ({"out": "a.npy", "image_size": 15}, "not a multiple of the patch"),
        ({"out": "a.npy", "batch_size": 0}, "batch size 0"),
    ):
        with pytest.raises(InputError, match=match):
            embed(**{**arguments, **options, "out": str(tmp_path / options["out"])})  # type: ignore[operator]
    assert main(["embed", "--model", str(model), "--data", "none", "--out", str(tmp_path / "a.npy"), "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("error: none: no such file or folder")
    assert list(tmp_path.iterdir()) == []


def test_non_finite_features_are_refused(model, data, tmp_path):
    from mim_refiner import load_backbone

    folder = tmp_path / "broken"
    backbone = load_backbone(model)
    with torch.no_grad():
        backbone.model.blocks[2].mlp.fc2.weight.mul_(1e38)
    backbone.model.blocks[2].mlp.fc2.weight.data.clamp_(-3e38, 3e38)
    export_timm_unchecked(backbone, folder)
    with pytest.raises(DataError, match="hold NaN or infinity near image 0"):
        embed(model=str(folder), data=str(data), out=str(tmp_path / "a.npy"), dtype="float16", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def export_timm_unchecked(backbone: Backbone, folder: Path) -> None:
    """An export of weights that are finite and features that are not, which export itself would refuse."""
    from safetensors.torch import save_file

    from mim_refiner.export.timm import timm_config

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(timm_config(backbone)))
    save_file(backbone.model.state_dict(), folder / "model.safetensors")


def test_through_the_command_line_with_json(model, data, tmp_path, capsys):
    out = tmp_path / "deep" / "a.parquet"
    words = ["--model", model, "--data", data, "--out", out, "--pooling", "mean", "--device", "cpu", "--json"]
    assert main(["embed", *map(str, words)]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["shape"], result["pooling"]) == ([COUNT, 32], "mean")
    assert f"images {COUNT}/{COUNT}" in captured.err
    assert "images/s" in captured.err
