"""Write an encoder as a transformers folder: ``AutoModel.from_pretrained(FOLDER)`` gives the same tokens.

A masked autoencoder becomes a ``ViTModel``, not a ``ViTMAEModel``: that one masks and shuffles the patches.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.layers import Mlp
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mim_refiner.checkpoints.families import hf
from mim_refiner.errors import InputError, install
from mim_refiner.export.writing import Format, Pairs, every_block, silence
from mim_refiner.files import errors_as
from mim_refiner.models.backbone import Backbone
from mim_refiner.types import default_crop_ratio, side_or_pair


def _write(backbone: Backbone, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    kind = architecture(backbone)
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in _state(backbone, kind).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    preprocessing = json.dumps(_preprocessing(backbone), indent=2)
    (folder / "preprocessor_config.json").write_text(preprocessing + "\n", encoding="utf-8")
    return _config(backbone, kind)


def architecture(backbone: Backbone) -> str:
    """``model_type`` of the transformers model that computes what the encoder computes; InputError if none does."""
    model = backbone.model
    if type(model) not in (Beit, VisionTransformer):
        raise _refusal(backbone, f"a {type(model).__name__}")
    _check_blocks(model)
    if type(model) is Beit:
        # The same network twice; of the two, AutoModel gives only BeitModel the norm after pooling.
        pooled_norm, norm = not isinstance(model.fc_norm, nn.Identity), not isinstance(model.norm, nn.Identity)
        plain = not pooled_norm and (not norm or "data2vec" in backbone.info.family)
        return "data2vec-vision" if plain else "beit"
    block = model.blocks[0]
    missing = {
        "normalises its tokens before block 0": not isinstance(model.norm_pre, nn.Identity),
        "has no final norm": isinstance(model.norm, nn.Identity),
        "normalises queries and keys": not isinstance(block.attn.q_norm, nn.Identity),
        "has no position table": model.pos_embed is None,
    }
    for what, present in missing.items():
        if present:
            raise _refusal(backbone, f"a ViT that {what}")
    layer_scale = not isinstance(block.ls1, nn.Identity)
    if not backbone.info.has_cls:
        if layer_scale or backbone.info.num_prefix_tokens:
            raise _refusal(backbone, "a ViT with layer scale or registers and no class token")
        return "ijepa"
    if (layer_scale or backbone.info.num_prefix_tokens > 1) and block.mlp.fc1.out_features % backbone.info.embed_dim:
        raise _refusal(backbone, "a ViT with layer scale or registers and an MLP of no whole multiple of its width")
    if backbone.info.num_prefix_tokens > 1:
        return "dinov2_with_registers"
    return "dinov2" if layer_scale else "vit"


def _check_blocks(model: Any) -> None:
    """Refuse blocks of other parts than those of the transformers ViTs: LayerNorm, and an MLP with exact GELU."""
    for block in model.blocks:
        activation = getattr(block.mlp, "act", None)
        exact = isinstance(activation, nn.GELU) and activation.approximate == "none"
        if type(block.mlp) is not Mlp or not exact or not isinstance(block.norm1, nn.LayerNorm):
            raise InputError(
                f"--format hf: {type(model).__name__} with {type(block.mlp).__name__}, {type(activation).__name__} and "
                f"{type(block.norm1).__name__} has no counterpart in transformers; use --format timm or onnx"
            )


def _refusal(backbone: Backbone, what: str) -> InputError:
    return InputError(
        f"--format hf: {backbone.info.architecture} ({backbone.info.family}) is {what}, which no transformers model "
        "computes; use --format timm or onnx"
    )


def _config(backbone: Backbone, kind: str) -> dict[str, Any]:
    model, info = backbone.model, backbone.info
    block = model.blocks[0]
    config: dict[str, Any] = {
        "model_type": kind,
        "architectures": [_KINDS[kind][0]],
        "hidden_size": info.embed_dim,
        "num_hidden_layers": info.depth,
        "num_attention_heads": info.num_heads,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": block.norm1.eps,
        "image_size": side_or_pair(info.image_size),
        "patch_size": side_or_pair(info.patch_size),
        "num_channels": info.in_chans,
    }
    if kind in ("beit", "data2vec-vision"):
        return config | {
            "intermediate_size": block.mlp.fc1.out_features,
            "use_mask_token": False,
            "use_absolute_position_embeddings": model.pos_embed is not None,
            "use_relative_position_bias": getattr(block.attn, "relative_position_bias_table", None) is not None,
            "use_shared_relative_position_bias": model.rel_pos_bias is not None,
            "layer_scale_init_value": 0.0 if block.gamma_1 is None else 0.1,  # the weights replace the value
            "use_mean_pooling": isinstance(model.norm, nn.Identity),
            "drop_path_rate": 0.0,
        }
    config["qkv_bias"] = block.attn.qkv.bias is not None
    if kind.startswith("dinov2"):
        config |= {"num_register_tokens": info.num_prefix_tokens - 1} if kind == "dinov2_with_registers" else {}
        return config | {
            "mlp_ratio": block.mlp.fc1.out_features // info.embed_dim,
            "layerscale_value": 1.0,
            "use_swiglu_ffn": False,
            "drop_path_rate": 0.0,
        }
    config["intermediate_size"] = block.mlp.fc1.out_features
    # The pooler is the identity, so that pooler_output is the class token and not a random projection of it.
    return config | ({"pooler_output_size": info.embed_dim, "pooler_act": "linear"} if kind == "vit" else {})


def _state(backbone: Backbone, kind: str) -> dict[str, Tensor]:
    """The encoder's tensors under the names of transformers, and what a model of that kind has beside them."""
    state, width, extra = dict(backbone.model.state_dict()), backbone.info.embed_dim, {}
    registers = backbone.info.num_prefix_tokens - 1
    if kind == "vit":
        extra = {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}
    if kind.startswith("dinov2"):
        extra = {"embeddings.mask_token": torch.zeros(1, width)}  # the model has it and does not use it
        gammas = (f"blocks.{number}.ls{part}.gamma" for number in range(backbone.info.depth) for part in (1, 2))
        state = {name: torch.ones(width) for name in gammas} | state  # layer scale of one where it has none
    if extra and backbone.model.no_embed_class:
        # a table that counts the class token: an entry of zero changes no token
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, width), state["pos_embed"]], dim=1)
    elif extra and registers:  # the table has entries for registers too; add them there
        table = state["pos_embed"]
        state["reg_token"] = state["reg_token"] + table[:, 1 : 1 + registers]
        state["pos_embed"] = torch.cat([table[:, :1], table[:, 1 + registers :]], dim=1)
    return _KINDS[kind][1].from_timm(state) | extra


