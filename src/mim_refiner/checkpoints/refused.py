"""Files that are known and refused by name, each with the reason or the way to load it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from mim_refiner.checkpoints.families.base import PROJECTION
from mim_refiner.checkpoints.store import Contents, strip_wrappers
from mim_refiner.errors import CheckpointError

Tensors = Mapping[str, Tensor]  # of a section, by name without wrappers


def refuse_by_name(contents: Contents) -> None:
    """CheckpointError for a file that a family would take for one of its own, or that no image alone is encoded by."""
    for section, held in contents.sections.items():
        tensors = {} if section.startswith("opt") else {strip_wrappers(name): value for name, value in held.items()}
        for matches, what in _REFUSED:
            if matches(tensors):
                raise CheckpointError(f"{contents.source}: is {what}")


def looks_like(names: list[str]) -> str | None:
    """A guess at a file of no known family."""
    return next((what for part, what in _KNOWN_OTHERS if any(part in name for name in names)), None)


def _starts(*parts: str) -> Callable[[Tensors], bool]:
    """Whether a name starts so, or goes on so at a dot."""
    inside = tuple(f".{part}" for part in parts)
    return lambda held: any(name.startswith(parts) or any(part in name for part in inside) for name in held)


def _ending(held: Tensors, ending: str) -> Iterator[tuple[str, Tensor]]:
    """(what stands before it, tensor) of every name that ends so, at a dot."""
    for name, tensor in held.items():
        if f".{name}".endswith(f".{ending}"):
            yield name.removesuffix(ending), tensor


def _satmae_temporal(held: Tensors) -> bool:
    for start, table in _ending(held, "pos_embed"):
        token, projection = held.get(f"{start}cls_token"), held.get(start + PROJECTION)
        if token is None or projection is None or table.ndim != 3 or projection.ndim != 4:
            continue
        if 0 < table.shape[2] < token.shape[-1]:
            return True
    return False


def _video(held: Tensors) -> bool:
    return any(
        projection.ndim == 5
        and projection.shape[2] > 1
        and bool({f"{start}cls_token", f"{start}pos_embed_temporal"} & held.keys())
        for start, projection in _ending(held, PROJECTION)
    )


_CONVERSION = "of transformers; load timm's conversion of it"
_REFUSED: tuple[tuple[Callable[[Tensors], bool], str], ...] = (
    (
        _starts("hiera.encoder.", "encoder.stages.0.layers.0.attn."),
        "a Hiera of transformers; load timm's conversion, for example hiera_tiny_224.mae",
    ),
    (_starts("swin.encoder.", "encoder.layers.0.blocks.0.attention.self."), f"a Swin Transformer {_CONVERSION}"),
    (_starts("swinv2.encoder."), f"a Swin Transformer V2 {_CONVERSION}"),
    (
        _starts("embeddings.distillation_token"),
        "a DeiT of transformers (load timm's deit_base_distilled_patch16_224) or an Audio Spectrogram Transformer "
        "(its two class tokens are not read)",
    ),
    (
        lambda held: any(f"{at}patch_embed.0.proj.weight" in held for at, _ in _ending(held, "channel_embed")),
        "a SatMAE with groups of channels: every place of the image has a token for each group, as in no plain "
        "ViT; use SatMAE's RGB encoder, or another encoder of many bands (SSL4EO-S12, Prithvi)",
    ),
    (
        _satmae_temporal,
        "a temporal SatMAE: it encodes three images and their dates together, and has no meaning for one image; use "
        "SatMAE's RGB encoder",
    ),
    (
        _video,
        "a video encoder whose class token and positions are those of many frames, so that one image is nothing it was "
        "trained for; use an encoder of images",
    ),
    (
        lambda held: any(t.ndim == 5 for _, t in _ending(held, "embeddings.patch_embeddings.projection.weight")),
        "a video encoder of transformers (VideoMAE or ViViT); load the VideoMAE file of its authors, where an image is "
        "read as one tubelet of equal frames, or an encoder of images",
    ),
    (
        lambda held: any(_ending(held, "rope_embed.periods")),
        "a DINOv3 in its authors' layout; load timm's conversion, for example vit_base_patch16_dinov3.lvd1689m",
    ),
    (
        lambda held: any(".mlp.experts." in name for name in held),
        "a ViTPose+ whose MLPs have a part for every data set; split it by the authors' tools/model_split.py first",
    ),
)
# Telling parts of names in files that no family claims; first match wins.
_KNOWN_OTHERS = (
    ("layer1.0.conv1.weight", "a ResNet"),
    ("encoder.stages.0.layers.0.pwconv1.", f"a ConvNeXt {_CONVERSION}"),
    ("embeddings.class_embedding", f"a CLIP {_CONVERSION}"),
    ("layer.0.attention.o_proj.", f"a DINOv3 {_CONVERSION}"),
    ("embeddings.cls_token_distill", f"a DeiT {_CONVERSION}"),
    ("convnextv2.", f"a ConvNeXt V2 {_CONVERSION}"),
    ("vision_model.encoder.layers.", f"a CLIP or SigLIP {_CONVERSION}"),
    ("stages.0.", "a hierarchical network (ConvNeXt or Swin)"),
    ("layers.0.blocks.", "a Swin Transformer"),
    ("w12.weight", "a ViT with SwiGLU (DINOv2 giant)"),
    ("relative_position_bias_table", "a BEiT with parts missing"),
    ("alibi", "another modality of data2vec 2.0"),
    ("embeddings.patch_embeddings", "another Hugging Face transformers model"),
    ("lora_A", "a LoRA adapter without its base model"),
    ("_flat_param", "flat parameters of FSDP; save the full state dict (FULL_STATE_DICT)"),
)
