"""Usage snippets of model cards, a format each; the tests run them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mim_refiner.types import BackboneInfo

FOLDER = "PATH_OF_THIS_FOLDER"  # in snippets

# The front matter's library_name: who loads the folder.
LIBRARIES = {"timm": "timm", "hf": "transformers", "onnx": "onnx", "refiner": "mim-refiner"}


def usage(info: BackboneInfo, facts: Mapping[str, Any]) -> str:
    """Markdown: how to get the recommended features of the export that ``facts`` describes."""
    block, norm = int(facts.get("block", -1)), bool(facts.get("norm", False))
    pooling = facts.get("pooling") or ("cls" if info.has_cls else "mean")
    snippet = _SNIPPETS[facts.get("format", "timm")](info, facts, block, str(pooling), norm)
    text = f"## Use\n\n```python\n{snippet.strip()}\n```"
    if facts.get("format") in (None, "timm", "refiner", "hf"):
        text += f'\n\nWith mim-refiner: `load_backbone("{FOLDER}").forward_blocks(images, [{block}], norm={norm})`.'
    return text


def _images(info: BackboneInfo) -> str:
    height, width = info.image_size
    return f"""images = torch.rand(1, {info.in_chans}, {height}, {width})  # your images on the 0-1 scale
mean, std = torch.tensor({list(info.mean)}), torch.tensor({list(info.std)})
images = (images - mean[:, None, None]) / std[:, None, None]"""


def _timm(info: BackboneInfo, facts: Mapping[str, Any], block: int, pooling: str, norm: bool) -> str:
    if info.num_prefix_tokens:
        options, unpack = ", return_prefix_tokens=True", "[(patches, prefix)]"
    else:
        options, unpack = "", "[patches]"
    features = "prefix[:, 0]  # class token" if pooling == "cls" else "patches.mean(dim=(2, 3))  # mean of patch tokens"
    # A kind of ViT that timm has not, and that importing this package registers with it.
    own = "vit_postnorm"
    register = "import mim_refiner.checkpoints  # registers this kind of ViT with timm\n"
    eps = ""
    if "set_norm_eps" in facts:
        eps = f"""for module in model.modules():
    if isinstance(module, torch.nn.LayerNorm):
        module.eps = {facts["set_norm_eps"]}  # no argument of timm's says it
"""
    if info.architecture.startswith("vit_capi"):  # its blocks need positions, which timm's own loop does not give
        return _own_reader(info, block, pooling, norm)
    return f"""
import timm, torch
{register if info.architecture.startswith(own) else ""}
model = timm.create_model("local-dir:{FOLDER}", pretrained=True).eval()
{eps}{_images(info)}
with torch.inference_mode():
    {unpack} = model.forward_intermediates(
        images, indices=[{block % info.depth}], norm={norm}, intermediates_only=True{options}
    )  # patches: [1, {info.embed_dim}, h, w]
features = {features}"""


def _transformers(info: BackboneInfo, facts: Mapping[str, Any], block: int, pooling: str, norm: bool) -> str:
    last = block % info.depth == info.depth - 1
    if norm and last:
        tokens = "output.last_hidden_state  # after the final norm"
    else:
        # hidden_states[0] is what enters block 0
        tokens = f"output.hidden_states[{block % info.depth + 1}]  # after block {block % info.depth}"
        if norm:
            tokens = f"model.layernorm(output.hidden_states[{block % info.depth + 1}])"
    mean = f"tokens[:, {info.num_prefix_tokens}:].mean(dim=1)  # mean of patch tokens"
    features = "tokens[:, 0]  # class token" if pooling == "cls" else mean
    return f"""
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained("{FOLDER}").eval()
{_images(info)}
with torch.inference_mode():
    output = model(images, output_hidden_states=True)
    tokens = {tokens}
    features = {features}"""


def _onnxruntime(info: BackboneInfo, facts: Mapping[str, Any], block: int, pooling: str, norm: bool) -> str:
    height, width = info.image_size
    fixed = facts.get("batch", "dynamic")
    count = 1 if fixed == "dynamic" else fixed
    return f"""
import numpy as np, onnxruntime

session = onnxruntime.InferenceSession("{FOLDER}/model.onnx", providers=["CPUExecutionProvider"])
images = np.random.rand({count}, {info.in_chans}, {height}, {width}).astype(np.float32)  # your images on the 0-1 scale
mean, std = np.float32({list(info.mean)}), np.float32({list(info.std)})
images = (images - mean[:, None, None]) / std[:, None, None]
[features] = session.run(["features"], {{"images": images}})"""


def _released(info: BackboneInfo, facts: Mapping[str, Any], block: int, pooling: str, norm: bool) -> str:
    return f"""
import torch

# For the code of the published encoders:
state_dict = torch.load("{FOLDER}/model.th", weights_only=True)["state_dict"]

# Or with this package:
{_own_reader(info, block, pooling, norm).strip()}"""


def _own_reader(info: BackboneInfo, block: int, pooling: str, norm: bool) -> str:
    return f"""
import torch
from mim_refiner import load_backbone

model = load_backbone("{FOLDER}")
{_images(info)}
with torch.inference_mode():
    [output] = model.forward_blocks(images, [{block}], norm={norm})
features = output.pooled("{pooling}")"""


_SNIPPETS = {"timm": _timm, "hf": _transformers, "onnx": _onnxruntime, "refiner": _released}