def _preprocessing(backbone: Backbone) -> dict[str, Any]:
    """Our evaluation transform: shorter side resized, centre cropped (what is no square: resized), normalised."""
    height, width = backbone.info.image_size
    square = height == width
    resized = {"shortest_edge": round(height / default_crop_ratio(height))}
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": resized if square else {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_center_crop": square,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(backbone.info.mean),
        "image_std": list(backbone.info.std),
        "do_convert_rgb": backbone.info.in_chans == 3,
    }


def _pairs(backbone: Backbone, folder: Path, images: Tensor, facts: dict[str, Any]) -> Pairs:
    """Every block's tokens and those after the final norm."""
    theirs = _load(folder)
    with errors_as(InputError, "export: transformers cannot run the exported model", "choose --format timm"):
        output = theirs(pixel_values=images, output_hidden_states=True)
    tokens = [*output.hidden_states[1:], output.last_hidden_state]
    return zip(every_block(backbone, images), tokens, strict=True)


def _load(folder: Path) -> Any:
    needs = errors_as(InputError, "--format hf needs transformers", f"install it: {install('hf')}", ImportError)
    with needs, warnings.catch_warnings(action="ignore"):  # of transformers about itself
        from transformers import AutoModel
    problem = "export: transformers cannot load the exported model"
    with errors_as(InputError, problem, "choose --format timm"), silence():
        model, report = AutoModel.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    problems = {key: sorted(map(str, value)) for key, value in report.items() if key.endswith("_keys") and value}
    if problems:
        raise InputError(f"export: transformers reads the exported weights in part ({problems}); choose --format timm")
    return model.eval()


_KINDS = {  # model_type -> class, names
    "vit": ("ViTModel", hf.VIT_KEYS),
    "ijepa": ("IJepaModel", hf.VIT_KEYS),
    "dinov2": ("Dinov2Model", hf.DINOV2_KEYS),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", hf.DINOV2_KEYS),
    "beit": ("BeitModel", hf.BEIT_KEYS),
    "data2vec-vision": ("Data2VecVisionModel", hf.BEIT_KEYS),
}

HUGGING_FACE = Format("hf", 1e-5, "transformers", "every block and the final tokens", _write, _pairs)
