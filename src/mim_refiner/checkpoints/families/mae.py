"""Plain ViTs under timm's names, masked autoencoders and students of a teacher, and what each is told by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.families.base import GUESS, PROJECTION, Family, View, Wishes
from mim_refiner.checkpoints.families.plain_vit import (
    VIT_NAMES,
    count_blocks,
    has_plain_vit,
    is_bare_vit,
    is_square,
    make_family,
)
from mim_refiner.errors import InputError
from mim_refiner.models.positions import computed_table


def _bare(name: str, matches: Callable[[View], bool], **options: Any) -> Family:
    """:func:`make_family` of plain ViTs without a config.json."""
    return make_family(name, lambda view: is_bare_vit(view) and matches(view), **options)


def has_decoder(view: View) -> bool:
    """Whether a reconstructing decoder with a mask token lies beside a plain ViT, and no config."""
    names = view.tensors
    decoder = any(name.startswith(("decoder_blocks.", "decoder_embed.", "decoder_pos_embed")) for name in names)
    return is_bare_vit(view) and any(name.startswith("mask_token") for name in names) and decoder


# --- MAE (He et al., arXiv 2111.06377; github.com/facebookresearch/mae): published encoder-only files and fine-tuned
# ones {"model": ...}, files with decoder, linear probes, and training checkpoints with optimiser and options. The same
# layout have MAE-Lite, RETFound, SSL4EO-S12 (13 bands), SatMAE for RGB, AudioMAE and MSM-MAE (one channel, no square;
# biases of query and value only).


def _is_mae(view: View) -> bool:
    """A plain ViT that comes with MAE's decoder, or alone under "model" and with a class token, as published files are.

    A ViT under "model" with a classifier of one layer but without ``fc_norm`` is not MAE's (DeiT's files look so).
    """
    names = view.tensors.keys()
    published = view.section == "model" and "cls_token" in names and not {"reg_token", "blocks.0.ls1.gamma"} & names
    return has_decoder(view) or (published and ("head.weight" not in names or "fc_norm.weight" in names))


MAE = _bare("mae", _is_mae, final_norm=True)

# --- dBOT (Liu et al., arXiv 2209.03917; github.com/liuxingbin/dbot): MAE's layout with a last layer of its own that
# predicts features. An encoder-only file cannot be told from MAE's and is taken for one; both load alike.

DBOT = make_family("dbot", lambda view: has_decoder(view) and "decoder_predp.weight" in view.tensors, final_norm=True)

# --- CrossMAE (Fu et al., arXiv 2401.14391; github.com/TonyLianLong/CrossMAE): MAE's layout with a decoder that attends
# to the encoder's tokens. It reads a weighted sum of all blocks, so the encoder has no final norm; where it reads the
# last block only, there is one. Features are pooled by the mean of the patch tokens.

CROSSMAE = make_family(
    "crossmae",
    lambda view: has_decoder(view) and any(".cross_attn." in name for name in view.tensors),
    dropped={"dec_norms.": "norms of the decoder's inputs", "wfm.": "weights of the sum over blocks for the decoder"},
    prepare=lambda view, *_: {"final_norm": None if any(name.startswith("wfm.") for name in view.tensors) else True},
    pooling="mean",
    heads={384: 6},
)

# --- Scale-MAE (Reed et al., arXiv 2212.14532; github.com/bair-climate-initiative/scale-mae): MAE's encoder with a
# decoder of two resolutions. The authors' positions are those of the stored table at a ground sampling distance of 1,
# and are computed anew for every image size.

_SCALE_HEADS = ("fpn.", "fcn.", "fcn_high.", "fcn_low.")

SCALE_MAE = _bare(
    "scale_mae",
    lambda view: any(name.startswith(_SCALE_HEADS) for name in view.tensors),
    dropped=dict.fromkeys((*_SCALE_HEADS, "pos_emb_projection."), "head of the decoder"),
    final_norm=True,
    position_rule="sincos",
    notes=("positions of a ground sampling distance of 1; the authors scale them by that of the image",),
)

# --- MAE-CT and its MAEs (Lehner et al., arXiv 2304.10520; github.com/ml-jku/MAE-CT): {"state_dict": ...,
# "ctor_kwargs": ...}, the encoder alone, without positions of the class token.


def _is_mae_ct(view: View) -> bool:
    """A ViT alone under "state_dict", with its constructor's arguments beside it or positions of patches only."""
    if not view.alone or not {"cls_token", "pos_embed"} <= view.tensors.keys():
        return False
    entries = view.tensors["pos_embed"].shape[1]
    free = is_square(entries) and not is_square(entries - 1)
    return free or any(path.startswith("ctor_kwargs.") for path in view.contents.facts)


