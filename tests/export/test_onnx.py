"""ONNX graphs: onnxruntime gives the encoder's features, for every pooling, block and batch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mim_refiner.errors import InputError
from mim_refiner.export.onnx import ONNX
from mim_refiner.export.writing import write_export
from mim_refiner.models.backbone import Backbone, create_vit

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def make(**arguments: Any) -> Backbone:
    model = create_vit("vit_w32_d2_h4_p8", 16, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return Backbone.wrap(model.eval(), family="mae", licence="CC-BY-NC-4.0", mean=(0.5, 0.4, 0.3))


def facts(**options: Any) -> dict[str, Any]:
    return {"block": -1, "pooling": "cls", "norm": False, "batch": "dynamic", **options}


def run(folder: Path, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    [features] = session.run(["features"], {"images": images.numpy()})
    return torch.from_numpy(features)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"block": 0, "pooling": "mean", "norm": True}, {"reg_tokens": 2, "init_values": 0.1}),
        ({"pooling": "tokens"}, {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    ],
)
def test_a_dynamic_batch(tmp_path: Path, options: dict[str, Any], arguments: dict[str, Any]) -> None:
    backbone, chosen = make(**arguments), facts(**options)
    report = write_export(ONNX, backbone, tmp_path / "out", facts=chosen)
    assert report["max_abs_difference"] <= 1e-4
    for count in (1, 5):
        images = torch.randn(count, 3, 16, 16)
        [output] = backbone.forward_blocks(images, [chosen["block"]], norm=chosen["norm"])
        expected = output.patches if chosen["pooling"] == "tokens" else output.pooled(chosen["pooling"])
        torch.testing.assert_close(run(tmp_path / "out", images), expected, rtol=0, atol=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["input"]["shape"] == ["batch", 3, 16, 16]
    assert config["output"]["shape"] == ["batch", *expected.shape[1:]]
    assert config["mim_refiner"]["parity"]["tolerance"] == 1e-4


def test_a_fixed_batch_and_the_snippet_of_its_card(tmp_path: Path) -> None:
    backbone = make()
    write_export(ONNX, backbone, tmp_path / "out", facts=facts(batch=3, pooling="cls"))
    images = torch.randn(3, 3, 16, 16)
    [output] = backbone.forward_blocks(images, [-1])
    torch.testing.assert_close(run(tmp_path / "out", images), output.cls, rtol=0, atol=1e-4)
    with pytest.raises(Exception, match="Got: 2 Expected: 3"):
        run(tmp_path / "out", images[:2])
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: onnx\n")
    names: dict[str, Any] = {}
    match = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert match
    exec(match[1].replace("PATH_OF_THIS_FOLDER", str(tmp_path / "out")), names)
    [output] = backbone.forward_blocks(torch.from_numpy(names["images"]), [-1])
    torch.testing.assert_close(torch.from_numpy(names["features"]), output.cls, rtol=0, atol=1e-4)
    stored = {item.key: item.value for item in onnx.load(tmp_path / "out" / "model.onnx").metadata_props}
    assert json.loads(stored["mim_refiner"])["licence"] == "CC-BY-NC-4.0"


def test_tokens_are_all_tokens_prefix_first(tmp_path: Path) -> None:
    backbone = make(reg_tokens=2)
    write_export(ONNX, backbone, tmp_path / "out", facts=facts(pooling="tokens"))
    images = torch.randn(2, 3, 16, 16)
    tokens = run(tmp_path / "out", images)
    [output] = backbone.forward_blocks(images, [-1])
    torch.testing.assert_close(tokens[:, 0], output.cls, rtol=0, atol=1e-4)
    torch.testing.assert_close(tokens[:, 3:], output.patches, rtol=0, atol=1e-4)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_prefix_tokens"] == 3


def test_a_graph_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mim_refiner.export import onnx as module

    exported = torch.onnx.export

    def altered(model: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        with torch.no_grad():
            next(model.parameters()).add_(0.01)
        return exported(model, *arguments, **options)

    class Copy(module.Features):
        """The exporter gets a copy, so that only the graph is wrong."""

        def __init__(self, backbone: Backbone, *arguments: Any) -> None:
            import copy

            super().__init__(copy.deepcopy(backbone), *arguments)

    monkeypatch.setattr(module, "Features", Copy)
    monkeypatch.setattr(torch.onnx, "export", altered)
    with pytest.raises(InputError, match="the model as onnxruntime loads it differs by"):
        write_export(ONNX, make(), tmp_path / "out", facts=facts())
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_is_one_plain_line_with_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any, **options: Any) -> Any:
        try:
            raise ValueError("\x1b[31mno size for s0\x1b[0m\nuser stack:\n  File x")
        except ValueError as error:
            raise RuntimeError("Failed to export the model, step 1/3\nNext steps:") from error

    monkeypatch.setattr(torch.onnx, "export", failing)
    with pytest.raises(InputError) as caught:
        write_export(ONNX, make(), tmp_path / "out", facts=facts())
    assert re.search(r"ONNX graph \(no size for s0\); choose --format timm$", str(caught.value))
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
