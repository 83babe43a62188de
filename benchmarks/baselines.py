"""What else could help a small set of images: baselines that evidence.py holds refinement against.

DIET-like (arXiv 2302.10260; as continued training from about 1,000 images DIET-CP, arXiv 2509.06990): every image is a
class of its own; cross entropy over image numbers with label smoothing, a linear head, one augmented view.

FUNGI (arXiv 2407.10964): nothing is trained. Beside the embedding of an image stand the gradients of three
self-supervised losses with respect to one linear layer, each projected at random to the embedding's width; PCA then
brings all back to that width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mim_refiner.checkpoints.load import load_backbone
from mim_refiner.core.layer_decay import layer_decay_scales
from mim_refiner.core.modules import evaluation_mode
from mim_refiner.core.optim import adamw, parameter_groups, set_learning_rate
from mim_refiner.core.run import Run
from mim_refiner.data.decode import ImageSet
from mim_refiner.data.loaders import TrainLoader, eval_batches
from mim_refiner.data.photometric import augment, normalize
from mim_refiner.data.views import ViewSpec
from mim_refiner.errors import DataError
from mim_refiner.evaluation.features import Features, own_image_size
from mim_refiner.evaluation.knn import knn_protocol
from mim_refiner.evaluation.linear_probe import linear_probe
from mim_refiner.evaluation.settings import EvaluationSettings
from mim_refiner.models.backbone import Backbone
from mim_refiner.training.loop import learning_rate, step_generator
from mim_refiner.training.recipe import RefineRecipe
from mim_refiner.training.refine import photometrics_of, view_specs

KEY_POOLING = "cls"

# --- DIET


@dataclass(frozen=True)
class DietSettings:
    """``label_smoothing`` is DIET's; ``lr`` is for 256 images a step. Views, layer decay and batch are the recipe's."""

    label_smoothing: float = 0.8
    lr: float = 1e-3
    warmup_epochs: float = 5.0
    weight_decay: float = 0.05


class Diet(nn.Module):
    """Encoder with a linear layer that has a row an image; no bias."""

    def __init__(self, backbone: Backbone, images: int, pooling: str) -> None:
        super().__init__()
        self.backbone, self.pooling = backbone, pooling
        self.head = nn.Linear(backbone.info.embed_dim, images, bias=False)

    def forward(self, views: Tensor) -> Tensor:
        """Logits [B, images] of normalised views [B, C, H, W]."""
        return self.head(embedding(self.backbone, views, self.pooling))


def embedding(backbone: Backbone, views: Tensor, pooling: str) -> Tensor:
    """The encoder's output [B, D], with its final norm."""
    return backbone.forward_blocks(views, (-1,), norm=True)[0].pooled(pooling)


def diet_loss(logits: Tensor, sample_ids: Tensor, label_smoothing: float) -> Tensor:
    """Mean cross entropy of logits [B, images] against the images' own numbers [B]."""
    return F.cross_entropy(logits, sample_ids, label_smoothing=label_smoothing)


