"""How well the pixels can be restored from each block: a small MAE decoder on every block of the frozen encoder.

Masked prediction as in MAE (arXiv 2111.06377), from the tokens of any block instead of the last (MIM-Refiner, section
2): the encoder sees a quarter of the patches, the decoders predict the normalised pixels of the rest. One pass of the
frozen encoder serves the decoders of all blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mim_refiner._version import __version__
from mim_refiner.core.modules import evaluation_mode
from mim_refiner.core.optim import set_learning_rate
from mim_refiner.core.run import Run
from mim_refiner.core.schedules import warmup_cosine
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import eval_batches
from mim_refiner.data.photometric import seeded_generator
from mim_refiner.errors import DataError
from mim_refiner.evaluation.features import inputs_of, own_image_size
from mim_refiner.evaluation.linear_probe import shuffled
from mim_refiner.models.backbone import Backbone
from mim_refiner.models.mae import patchify, sincos_position_table
from mim_refiner.reporting import TITLES, signed
from mim_refiner.types import BackboneInfo, ImageSize

MIN_TRAINED = 2  # images to train decoders on


@dataclass(frozen=True)
class ReconstructionSettings:
    """Size and training of the decoders; ``dim`` 512 is the width of MAE's own decoder, the default is for a CPU."""

    dim: int = 64
    depth: int = 2
    head_dim: int = 32
    mask_ratio: float = 0.75
    epochs: int = 8
    batch_size: int = 64
    learning_rate: float = 4e-3
    warmup: float = 0.1  # share of all steps
    weight_decay: float = 0.05
    train_images: int = 2000
    test_images: int = 500

    def steps(self, images: int) -> int:
        """Training steps for so many images."""
        return self.epochs * (images // min(self.batch_size, images))


def reconstruction_by_block(
    backbone: Backbone,
    train: ImageSet,
    test: ImageSet,
    *,
    train_rows: NDArray[np.int64],
    test_rows: NDArray[np.int64],
    settings: ReconstructionSettings | None = None,
    run: Run | None = None,
) -> NDArray[np.float64]:
    """Train a decoder per block on ``train`` and return the masked error of each image of ``test``: [depth, N].

    Mean squared error of normalised pixels (1 = predicting the mean of each patch). Start weights, image order and
    masks depend on the run's seed alone, so two encoders of one size are compared in pairs. For plain ViTs.
    """
    settings, run = settings or ReconstructionSettings(), run or Run()
    if len(train_rows) < MIN_TRAINED:
        raise DataError(f"{train.description}: too few images to train decoders on; give more")
    backbone.to(run.device)
    size = own_image_size(backbone.info)
    decoders = BlockDecoders(backbone, settings, run.seed).to(run.device)
    optimizer = torch.optim.AdamW(decoders.parameters(), weight_decay=settings.weight_decay, betas=(0.9, 0.95))
    pixels = torch.cat([batch for batch, _ in eval_batches(train, size, 256, indices=train_rows)])
    batch, total = min(settings.batch_size, len(pixels)), settings.steps(len(pixels))
    how = {"total_steps": total, "warmup_steps": round(settings.warmup * total)}
    with evaluation_mode(backbone):
        for step, rows in enumerate(shuffled(len(pixels), batch, settings.epochs, run.seed)):
            set_learning_rate(optimizer, warmup_cosine(step, peak=settings.learning_rate, end=0.0, **how))
            noise = decoders.noise(len(rows), seeded_generator(run.seed, 2, step))
            with run.autocast():
                errors = decoders(inputs_of(backbone, pixels[rows], run), noise)
            optimizer.zero_grad(set_to_none=True)
            errors.mean(1).sum().backward()
            optimizer.step()
            run.reporter.progress(step + 1, {})
        return _evaluate(decoders, backbone, test, size, test_rows, run)


@torch.no_grad()
def _evaluate(
    decoders: BlockDecoders, backbone: Backbone, test: ImageSet, size: ImageSize, rows: NDArray[np.int64], run: Run
) -> NDArray[np.float64]:
    parts = []
    for number, (pixels, _) in enumerate(eval_batches(test, size, 128, indices=rows)):
        noise = decoders.noise(len(pixels), seeded_generator(run.seed, 3, number))
        with run.autocast():
            parts.append(decoders(inputs_of(backbone, pixels, run), noise).float().cpu())
    return torch.cat(parts, dim=1).double().numpy()


class BlockDecoders(nn.Module):
    """One decoder for each block of a frozen encoder; the encoder is no sub-module and gets no gradient."""

    def __init__(self, backbone: Backbone, settings: ReconstructionSettings, seed: int) -> None:
        super().__init__()
        self._encoder = (backbone,)  # in a tuple: not registered, so neither trained nor saved
        info = backbone.info
        self.grid = tuple(side // patch for side, patch in zip(info.image_size, info.patch_size, strict=True))
        self.visible = max(1, int(self.grid[0] * self.grid[1] * (1 - settings.mask_ratio)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first = _Decoder(info, self.grid, settings)
        self.decoders = nn.ModuleList(copy.deepcopy(first) for _ in range(info.depth))  # one start for all blocks

    def noise(self, count: int, generator: torch.Generator) -> Tensor:
        """Random numbers [B, N] that decide what is hidden."""
        return torch.rand(count, self.grid[0] * self.grid[1], generator=generator)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Masked error [depth, B] of normalised images [B, C, H, W]; the smallest ``noise`` [B, N] stay visible."""
        (backbone,) = self._encoder
        prefix = backbone.info.num_prefix_tokens
        order = noise.to(images.device).argsort(dim=1)
        shown, hidden = order[:, : self.visible], order[:, self.visible :]
        with torch.no_grad():
            tokens = backbone.embed(images)
            width = tokens.shape[2]
            patches = tokens[:, prefix:].gather(1, shown[..., None].expand(-1, -1, width))
            blocks = range(backbone.info.depth)
            visible = torch.cat([tokens[:, :prefix], patches], dim=1)
            _, outputs = backbone.run_blocks(visible, 0, len(blocks), list(blocks))
            target = patchify(images, backbone.info.patch_size)
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
            target = target.gather(1, hidden[..., None].expand(-1, -1, target.shape[2]))
        errors = []
        for block, decoder in enumerate(self.decoders):
            predicted = decoder(outputs[block], order, prefix)
            predicted = predicted.gather(1, hidden[..., None].expand(-1, -1, predicted.shape[2]))
            errors.append((predicted.float() - target).square().mean((1, 2)))
        return torch.stack(errors)


class _Decoder(nn.Module):
    """Tokens of the visible patches in, pixels of all patches out; the parts of MAE's decoder, small."""

    positions: Tensor  # [1, prefix + N, dim], fixed

    def __init__(self, info: BackboneInfo, grid: tuple[int, ...], settings: ReconstructionSettings) -> None:
        super().__init__()
        dim, heads = settings.dim, max(1, settings.dim // settings.head_dim)
        # block outputs differ in scale by far; without this the learning rate would favour some blocks
        self.scale = nn.LayerNorm(info.embed_dim, elementwise_affine=False)
        self.embed = nn.Linear(info.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.register_buffer("positions", sincos_position_table(dim, grid[0], grid[1], info.num_prefix_tokens))
        self.blocks = nn.Sequential(*(Block(dim, heads, qkv_bias=True) for _ in range(settings.depth)))
        self.norm = nn.LayerNorm(dim)
        self.pixels = nn.Linear(dim, info.patch_size[0] * info.patch_size[1] * info.in_chans)

    def forward(self, tokens: Tensor, order: Tensor, prefix: int) -> Tensor:
        """Predict pixels [B, N, P] from [B, prefix + visible, D]; ``order`` [B, N] lists the visible patches first."""
        tokens = self.embed(self.scale(tokens.float()))
        visible = tokens[:, prefix:]
        hidden = self.mask_token.to(tokens.dtype).expand(len(tokens), order.shape[1] - visible.shape[1], -1)
        places = order.argsort(dim=1)[..., None].expand(-1, -1, tokens.shape[2])
        patches = torch.cat([visible, hidden], dim=1).gather(1, places)
        tokens = torch.cat([tokens[:, :prefix], patches], dim=1) + self.positions
        pixels: Tensor = self.pixels(self.norm(self.blocks(tokens)))
        return pixels[:, prefix:]


# --- each block's share of what the encoder gains, and the three regimes that the shares show (section 2): early, k-NN
# and reconstruction both improve; middle, k-NN jumps; late, reconstruction improves and k-NN falls


def improvement_shares(values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Share [depth] of each block in the improvement from block 0 to the best block; ``values`` higher = better.

    Share of block b = (value b - value b-1) / (best value - value 0); block 0 has 0. The shares up to the best block
    add up to 1, and a block that makes it worse has a negative share. All zero when no block is better than block 0.
    """
    numbers = np.asarray(values, dtype=np.float64)
    total = numbers.max() - numbers[0]
    if not total > 0:
        return np.zeros(len(numbers))
    return np.diff(numbers, prepend=numbers[0]) / total


def find_regimes(
    knn: Sequence[float] | NDArray[np.float64], error: Sequence[float] | NDArray[np.float64]
) -> dict[str, list[int]]:
    """Blocks of each regime, {"early": [...], "middle": [...], "late": [...]}; any may be empty.

    Late begins after the block of the best k-NN accuracy. Middle is the run of blocks up to that one over which k-NN
    gains most beyond reconstruction, in shares; early is what lies before it. Block 0 gains nothing and is early.
    """
    peak = len(knn) - 1 - int(np.argmax(knn[::-1]))  # the last of equal ones, as in analysis/blocks.py
    ahead = improvement_shares(knn) - improvement_shares(-np.asarray(error, dtype=np.float64))
    # the run ending at the peak with the largest sum; the longest of equals
    sums = np.cumsum(ahead[peak::-1])[::-1] if peak else np.zeros(1)
    start = 1 + int(np.argmax(sums[1:])) if peak else 1
    blocks = list(range(len(knn)))
    return {"early": blocks[: min(start, peak + 1)], "middle": blocks[start : peak + 1], "late": blocks[peak + 1 :]}


def regimes_record(
    curves: Mapping[str, Mapping[str, Any]],
    errors: Mapping[str, NDArray[np.float64]],
    *,
    measure: str = "knn_top1",
    **facts: Any,
) -> dict[str, Any]:
    """JSON form for one or more models.

    ``curves`` holds the k-NN curve of each model (as in blocks.json: value, ci95, peak_before_last), ``errors`` the
    reconstruction error of each block and image [depth, N]. Without labels the curves are of neighbour consistency
    (``measure``), which takes the place of k-NN. ``facts`` (pooling, settings, samples) are kept.
    """
    what = TITLES[measure]
    models = {}
    for name, curve in curves.items():
        error = errors[name].mean(1)
        regimes = find_regimes(curve["value"], error)
        models[name] = {
            "knn": list(curve["value"]),
            "knn_ci95": [list(pair) for pair in curve["ci95"]],
            "error": error.tolist(),
            "knn_share": improvement_shares(curve["value"]).tolist(),
            "reconstruction_share": improvement_shares(-error).tolist(),
            "regimes": regimes,
            "statement": _statement(name, regimes, curve, error, what),
        }
    return {"kind": "regimes", "measure": measure, "models": models, **facts, "version": __version__}


def _statement(
    name: str, regimes: Mapping[str, list[int]], curve: Mapping[str, Any], error: NDArray[np.float64], what: str
) -> str:
    parts = []
    for regime, blocks in regimes.items():
        if not blocks:
            parts.append(f"no {regime} regime")
            continue
        first, last = blocks[0], blocks[-1]
        start = max(0, first - 1)  # what came in is what the block before gave out
        knn = 100 * (curve["value"][last] - curve["value"][start])
        change = error[last] - error[start]
        which = f"{first} to {last}" if last > first else f"{first}"
        parts.append(f"{regime} {which} ({what} {signed(knn)} points, reconstruction error {signed(change, 3)})")
    late = regimes["late"]
    doubt = "" if not late or curve["peak_before_last"] else f"; the late fall of {what} is within chance"
    return f"{name}, regimes by block: {', '.join(parts)}{doubt}."
