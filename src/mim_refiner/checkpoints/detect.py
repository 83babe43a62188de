"""Tell what a checkpoint is from its keys and shapes; its file name says nothing."""

from __future__ import annotations

from mim_refiner.checkpoints.families import FAMILIES, Family
from mim_refiner.checkpoints.store import Contents, strip_wrappers
from mim_refiner.errors import CheckpointError

# Telling parts of names in files that are recognised but not loadable here; first match wins.
_KNOWN_OTHERS = (
    ("layer1.0.conv1.weight", "a ResNet"),
    ("relative_position_bias_table", "BEiT or SimMIM (relative positions)"),
    ("attn.q_bias", "BEiT (separate query bias)"),
    ("target_encoder.", "I-JEPA"),
    ("teacher.", "a self-distillation run (DINO, iBOT)"),
    ("alibi", "data2vec 2.0"),
    ("embeddings.patch_embeddings", "a Hugging Face transformers model"),
    ("stages.0.", "a hierarchical network (ConvNeXt or Swin)"),
    ("layers.0.blocks.", "a Swin Transformer"),
)


def detect_family(contents: Contents) -> tuple[Family, str]:
    """Return (family, path of the section that holds the encoder).

    Raises CheckpointError for a file that no family claims, with a guess at what it is.
    """
    for family in FAMILIES:
        section = family.find_section(contents)
        if section is not None:
            return family, section
    names = [f"{path}.{strip_wrappers(name)}".lstrip(".") for path, held in contents.sections.items() for name in held]
    guess = next((what for part, what in _KNOWN_OTHERS if any(part in name for name in names)), None)
    if guess is None and any("attn.qkv.weight" in name for name in names):
        guess = "a transformer with parts that a plain ViT has not, or without patch_embed.proj.weight"
    seen = f"it looks like {guess}" if guess else f"its tensors are named {', '.join(names[:3])}"
    known = ", ".join(family.name for family in FAMILIES)
    raise CheckpointError(
        f"{contents.source}: is not a ViT checkpoint of a known family ({known}); {seen}; "
        "give an encoder's weights under timm's names, or a timm folder"
    )
