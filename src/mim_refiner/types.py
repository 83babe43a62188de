"""Small frozen containers shared by all layers.

Shape legend: B images, V views, G global views, D width, K heads, N patch tokens, C channels, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Pooling = Literal["cls", "mean"]
Checkpointing = bool | Literal["selective"]  # what is computed again in the backward pass: models.runners
ImageSize = int | tuple[int, int]  # pixels: side of a square, or (height, width)


def height_width(size: ImageSize) -> tuple[int, int]:
    """(height, width) of either form."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def default_crop_ratio(image_size: ImageSize) -> float:
    """Return 1.0 up to 64 px (nothing to spare at the border) and for what is no square, else 0.875 (224 of 256 px)."""
    return 0.875 if isinstance(image_size, int) and image_size > 64 else 1.0


def side_or_pair(size: ImageSize) -> ImageSize:
    """The shorter form: one number for a square."""
    height, width = height_width(size)
    return height if height == width else (height, width)


@dataclass(frozen=True)
class BlockOutput:
    """Tokens after one encoder block."""

    cls: Tensor | None  # [B, D]; None for encoders without a class token
    patches: Tensor  # [B, N, D]

    def pooled(self, pooling: str) -> Tensor:
        """Pool to [B, D]: ``cls`` takes the class token, ``mean`` averages the patch tokens.

        Raises ValueError for any other pooling, or for ``cls`` on an encoder without a class token.
        """
        if pooling == "mean":
            return self.patches.mean(dim=1)
        if pooling == "cls" and self.cls is not None:
            return self.cls
        if pooling == "cls":
            raise ValueError("pooling 'cls' needs a class token and this encoder has none; use pooling 'mean'")
        raise ValueError(f"unknown pooling {pooling!r}; use 'cls' or 'mean'")


@dataclass(frozen=True)
class BackboneInfo:
    """What a loaded encoder is; ``mean``/``std`` are per channel on the 0-1 scale."""

    family: str  # "mae", "timm", ...
    architecture: str  # a timm model name, or "vit(dim=128,depth=12,heads=4,patch=8)"
    embed_dim: int
    depth: int
    num_heads: int
    patch_size: tuple[int, int]
    num_prefix_tokens: int
    has_cls: bool
    image_size: tuple[int, int]
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str
    coverage: float  # share of the encoder's tensors that came from the checkpoint, 0-1
    source: str = ""
    position_rule: str = "timm"  # how tables of positions are resized to other image sizes, see models.positions
    norm_eps: float | None = None  # constant in the norms; None = not the same everywhere
    pooling: Pooling = "cls"  # what the encoder's authors pool by


@dataclass(frozen=True)
class TensorRecord:
    """What became of one tensor of a checkpoint file."""

    name: str
    shape: tuple[int, ...]
    status: Literal["loaded", "renamed", "reshaped", "dropped"]
    target: str | None = None  # encoder parameter it went to
    reason: str = ""


@dataclass(frozen=True)
class CheckpointReport(BackboneInfo):
    """Result of ``inspect_checkpoint``: what the file is, and the fate of every tensor."""

    tensors: tuple[TensorRecord, ...] = ()
    missing: tuple[str, ...] = ()  # encoder tensors the file does not provide
    notes: tuple[str, ...] = ()
    encoder: str = ""  # which of the file's encoders this is about
    encoders: tuple[str, ...] = ()  # all encoders in the file
    problem: str = ""  # the line that loading it as asked ends with; "" = it loads


@dataclass(frozen=True)
class NNAOutput:
    """Loss of one head and the mean positive cosine similarity (1 = perfectly aligned)."""

    loss: Tensor
    alignment: Tensor


@dataclass(frozen=True)
class NeighborResult:
    """Queue look-up for R query rows; entries are un-normalised."""

    neighbors: Tensor  # [R, D]
    indices: Tensor  # [R] slot in the queue
    similarity: Tensor  # [R] cosine similarity
    age: Tensor  # [R] samples enqueued since the entry