MAE_CT = _bare("mae_ct", _is_mae_ct, final_norm=True)

# --- MAE-pytorch (github.com/pengzhiliang/MAE-pytorch) and VideoMAE (arXiv 2203.12602, MCG-NJU/VideoMAE): no class
# token; biases of query and value only; positions by the number of the patch, which the code computes and the file has
# not. VideoMAE's patches span several frames: an image is taken for one such tubelet of equal frames.


def _prepare_pytorch(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    notes, weight = [], tensors[PROJECTION]
    said: dict[str, Any] = {}
    if weight.ndim == 5:
        tensors[PROJECTION] = weight.sum(dim=2)
        said["family"] = "videomae"
        frames = weight.shape[2]
        notes.append(f"an image stands for one tubelet of {frames} equal frames; the authors' videos have more")
    if "pos_embed" not in tensors:
        height, width = wishes.image_size or (224, 224)
        grid = (height // weight.shape[-2], width // weight.shape[-1])
        tensors["pos_embed"] = computed_table("sinusoid", weight.shape[0], grid)
        said |= {"position_rule": "sinusoid", "known_size": (height, width)}
        notes.append(f"positions are computed for the image size, here {height}x{width}; image_size= sets it")
    return said | {"notes": tuple(notes)}


MAE_PYTORCH = _bare(  # with BEiT's biases, and without a table or with a decoder of this code beside it
    "mae_pytorch",
    lambda view: (
        "cls_token" not in view.tensors
        and "blocks.0.attn.q_bias" in view.tensors
        and ("pos_embed" not in view.tensors or "encoder_to_decoder.weight" in view.beside)
    ),
    prepare=_prepare_pytorch,
    final_norm=True,
    pooling="mean",
    heads={384: 6},
)

# --- TinyMIM (Ren et al., arXiv 2301.01296; github.com/OliverRensu/TinyMIM), pre-training files: no decoder. The last
# block has other heads than the rest, for it imitates relations of a larger teacher; what comes after its attention was
# never trained. Told by the model's name among the file's options.

_TINY_HEADS = {"tiny": (6, 12), "small": (6, 12), "base": (12, 16)}  # size -> heads of all blocks, of the last
_TINY_NOTE = "the last block has {} heads, the others {}; only its attention was trained, so take an earlier block"


def _prepare_tinymim(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    model = str(view.contents.fact("model"))
    asked = (wishes.num_heads, wishes.num_heads)
    heads, last = next((heads for size, heads in _TINY_HEADS.items() if size in model), asked)
    if heads is None or last is None:
        raise InputError(f"{view.where}: the heads of the TinyMIM model '{model}' are unknown; pass num_heads=")
    arguments = {"block_heads": (heads,) * (count_blocks(tensors) - 1) + (last,)}
    return {"known_heads": heads, "arguments": arguments, "notes": (_TINY_NOTE.format(last, heads),)}


TINYMIM = _bare(
    "tinymim",
    lambda view: str(view.contents.fact("model")).startswith("tinymim") and not has_decoder(view),
    prepare=_prepare_tinymim,
    final_norm=True,
    architecture="vit_variant",
)

# --- Bird-MAE (Rauch et al., arXiv 2504.12880; github.com/DBD-research-group/Bird-MAE and its hub): spectrograms of one
# channel. The hub's files have a norm after pooling beside the final one, which the authors' forward pass leaves out;
# Lightning files with a decoder; and the file refined by MIM-Refiner's recipe.

_BIRD_NOTE = "the authors normalise log-mel values by (x + 7.2) / 8.86; compute mean and std of your images"
_BIRD_SIZE = (512, 128)  # frames x mel bands of the published files


def _is_bird_mae(view: View) -> bool:
    """A ViT of one channel with both norms, or with Bird-MAE's names of the image size among its arguments."""
    names = view.tensors
    if not has_plain_vit(names) or "cls_token" not in names or names[PROJECTION].shape[1] != 1:
        return False
    return names.keys() >= {"norm.weight", "fc_norm.weight"} or view.contents.fact("img_size_x") is not None


def _prepare_bird(view: View, tensors: dict[str, Tensor], wishes: Wishes) -> dict[str, Any]:
    if "fc_norm.weight" in tensors:
        for name in ("norm.weight", "norm.bias"):
            tensors.pop(name, None)
    size = (view.contents.fact("img_size_x"), view.contents.fact("img_size_y"))
    if all(isinstance(side, int) for side in size):
        return {"known_size": size}
    rows, columns = (side // patch for side, patch in zip(_BIRD_SIZE, tensors[PROJECTION].shape[2:], strict=True))
    if tensors["pos_embed"].shape[1] != rows * columns + 1:
        return {}
    shown = f"{_BIRD_SIZE[0]}x{_BIRD_SIZE[1]}"
    guess = f"{GUESS}spectrograms of {shown}, as the authors' files; pass image_size= if yours differ"
    return {"known_size": _BIRD_SIZE, "notes": (_BIRD_NOTE, guess)}


BIRD_MAE = make_family(
    "bird_mae",
    _is_bird_mae,
    dropped={"norm.": "unused: the pooled mean has a norm of its own"},
    prepare=_prepare_bird,
    pooling="mean",
    notes=(_BIRD_NOTE,),
)

# --- iBOT and DINO (arXiv 2111.07832, 2104.14294; github.com/bytedance/ibot, facebookresearch/dino): training
# checkpoints {"student": ..., "teacher": ...}, and iBOT's extracted teacher, a plain ViT alone under "state_dict". The
# teacher (a running average) is the one that the authors evaluate. Tables are resized with DINO's offset of 0.1.


def _is_ibot(view: View) -> bool:
    """A ViT with class token called student or teacher, or alone in the file under "state_dict" without classifier."""
    names = view.tensors
    called = not {"student", "teacher"}.isdisjoint([*view.section.split("."), *view.prefix.split(".")])
    bare = view.alone and not view.contents.facts and "reg_token" not in names and all(map(VIT_NAMES.knows, names))
    return "cls_token" in names and (called or bare)


def _prepare_ibot(view: View, *_: Any) -> dict[str, Any]:
    """A training file in which no encoder has a mask token is DINO's, not iBOT's."""
    sections = view.contents.sections
    names = (name for held in sections.values() for name in held)
    masks = sections.keys() == {"state_dict"} or any(name.endswith(("masked_embed", "mask_token")) for name in names)
    return {"family": None if masks else "dino"}


_HEADS = {192: 3, 384: 6}
IBOT = _bare("ibot", _is_ibot, prepare=_prepare_ibot, final_norm=True, position_rule="dino", heads=_HEADS)

# --- DINOv2's own files (Oquab et al., arXiv 2304.07193; github.com/facebookresearch/dinov2): hub files with and
# without registers, and training files {"teacher": ...} whose blocks may lie in chunks. The table counts the class
# token and not the registers.


def _is_dinov2(view: View) -> bool:
    """A ViT with class token and registers, a mask token of two dimensions, or blocks in chunks."""
    names = view.tensors
    mask, chunked = names.get("mask_token"), any(n.split(".")[2].isdigit() for n in names if n[:7] == "blocks.")
    known = "register_tokens" in names or chunked or (mask is not None and mask.ndim == 2)
    return known and "cls_token" in names


def free_registers(tensors: dict[str, Tensor]) -> None:
    """Registers have no positions, as in no table of timm that counts the class token: its entry goes to that token."""
    if {"reg_token", "cls_token", "pos_embed"} <= tensors.keys():
        table = tensors["pos_embed"]
        tensors["cls_token"] = tensors["cls_token"] + table[:, :1]
        tensors["pos_embed"] = table[:, 1:]


def _prepare_dinov2(view: View, tensors: dict[str, Tensor], *_: Any) -> dict[str, Any]:
    free_registers(tensors)
    return {"position_rule": "timm" if "reg_token" in tensors else "dino"}  # as the authors' hub has it


DINOV2 = _bare("dinov2", _is_dinov2, prepare=_prepare_dinov2, final_norm=True, heads={384: 6})

# --- I-JEPA (Assran et al., arXiv 2301.08243; github.com/facebookresearch/ijepa): {"encoder": ..., "target_encoder":
# ..., "predictor": ...}; no class token. The target encoder (a running average) is the one that the authors evaluate.


IJEPA = make_family(
    "ijepa",
    lambda view: (
        not {"encoder", "target_encoder"}.isdisjoint(view.section.split("."))
        and has_plain_vit(view.tensors)
        and "cls_token" not in view.tensors
    ),
    final_norm=True,
    pooling="mean",
    heads=_HEADS,
)
