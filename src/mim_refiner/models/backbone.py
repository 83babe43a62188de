"""An encoder as the rest of the package sees it: a timm model whose blocks can be asked for their tokens."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from mim_refiner.core.pictures import shown
from mim_refiner.core.sharding import shard
from mim_refiner.errors import InputError
from mim_refiner.models.positions import RULES, Grid, check_image_size, resize_absolute, resize_relative
from mim_refiner.models.runners import (
    Extras,
    PlainRunner,
    built_at,
    checkpointed,
    class_token_after,
    free_image_size,
    rebuilt,
    resized_state,
    runner_for,
)
from mim_refiner.models.vit import IMAGENET_MEAN, IMAGENET_STD, architecture_name, create_vit, in_channels
from mim_refiner.types import (
    BackboneInfo,
    BlockOutput,
    Checkpointing,
    Pooling,
    default_crop_ratio,
    height_width,
    side_or_pair,
)

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Backbone", "create_vit"]

# Of a block in a run: views of two sizes, whole and last micro-batches, each in the warm-up, in a frozen prefix,
# without a graph, with one, and with one behind a frozen prefix.
GRAPHS = 2 * 2 * 5
MAX_POSITIONS = 2**20  # patches of an image: a mistyped size must not ask for terabytes
_NEVER_TRAINED = (
    "pos_embed", "pos_embed_abs", "pos_embed_win", "pos_embed_spatial", "pos_embed_temporal", "absolute_pos_embed",
    "fc_norm", "attn_pool", "head", "head_dist",
)  # fmt: skip


class Backbone(nn.Module):
    """A timm model and what is known about it.

    Plain and post-norm ViTs, Beit, Eva and CAPI's ViT run block by block here: raw tokens, any resolution, any
    sub-range of blocks. Any other timm model is asked through its ``forward_intermediates``, where its stages count as
    blocks; such a model cannot run a sub-range.
    """

    def __init__(self, model: nn.Module, info: BackboneInfo) -> None:
        super().__init__()
        self.model: Any = model  # timm models carry no types
        self.info = info
        self.runner = runner_for(model)
        self.is_plain_vit = type(self.runner) is PlainRunner
        self.checkpointing: Checkpointing = False

    @classmethod
    def wrap(
        cls,
        model: nn.Module,
        *,
        architecture: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        position_rule: str = "timm",
        pooling: Pooling | None = None,
        image_size: tuple[int, int] | None = None,
        **origin: Any,
    ) -> Backbone:
        """Wrap a timm model; its facts are read from the model itself.

        ``mean``/``std`` default to ImageNet's on the 0-1 scale. ``position_rule`` (see models.positions) says how
        tables of positions are resized for other image sizes, ``pooling`` what the encoder's authors pool by (if None,
        the class token where there is one and the model does not pool by the mean). A model that runs block by block is
        switched to dynamic image sizes. ``image_size``: what a model that keeps none was trained on. ``origin``:
        family, licence, coverage and source, as in :class:`BackboneInfo`.
        Raises InputError for a model without ``forward_intermediates``.
        """
        runner = runner_for(model)
        if runner is None and not hasattr(model, "forward_intermediates"):
            raise InputError(f"{type(model).__name__} has no forward_intermediates; use a timm ViT instead")
        if position_rule not in RULES:
            raise InputError(f"position rule '{position_rule}' is unknown; use {', '.join(RULES)}")
        if runner is not None:
            runner.prepare(model)
        else:
            free_image_size(model)
        in_chans, structure = in_channels(model), _structure(model, image_size)
        by_mean = getattr(model, "global_pool", "token") in ("avg", "avgmax")  # what its own forward pass pools by
        facts: dict[str, Any] = {"family": "timm", "licence": "unknown", "coverage": 1.0} | origin
        info = BackboneInfo(
            architecture=architecture or architecture_name(model),
            mean=_per_channel(mean, IMAGENET_MEAN, in_chans),
            std=_per_channel(std, IMAGENET_STD, in_chans),
            in_chans=in_chans,
            position_rule=position_rule,
            norm_eps=norm_eps(model),
            pooling=pooling or ("cls" if structure["has_cls"] and not by_mean else "mean"),
            **structure,
            **facts,
        )
        return cls(model, info)

    @property
    def block_dims(self) -> tuple[int, ...]:
        """Width of every block's output; the stages of a hierarchical encoder differ."""
        if self.runner is not None:
            return (self.info.embed_dim,) * self.info.depth
        return tuple(int(stage["num_chs"]) for stage in self.model.feature_info)

    @property
    def transform(self) -> Any:
        """torchvision's transform of a picture to what every verb makes of it and measures: float32 [C, H, W]."""
        from torchvision.transforms import v2  # takes a second, and few ask

        size = side_or_pair(self.info.image_size)
        short = round(size / default_crop_ratio(size)) if isinstance(size, int) else size
        cut = [v2.Resize(short, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size)]
        colours = [v2.Lambda(shown), v2.RGB()] if self.info.in_chans == 3 else []
        last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.info.mean, self.info.std)]
        return v2.Compose([*colours, *cut, *last])

    def forward_blocks(
        self,
        images: Tensor,
        block_indices: Sequence[int] | None = None,
        *,
        norm: bool = False,
        class_token_last: bool = False,
    ) -> list[BlockOutput]:
        """Tokens after the blocks asked for (all if None), in the order asked; ``images`` [B, C, H, W] normalised.

        Raw block outputs; ``norm=True`` applies the encoder's final norm to each (a model with none, or with its norm
        after pooling, gives raw tokens). Blocks after the deepest one asked for do not run. ``class_token_last``: the
        deepest one's patches are not read, and may be none. H and W are any multiples of the patch size. Raises
        InputError for an index out of range or an unusable image shape.
        """
        indices = self.resolve_blocks(block_indices)
        if not indices:
            return []
        grid = self.grid_of((images.shape[-2], images.shape[-1]))
        way: dict[str, Any] = {"grid": grid, "class_token_last": class_token_last}
        _, tokens = self.run_blocks(self.embed(images), 0, max(indices) + 1, indices, **way)
        return [self.split(self.final_norm(tokens[index]) if norm else tokens[index]) for index in indices]

    def resolve_blocks(self, block_indices: Sequence[int] | None) -> list[int]:
        """Block indices as numbers from 0 (negative ones count from the end); InputError if out of range."""
        depth = self.info.depth
        indices = range(depth) if block_indices is None else block_indices
        for index in indices:
            if not -depth <= index < depth:
                raise InputError(
                    f"block {index} is out of range: the encoder has blocks 0 to {depth - 1} (or -{depth} to -1)"
                )
        return [index % depth for index in indices]

    def embed(self, images: Tensor) -> Tensor:
        """Tokens [B, P+N, D] that enter block 0, prefix tokens first; the images where blocks do not run one by one."""
        if images.ndim != 4 or images.shape[1] != self.info.in_chans:
            raise InputError(
                f"images must have shape [B, {self.info.in_chans}, H, W], got {list(images.shape)}; "
                "stack and convert them to the encoder's channels first"
            )
        if not images.is_floating_point():
            raise InputError(f"images are {images.dtype}; normalise them, for example by backbone.transform")
        check_image_size((images.shape[2], images.shape[3]), self.info.patch_size)
        if self.runner is None:
            return images
        return self.runner.embed(self.model, images, self.info.position_rule)

    def run_blocks(
        self,
        tokens: Tensor,
        start: int,
        stop: int,
        wanted: Sequence[int] = (),
        *,
        grid: Grid | None = None,
        class_token_last: bool = False,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run blocks ``start`` to ``stop - 1`` on the output of :meth:`embed` or of an earlier call.

        Returns the tokens [B, P+N, D] after the last of them and {block: raw tokens} for the ``wanted`` ones.
        So a frozen prefix can run under ``torch.no_grad()`` and the rest with gradients. ``grid`` (:meth:`grid_of`
        the images) is for blocks that know positions; None = that of square images. ``class_token_last``: of the last
        block run only the class token will be read, so that its output may be [B, 1, D] (models.runners).
        """
        if self.runner is None:
            return self._run_intermediates(tokens, start, stop, wanted)
        extras: Extras = [()] * stop
        if not self.is_plain_vit:
            grid = grid or self._square_grid(tokens)
            extras = self.runner.extras(self.model, grid, self.info.position_rule, tokens.device)
        outputs: dict[int, Tensor] = {}
        for index in range(start, stop):
            block, arguments = self.model.blocks[index], extras[index]
            alone = class_token_after(block, tokens, arguments) if class_token_last and index == stop - 1 else None
            if alone is not None:
                tokens = alone
            elif self.checkpointing and torch.is_grad_enabled():
                tokens = checkpointed(block, tokens, *arguments, selective=self.checkpointing == "selective")
            else:
                tokens = block(tokens, *arguments)
            if index in wanted:
                outputs[index] = tokens
        return tokens, outputs

    def _square_grid(self, tokens: Tensor) -> Grid:
        patches = tokens.shape[1] - self.info.num_prefix_tokens
        side = math.isqrt(max(patches, 0))
        if side * side != patches:
            raise InputError(f"{patches} patches are no square image; pass the grid of the images to run_blocks")
        return side, side

    def final_norm(self, tokens: Tensor) -> Tensor:
        """The encoder's final norm on ``tokens`` [B, L, D]; the tokens where it has none of their width (stages)."""
        norm = getattr(self.model, "norm", None)
        return tokens if norm is None or tokens.shape[-1] != self.info.embed_dim else norm(tokens)

    def split(self, tokens: Tensor) -> BlockOutput:
        """Split tokens [B, P+N, D] into class token and patch tokens; register tokens are left out."""
        prefix = self.info.num_prefix_tokens
        return BlockOutput(cls=tokens[:, 0] if self.info.has_cls else None, patches=tokens[:, prefix:])

    def fixed_parameters(self, frozen_blocks: int = 0) -> Iterator[nn.Parameter]:
        """Parameters that refinement leaves alone.

        Always absolute positions (fixed in the published recipes) and what no block output depends on (pooling,
        its norm, classifier); with ``frozen_blocks`` > 0 also the stem and that many first blocks.
        """
        for name, parameter in self.model.named_parameters():
            part, _, rest = name.partition(".")
            in_prefix = int(rest.partition(".")[0]) < frozen_blocks if part == "blocks" else part != "norm"
            always = part in _NEVER_TRAINED or name.endswith(".attn.freqs")
            if always or (frozen_blocks > 0 and in_prefix):
                yield parameter

    @torch.no_grad()
    def set_image_size(self, image_size: tuple[int, int]) -> None:
        """Bring the tables of positions to ``image_size`` (H, W pixels) by the encoder's own rule; in place.

        A model that does not run block by block becomes the one that timm builds for that size. Raises InputError for
        a size that the patch does not divide or that the architecture cannot have.
        """
        self.check_new_size(image_size)
        if image_size == self.info.image_size:
            return
        if self.runner is None:
            self.model = rebuilt(self.model, image_size)
            self.info = replace(self.info, image_size=image_size)
            return
        old, new, rule = self.grid_of(self.info.image_size), self.grid_of(image_size), self.info.position_rule
        resized = {}
        for name, table in self.model.named_parameters():
            if name.endswith("relative_position_bias_table"):
                resized[name] = resize_relative(table, old, new, rule=rule)
            elif name == "pos_embed":
                num_prefix = table.shape[1] - old[0] * old[1]
                resized[name] = resize_absolute(table, old, new, num_prefix=num_prefix, rule=rule)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of torch's future, by relative tables
            self.model.set_input_size(img_size=image_size)
        parameters = dict(self.model.named_parameters())
        for name, table in resized.items():  # in place of timm's own resizing
            parameters[name].copy_(table)
        ordered = rule.removesuffix("_transposed")  # as a resized table is
        self.info = replace(self.info, image_size=image_size, position_rule=ordered)

    def check_new_size(self, image_size: tuple[int, int]) -> None:
        """InputError for a size that :meth:`set_image_size` cannot bring the encoder to, or that no machine holds."""
        check_image_size(image_size, self.info.patch_size)
        if image_size != self.info.image_size and self.runner is None:
            with torch.device("meta"):
                resized_state(self.model, built_at(self.model, image_size))
        rows, columns = self.grid_of(image_size)
        if rows * columns > MAX_POSITIONS:
            raise InputError(
                f"image size {image_size[0]}x{image_size[1]} has {rows * columns} patches; use a smaller one"
            )

    def grid_of(self, image_size: tuple[int, int]) -> Grid:
        """Rows and columns of patches of an image of (H, W) pixels."""
        return image_size[0] // self.info.patch_size[0], image_size[1] // self.info.patch_size[1]

    def use_math_attention(self) -> None:
        """Use plain products for attention: in bf16 on a CPU both passes take a fifth of the fused kernel's time."""
        for module in self.model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False

    def set_checkpointing(self, kept: Checkpointing) -> None:
        """Compute blocks again in the backward pass (models.runners); InputError for a model that cannot."""
        self.checkpointing = kept
        if self.runner is None and kept == "selective":
            raise InputError(f"checkpointing=selective: {self.info.architecture} does not run block by block; use true")
        if self.runner is None and kept:
            self.model.set_grad_checkpointing()

    def shard_blocks(self, *, bf16: bool = False) -> None:
        """Spread the blocks' weights over the processes, which all call it (core.sharding); ``bf16``: in autocast."""
        if self.runner is None:
            raise InputError(f"shard: {self.info.architecture} does not run block by block; leave shard out")
        shard(self, self.model.blocks, method="run_blocks", bf16=bf16)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """``torch.compile`` every block in place; parameter names stay as they are.

        Blocks alike share their graphs. Each shape and each mode of gradients has one, and the compiler's limit is
        raised to what a run needs: beyond it a block would silently run eagerly.
        """
        from torch._dynamo import config  # slow to import

        blocks = getattr(self.model, "blocks", ())
        config.recompile_limit = max(config.recompile_limit, GRAPHS * len({repr(block) for block in blocks}))
        for block in blocks:
            block.compile(dynamic=False, backend=backend)

    def _run_intermediates(
        self, images: Tensor, start: int, stop: int, wanted: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        if stop == start:
            return images, {}
        if start != 0:
            raise InputError(f"{self.info.architecture} cannot run a part of its blocks; use it without frozen blocks")
        indices = sorted({*wanted, stop - 1})
        options = {"indices": indices, "output_fmt": "NCHW", "stop_early": True, "intermediates_only": True}
        prefix = {"return_prefix_tokens": True} if _gives_prefix(self.model) else {}
        try:
            intermediates = self.model.forward_intermediates(images, **options, **prefix)
        except (AssertionError, RuntimeError) as error:  # timm's ways to refuse an image size
            height, width = images.shape[-2:]
            if (height, width) == self.info.image_size:
                raise
            native = "x".join(map(str, self.info.image_size))
            raise InputError(
                f"{self.info.architecture} takes images of {native} pixels only, got {height}x{width}; give every view "
                "and image that size, or load it with another image_size"
            ) from error
        outputs = {index: _as_tokens(value) for index, value in zip(indices, intermediates, strict=True)}
        return outputs[stop - 1], {index: outputs[index] for index in indices if index in wanted}


def _structure(model: Any, image_size: tuple[int, int] | None) -> dict[str, Any]:
    """Width, depth, heads, patch, tokens and image size of any timm model, as far as it shows them."""
    by_block = runner_for(model) is not None
    blocks = getattr(model, "blocks", None)
    attention = getattr(blocks[0], "attn", None) if blocks is not None and len(blocks) else None
    patch_embed: Any = getattr(model, "patch_embed", None)
    patch = patch_embed.feat_ratio(as_scalar=False) if by_block else model.feature_info[-1]["reduction"]
    image = getattr(patch_embed, "img_size", None) or getattr(model, "_model_args", {}).get("img_size") or image_size
    usual = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
    num_prefix = int(getattr(model, "num_prefix_tokens", 0)) if by_block or _gives_prefix(model) else 0
    return {
        "embed_dim": int(model.num_features),
        "depth": len(model.blocks) if by_block else len(model.feature_info),
        "num_heads": int(getattr(attention, "num_heads", 0)),
        "patch_size": height_width(patch),
        "num_prefix_tokens": num_prefix,
        "has_cls": num_prefix > 0 and getattr(model, "cls_token", None) is not None,
        "image_size": height_width(image or usual[1:]),
    }


def _gives_prefix(model: Any) -> bool:
    """Whether ``forward_intermediates`` gives prefix tokens; CaiT and XCiT add the class token after their blocks."""
    options = signature(model.forward_intermediates).parameters
    return "return_prefix_tokens" in options and getattr(model, "num_prefix_tokens", 0) > 0


def _per_channel(given: Sequence[float] | None, imagenet: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """``given`` as floats where it fits; else ImageNet's values, or their mean where channels are not three."""
    if given is not None and len(given) == channels:
        return tuple(float(value) for value in given)
    return imagenet if channels == 3 else (sum(imagenet) / 3,) * channels


def norm_eps(model: nn.Module) -> float | None:
    """The constant in the norms of the blocks; None where there is none, or several."""
    found = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.eps}
    return float(found.pop()) if len(found) == 1 else None


def _as_tokens(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Feature map [B, D, h, w], with or without prefix tokens [B, P, D], to tokens [B, P+N, D]."""
    if isinstance(output, tuple):
        spatial, prefix = output
        return torch.cat([prefix, _as_tokens(spatial)], dim=1)
    return output.flatten(2).transpose(1, 2)
