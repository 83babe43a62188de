"""What a checkpoint family provides, and how its tensors are handed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mim_refiner.checkpoints.store import Contents
from mim_refiner.types import Pooling

# Start of a name -> why no encoder takes it; what a family says beside it counts first.
DROPPED = {
    **dict.fromkeys(("decoder", "encoder_to_decoder."), "decoder, used only in pre-training"),
    **dict.fromkeys(("mask_token", "masked_embed", "embeddings.mask_token"), "mask token, used only in pre-training"),
    **dict.fromkeys(("head.", "head_dist.", "fc.", "classifier."), "head of the training (classifier, projection)"),
    **dict.fromkeys(("lm_head.", "cls_pt_layers.", "dino_head.", "ibot_head."), "head of the pre-training"),
    "pooler.dense.": "pooler of the classifier",
    "neck.": "decoder or head, used only in training",
    "data_preprocessor.": "mean and std",
    "n_averaged": "number of averaged states",
}
# Buffers of older versions: end of a name -> why it is left out.
_BUFFERS = {
    **dict.fromkeys(("relative_position_index", "relative_coords_table", "attn_mask"), "computed from the grid"),
    "attn.k_bias": "always zero",
}
LAYER_SCALE = "layer_scale"  # among what a model is built without
GUESS = "guessed: "  # start of a note that is said on every load
PROJECTION = "patch_embed.proj.weight"  # timm's name of a ViT's first convolution


@dataclass(frozen=True)
class Wishes:
    """What the caller asked for (None = as in the file), and what the file (``where``) says of itself."""

    image_size: tuple[int, int] | None = None
    num_heads: int | None = None
    in_chans: int | None = None
    encoder: str | None = None
    where: str = ""  # for messages
    told_heads: int = 0  # what the file's own arguments say; what the caller says counts first
    told_head_dim: int = 0
    told_model: tuple[int, int] = (0, 0)  # width and heads of the model that they name
    told_size: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class View:
    """One group of tensors in a file that may be an encoder, under names without wrappers and common prefix."""

    contents: Contents
    section: str  # path of the mapping that holds it
    prefix: str  # common start of its names in the file, such as "module.backbone."
    label: str  # what it is called: "teacher", "target_encoder", "model"
    tensors: dict[str, Tensor]  # short name -> value
    names: dict[str, str]  # short name -> name in the section
    beside: dict[str, str]  # the same of its other tensors: beside the prefix "net.encoder.", "net.head.x" is "head.x"
    encoders: tuple[str, ...] = ()  # labels of all encoders in the file
    note: str = ""  # on the choice among them, where names do not tell it or tell it wrongly

    @property
    def where(self) -> str:
        return self.contents.source

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The config.json beside the weights."""
        return self.contents.config

    @property
    def alone(self) -> bool:
        """Whether the file holds this encoder under "state_dict" and no other model, no prefix, no config beside it."""
        sections = {path for path in self.contents.sections if not path.startswith("opt")}
        return sections == {"state_dict"} and not self.prefix and self.config is None

    @property
    def model_type(self) -> str | None:
        return (self.config or {}).get("model_type")


@dataclass(frozen=True)
class Converted:
    """A checkpoint in timm's terms.

    ``num_heads`` 0 = the file does not tell, -1 = the architecture itself says. ``architecture`` and ``arguments``
    describe the encoder as it is in the file (its own image size and channels).
    """

    architecture: str
    arguments: dict[str, Any]
    num_heads: int
    tensors: dict[str, Tensor]  # timm name -> value
    origin: Mapping[str, str] = field(default_factory=dict)  # name in the file -> timm name
    reasons: Mapping[str, str] = field(default_factory=dict)  # start of a short name -> why no encoder takes it
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    licence: str | None = None  # None = the family's
    family: str | None = None  # a family that the file names itself
    norm_eps: float | None = None  # None = timm's for the architecture
    without: tuple[str, ...] = ()  # norms that timm would build and the encoder has not
    image_size: tuple[int, int] | None = None  # of encoders that take any and keep none (convolutions)
    projection: str = PROJECTION  # the first convolution's weight, for other numbers of channels
    position_rule: str = "timm"  # how tables are resized to other resolutions, see models.positions
    pooling: Pooling | None = None  # what the family's authors pool by, where it is not the class token
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A source format: how to recognise it by keys and shapes, and its tensors in timm's terms.

    ``anchor``: name of the patch projection's weight; whatever stands before it in a file is the prefix of an encoder.
    """

    name: str
    anchor: str
    matches: Callable[[View], bool]
    convert: Callable[[View, Wishes], Converted]
    any_names: bool = False  # the anchor may be missing: a config.json or key map says what the names mean
    default_encoder: tuple[str, ...] = ()  # labels to prefer before the usual ones (teacher, EMA)


def reason_to_drop(name: str, reasons: Mapping[str, str]) -> str | None:
    """Why a tensor is left out, by the start of its name; also what older versions saved and is computed today."""
    told = next((reason for start, reason in reasons.items() if name.startswith(start)), None)
    return told or next((reason for end, reason in _BUFFERS.items() if name.endswith(end)), None)
