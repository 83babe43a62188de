"""Write an encoder as an ONNX graph: normalised images in, features of one block and pooling out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mim_refiner.errors import InputError, install, one_line
from mim_refiner.export.writing import Format, Pairs, silence
from mim_refiner.files import errors_as
from mim_refiner.models.backbone import Backbone
from mim_refiner.reporting import number_of

_FILE = "model.onnx"
_OPSET = 18
_EXTERNAL_BYTES = 1_500_000_000  # a protobuf file ends at 2 GB; larger weights go to model.onnx.data


class Features(nn.Module):
    """The graph: images [B, C, H, W] to [B, D] (cls, mean) or all tokens [B, P+N, D], prefix tokens first."""

    def __init__(self, backbone: Backbone, block: int, pooling: str, norm: bool) -> None:
        super().__init__()
        self.backbone = backbone
        [self.block] = backbone.resolve_blocks([block])
        self.pooling = pooling
        self.norm = norm

    def forward(self, images: Tensor) -> Tensor:
        tokens, _ = self.backbone.run_blocks(self.backbone.embed(images), 0, self.block + 1)
        if self.norm:
            tokens = self.backbone.final_norm(tokens)
        return tokens if self.pooling == "tokens" else self.backbone.split(tokens).pooled(self.pooling)


def _write(backbone: Backbone, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    onnx, _ = _libraries()
    info, batch = backbone.info, facts["batch"]
    module = Features(backbone, facts["block"], facts["pooling"], facts["norm"]).eval()
    # Two images: torch.export takes a size of one for a constant.
    example = torch.zeros(2 if batch == "dynamic" else batch, info.in_chans, *info.image_size)
    shapes = {"images": {0: torch.export.Dim("batch")}} if batch == "dynamic" else None
    size = sum(parameter.numel() * parameter.element_size() for parameter in backbone.parameters())
    try:
        with silence():
            torch.onnx.export(
                module,
                (example,),
                str(folder / _FILE),
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=shapes,
                opset_version=_OPSET,
                external_data=size > _EXTERNAL_BYTES,
                verbose=False,
                dynamo=True,
            )
    except Exception as error:  # the exporter raises its own kinds, and any that the model raises under it
        cause: BaseException = error
        while cause.__cause__ is not None:  # the outer ones only say which step failed
            cause = cause.__cause__
        plain = re.sub(r"\x1b\[[\d;]*m", "", str(cause)).strip()  # torch.export colours its texts
        reason = one_line((plain or type(cause).__name__).partition("\n")[0])
        raise InputError(
            f"export: torch cannot turn {info.architecture} into an ONNX graph ({reason}); choose --format timm"
        ) from error
    graph = onnx.load(str(folder / _FILE), load_external_data=False)
    onnx.helper.set_model_props(graph, {"mim_refiner": json.dumps(dict(facts))})
    onnx.save(graph, str(folder / _FILE))
    with torch.inference_mode():
        shape = list(module(example).shape)
    images = "batch" if batch == "dynamic" else batch
    return {
        "file": _FILE,
        "opset": _OPSET,
        "input": {"name": "images", "type": "float32", "shape": [images, *example.shape[1:]]},
        "output": {"name": "features", "type": "float32", "shape": [images, *shape[1:]]},
        "num_prefix_tokens": info.num_prefix_tokens,
    }


def _pairs(backbone: Backbone, folder: Path, images: Tensor, facts: dict[str, Any]) -> Pairs:
    """The graph's output: for a dynamic batch at two sizes, for a fixed one with images repeated to fill it."""
    _, runtime = _libraries()
    module = Features(backbone, facts["block"], facts["pooling"], facts["norm"]).eval()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    session = runtime.InferenceSession(str(folder / _FILE), options, providers=["CPUExecutionProvider"])
    batch = facts["batch"]
    if batch == "dynamic":
        batches = [images, images[:1]]
    else:
        repeated = images.repeat(-(-batch // len(images)), 1, 1, 1)
        batches = list(repeated[: max(batch, len(images) // batch * batch)].split(batch))
    for some in batches:
        problem = f"export: onnxruntime cannot run the graph on {number_of(len(some), 'images')}"
        with errors_as(InputError, problem, "try another --batch"):
            [got] = session.run(["features"], {"images": some.numpy()})
        yield module(some), torch.from_numpy(got)


def _libraries() -> tuple[Any, Any]:
    remedy = f"install them: {install('onnx')}"
    with errors_as(InputError, "ONNX export needs onnx, onnxscript and onnxruntime", remedy, ImportError):
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter needs it
    return onnx, onnxruntime


ONNX = Format("onnx", 1e-4, "onnxruntime", "the features", _write, _pairs)