def train_diet(
    backbone: Backbone, images: ImageSet, recipe: RefineRecipe, epochs: int, settings: DietSettings, run: Run
) -> None:
    """Train ``backbone`` in place for ``epochs`` passes over ``images``; ``recipe`` is resolved."""
    torch.manual_seed(run.seed)
    model = Diet(backbone, len(images), recipe.heads.pooling).to(run.device).train()
    backbone.requires_grad_(True)
    for parameter in backbone.fixed_parameters(recipe.frozen_blocks):
        parameter.requires_grad_(False)
    photometric, view = photometrics_of(recipe, backbone.info)[0], view_specs(recipe)[0]
    loader = TrainLoader(images, [view], recipe.batch_size, run.seed)
    phase = recipe.refinement.model_copy(
        update={"epochs": epochs, "base_lr": settings.lr, "warmup_epochs": min(settings.warmup_epochs, epochs / 4)}
    )
    scales = layer_decay_scales(backbone.model, phase.layer_decay) if phase.layer_decay < 1 else None
    named = backbone.model.named_parameters()
    encoder = parameter_groups(named, weight_decay=settings.weight_decay, scales=scales)
    head = parameter_groups(model.head.named_parameters(), weight_decay=settings.weight_decay)
    optimizer = adamw(encoder + head, (0.9, 0.999))
    steps = loader.steps_per_epoch
    run.reporter.phase("DIET", epochs * steps)
    for step, batch in ((e * steps + n, b) for e in range(epochs) for n, b in enumerate(loader.epoch(e))):
        [views] = augment(batch.views, [photometric], step_generator(run.seed, 0, step), run.device)
        with run.autocast():
            logits = model(views)
        loss = diet_loss(logits.float(), batch.sample_ids.to(run.device), settings.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        set_learning_rate(optimizer, learning_rate(phase, recipe.batch_size, steps, step))
        optimizer.step()
        run.reporter.progress(step + 1, {"loss": float(loss.detach())} if step % 10 == 0 else {})
    backbone.requires_grad_(True)


def flops_of_diet(model: str, total: int, images: int = 4) -> float:
    """Operations of one image's step of DIET among ``total`` images: one view, forward and backward."""
    backbone = load_backbone(model)
    backbone.use_math_attention()
    diet, shape = Diet(backbone, total, "mean"), (images, backbone.info.in_chans, *backbone.info.image_size)
    with FlopCounterMode(display=False) as counter:
        diet_loss(diet(torch.randn(shape)), torch.arange(images), 0.0).backward()
    return counter.get_total_flops() / images


# --- FUNGI


@dataclass(frozen=True)
class FungiSettings:
    """The published values, but for ``stride``: of the quarter-sized patches of the contrastive loss, as a share of
    their side (a sixth as published: 49 patches and more; a half: 9).
    """

    local_views: int = 10
    teacher_temperature: float = 0.07
    student_temperature: float = 0.1
    contrastive_temperature: float = 0.07
    negatives: int = 64  # images of the bank
    stride: float = 0.5
    widths: tuple[int, int, int] = (768, 2048, 96)  # of the heads: uniform, DINO, contrastive
    layer: str = "attn.proj"  # of the last block
    losses: tuple[str, ...] = ("uniform", "dino", "contrastive")  # none: the embedding alone, as a control
    batch_size: int = 32


def uniform_loss(latents: Tensor) -> Tensor:
    """KL divergence of the uniform distribution from softmax(latents [B, L]), [B]."""
    logs = F.log_softmax(latents, dim=-1)
    return -math.log(latents.shape[-1]) - logs.mean(-1)


def dino_loss(student: Tensor, teacher: Tensor, student_temperature: float, teacher_temperature: float) -> Tensor:
    """Cross entropy [B] of all views' students [B, V, L] under all global views' teachers [B, G, L], summed.

    Pairs of a view with itself count too: the authors found such gradients more predictive.
    """
    targets = F.softmax(teacher.detach() / teacher_temperature, dim=-1)
    logs = F.log_softmax(student / student_temperature, dim=-1)
    return -torch.einsum("bgl,bvl->b", targets, logs)


def contrastive_loss(latents: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """InfoNCE [B] within the patches of an image [B, V, L]: each against its others, beside ``negatives`` [M, L]."""
    own, others = F.normalize(latents, dim=-1), F.normalize(negatives, dim=-1)
    views = own.shape[1]
    itself = torch.eye(views, dtype=torch.bool, device=own.device)
    among = (own @ own.mT / temperature).masked_fill(itself, -math.inf)
    everyone = torch.cat([among, own @ others.mT / temperature], dim=-1)
    alike = among.masked_fill(itself, 0).sum(-1) / (views - 1)
    return (everyone.logsumexp(-1) - alike).mean(-1)


def quarter_patches(images: Tensor, stride: float) -> Tensor:
    """Windows of half the side of images [B, C, S, S], ``stride`` of a window apart, at full size [B, V, C, S, S]."""
    batch, channels, side, _ = images.shape
    window = side // 2
    step = max(1, int(window * stride))
    cut = images.unfold(2, window, step).unfold(3, window, step)  # [B, C, n, n, window, window]
    flat = cut.permute(0, 2, 3, 1, 4, 5).reshape(-1, channels, window, window)
    return F.interpolate(flat, side, mode="bicubic", antialias=True).view(batch, -1, channels, side, side)


class Fungi:
    """Gradient features of one encoder; heads, projection and negatives are drawn once, by the seed of ``run``."""

    def __init__(self, backbone: Backbone, bank: ImageSet, settings: FungiSettings, run: Run) -> None:
        self.backbone, self.settings, self.run = backbone.to(run.device), settings, run
        self.size, width = own_image_size(backbone.info), backbone.info.embed_dim
        self.layer: nn.Linear = backbone.model.blocks[-1].get_submodule(settings.layer)
        self.backbone.requires_grad_(False)  # the graph begins at the layer's output
        torch.manual_seed(run.seed)
        uniform, dino, contrastive = settings.widths
        shapes = {"uniform": uniform, "student": dino, "teacher": dino, "contrastive": contrastive}
        self.heads = nn.ModuleDict({name: nn.Linear(width, out) for name, out in shapes.items()}).to(run.device)
        entries = self.layer.out_features * (self.layer.in_features + 1)
        self.projection = (torch.randint(0, 2, (entries, width)) * 2 - 1).float().to(run.device)
        rows = np.sort(np.random.default_rng(run.seed).permutation(len(bank))[: settings.negatives])
        with evaluation_mode(self.backbone), torch.no_grad():
            batches = list(eval_batches(bank, self.size, settings.batch_size, indices=rows))
            views = torch.cat([quarter_patches(self._normal(batch), settings.stride) for batch, _ in batches])
            found = [embedding(self.backbone, part, KEY_POOLING) for part in views.flatten(0, 1).split(256)]
            self.negatives = self.heads["contrastive"](torch.cat(found))

    def _normal(self, images: Tensor) -> Tensor:
        return normalize(images.to(self.run.device), self.backbone.info.mean, self.backbone.info.std)

    def features(self, images: ImageSet) -> Features:
        """[embedding, three gradients] of every image, each scaled to length 1 [N, 4 D], as block -1, class token."""
        settings, rows = self.settings, np.arange(len(images))
        crops = {"jitter_prob": 0.0, "gray_prob": 0.0, "flip": 0.0}
        views = [ViewSpec("global", self.size, 2, (0.25, 1.0), **crops),
                 ViewSpec("local", self.size, settings.local_views, (0.05, 0.25), **crops)]  # fmt: skip
        loader = TrainLoader(images, views, settings.batch_size, self.run.seed, rows=rows)
        self.run.reporter.phase("FUNGI", len(images))
        found, seen = [], []
        with evaluation_mode(self.backbone):
            whole = eval_batches(images, self.size, settings.batch_size)
            for (batch, indices), cut in zip(whole, loader.epoch(0), strict=True):
                if not torch.equal(indices, cut.sample_ids):
                    raise DataError(f"{images.description}: FUNGI needs every image; leave out what cannot be read")
                found.append(self.of_batch(self._normal(batch), torch.stack([self._normal(v) for v in cut.views], 1)))
                seen.append(indices)
                self.run.reporter.progress(int(indices[-1]) + 1, {})
        labels = None if images.labels is None else torch.from_numpy(images.labels)[torch.cat(seen)]
        depth = self.backbone.info.depth
        return Features({(depth - 1, KEY_POOLING): torch.cat(found)}, labels, torch.cat(seen), depth)

    def of_batch(self, images: Tensor, crops: Tensor) -> Tensor:
        """[B, 4 D] of images [B, C, S, S] and their crops [B, V, C, S, S], two global ones first."""
        settings, heads = self.settings, self.heads

        def uniform(x: Tensor) -> Tensor:
            return uniform_loss(heads["uniform"](F.normalize(x[:, 0], dim=-1)))

        def dino(x: Tensor) -> Tensor:
            x = F.normalize(x, dim=-1)
            temperatures = settings.student_temperature, settings.teacher_temperature
            return dino_loss(heads["student"](x), heads["teacher"](x[:, :2]), *temperatures)

        def contrastive(x: Tensor) -> Tensor:
            return contrastive_loss(heads["contrastive"](x), self.negatives, settings.contrastive_temperature)

        with torch.no_grad():
            parts = [embedding(self.backbone, images, KEY_POOLING)]
        patches = quarter_patches(images, settings.stride)
        of_loss = {"uniform": (images[:, None], uniform), "dino": (crops, dino), "contrastive": (patches, contrastive)}
        for name in settings.losses:
            parts.append(self.gradients(*of_loss[name]) @ self.projection)
        return torch.cat([F.normalize(part, dim=-1) for part in parts], dim=1).detach().cpu()

    def gradients(self, views: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Gradient [B, out * (in + 1)] of each image's ``loss`` by the layer's weight and bias, summed over views.

        ``loss`` takes embeddings [B, V, D] and gives [B]. The images do not see each other, so that one backward pass
        of the sum gives the gradients of all: sum over tokens of (gradient at the output) x (input).
        """
        kept: dict[str, Tensor] = {}

        def cut(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            kept["input"], kept["output"] = inputs[0].detach(), output.detach().requires_grad_()
            return kept["output"]

        batch, count = views.shape[:2]
        hook = self.layer.register_forward_hook(cut)
        try:
            with torch.enable_grad():
                embedded = embedding(self.backbone, views.flatten(0, 1), KEY_POOLING).unflatten(0, (batch, count))
                [at_output] = torch.autograd.grad(loss(embedded).sum(), kept["output"])
        finally:
            hook.remove()
        inputs = kept["input"].unflatten(0, (batch, count)).flatten(1, 2)  # [B, V tokens, in]
        inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
        return torch.einsum("bto,bti->boi", at_output.unflatten(0, (batch, count)).flatten(1, 2), inputs).flatten(1)


def reduced(bank: Features, test: Features, width: int) -> tuple[Features, Features]:
    """Both sets on the ``width`` first principal axes of the bank."""
    [key] = bank.keys
    mean = bank[key].mean(0)
    _, _, axes = torch.linalg.svd(bank[key] - mean, full_matrices=False)
    axes = axes[:width].mT

    def on_axes(part: Features) -> Features:
        return Features({key: (part[key] - mean) @ axes}, part.labels, part.indices, part.depth)

    return on_axes(bank), on_axes(test)


def fungi_correct(
    backbone: Backbone, bank: ImageSet, test: ImageSet, protocols: Sequence[str], settings: FungiSettings, run: Run
) -> dict[str, NDArray[np.bool_]]:
    """{metric: right or wrong for every test image}. PCA orders its axes: they are not standardised after it."""
    fungi = Fungi(backbone, bank, settings, run)
    train, queries = reduced(fungi.features(bank), fungi.features(test), backbone.info.embed_dim)
    found: dict[str, NDArray[np.bool_]] = {}
    if "knn" in protocols:
        [score] = knn_protocol(train, queries, run, standardize=False).values()
        found[f"knn_top1 {KEY_POOLING}"] = score.correct
    if "linear" in protocols:
        [probe] = linear_probe(train, queries, EvaluationSettings.quick().linear, Run(run.device)).values()
        assert probe.selected is not None
        found[f"linear_top1 {KEY_POOLING}"] = probe.selected.correct
        found[f"linear_top1_best {KEY_POOLING}"] = probe.best.correct
    return found


def flops_of_fungi(model: str, settings: FungiSettings) -> float:
    """Operations of one image's features: itself and the views of each loss, forward (backward is of one block)."""
    backbone = load_backbone(model)
    backbone.use_math_attention()
    image = torch.randn(1, backbone.info.in_chans, *backbone.info.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.forward_blocks(image, (-1,))
    patches = quarter_patches(image, settings.stride).shape[1]
    views = {"uniform": 1, "dino": 2 + settings.local_views, "contrastive": patches}
    return counter.get_total_flops() * (1 + sum(views[name] for name in settings.losses))
