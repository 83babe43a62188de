"""Typed recipes: every number of a run, checked before anything starts.

A recipe is a pydantic model; a file of the same keys (YAML) or ``key=value`` overrides change it. Unknown keys are
refused with the nearest valid name. ``resolved`` recipes contain no "auto": they are what recipe.yaml records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import not_
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, NonNegativeFloat, PositiveFloat, ValidationInfo, field_validator

from mim_refiner.settings import (
    Decay,
    Idle,
    NonNegativeInt,
    OneOrEach,
    PositiveInt,
    Precision,
    Settings,
    Share,
    Size,
    changed,
    read_setting,
)
from mim_refiner.training.domains import DOMAINS, PHOTOGRAPHS
from mim_refiner.types import Checkpointing, ImageSize

Width = Annotated[int, Field(ge=1, le=2**17)]  # of a layer
Hue = Annotated[float, Field(ge=0, le=0.5)]
R = TypeVar("R", bound="Recipe")


class Phase(Settings):
    """One training phase. Peak learning rate = base_lr * batch_size / 256 (linear scaling)."""

    epochs: Annotated[int, Field(ge=0, le=10**6)]  # passes over the images
    base_lr: PositiveFloat  # learning rate at batch size 256
    warmup_epochs: NonNegativeFloat = 4  # in which the learning rate rises from zero
    end_lr: NonNegativeFloat = 1e-6  # where its cosine ends
    max_seconds: PositiveFloat | None = None  # the phase ends by then: on a slower machine it leaves out some steps


class HeadPhase(Phase):
    """A phase in which heads look up neighbours."""

    top_k: PositiveInt = 1  # neighbours to draw from: 1 in head warm-up, 20 in refinement


class EncoderPhase(HeadPhase):
    """A phase in which the encoder learns too."""

    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # learning rate of a block against that of the next one


class Views(Settings):
    """Multi-crop views; sizes in pixels, scales are shares of the image area."""

    global_size: Size | None = None  # None: the encoder's own image size
    global_scale: tuple[float, float] = (0.25, 1.0)  # share of the image that a global view shows
    local_size: Size | None = 96  # None: three sevenths of the global size, in whole patches
    local_scale: tuple[float, float] = (0.05, 0.25)  # share that a local view shows
    num_local: Annotated[int, Field(ge=0, le=1000)] = 10  # local views of an image, beside two global ones
    flip: Share = 0.5  # chance of left for right
    vflip: Share = 0.0  # upside down
    crop_axes: Literal["both", "longer"] = "both"  # longer: crops span the shorter axis whole
    jitter_prob: Share = 0.8  # chance of new colours
    # largest changes of brightness, contrast, saturation and hue
    jitter: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, Hue] = (0.4, 0.4, 0.2, 0.1)
    jitter_strength: NonNegativeFloat = 1.0  # multiplies jitter: brightness, contrast, saturation, hue
    gray_prob: Share = 0.2  # chance of no colour
    blur_prob: tuple[Share, Share, Share] = (1.0, 0.1, 0.5)  # global 0, global 1, local
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarize_prob: tuple[Share, Share, Share] = (0.0, 0.2, 0.0)  # as blur_prob
    # For images that are no photographs (data/domain.py says what each is).
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0  # degrees, either way
    gain: Decay = 0.0  # each channel by a factor up to 1 ± gain
    noise: Decay = 0.0  # deviation of noise, as a share of the range of values
    mask_rows: Decay = 0.0  # largest share of rows left out in one band
    mask_columns: Decay = 0.0  # and of columns

    @property
    def shapes(self) -> list[tuple[ImageSize, int]]:
        """(pixels, how many such views); views of one size pass through the encoder together."""
        assert self.global_size is not None
        shapes: dict[ImageSize, int] = {self.global_size: 2}
        if self.num_local:
            assert self.local_size is not None
            shapes[self.local_size] = shapes.get(self.local_size, 0) + self.num_local
        return list(shapes.items())


class Heads(Settings):
    """One head per listed block (0-indexed); "last_third" comes from the encoder's depth, "auto" from measuring it."""

    blocks: list[int] | Literal["last_third", "auto"] = "last_third"  # from 0; auto: measured first
    # what of a block a head sees; auto: cls where there is one; a list: one for each of the blocks, in their order
    pooling: OneOrEach[Literal["auto", "cls", "mean"]] = "auto"
    projector_hidden: Width = 2048  # width of the projector's layers
    predictor_hidden: Width = 4096  # and of the predictor's
    out_dim: Width = 256  # numbers of an image that are compared
    queue_size: Annotated[int, Field(ge=1, le=2**24)] = 65_536  # latest images, among which neighbours are sought
    # of the loss: the lower, the more the nearest negatives count; a list: one for each of the blocks
    temperature: OneOrEach[PositiveFloat] = 0.2
    view_pairing: Literal["cross", "reference"] = "cross"  # cross: other views only; reference: the public code's
    swap_negatives: bool = False  # True: the neighbour stands for the target in negatives too (NNCLR)
    swap_positive: bool = True  # False: no neighbours, plain contrastive learning (an ablation)

    @field_validator("temperature", "pooling")
    @classmethod
    def _a_list_says_how_many(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, list) and info.data.get("blocks") == "auto":
            raise ValueError("heads.blocks=auto chooses how many heads there are; list the blocks, or give one value")
        return value

    @property
    def measured_pooling(self) -> str:
        """What the run is measured by: the last head's."""
        return self.pooling if isinstance(self.pooling, str) else self.pooling[-1]


class GuardSettings(Settings):
    """When refinement is stopped for doing harm (training/guard.py); shares are of what the START had."""

    enabled: bool = True  # false: no looks
    every: PositiveInt = 100  # steps between looks, at most a fifth of the phase
    images: PositiveInt = 256  # looked at
    patience: PositiveInt = 2  # bad looks running
    min_rank: NonNegativeFloat = 0.35  # effective rank of the features
    min_spread: NonNegativeFloat = 0.1  # their spread
    min_retrieval: NonNegativeFloat = 0.7  # how often another view of an image is nearest
    max_knn_drop: NonNegativeFloat = 0.05  # in k-NN accuracy, 0-1; more where few test images make it noisy


class AnchorSettings(Settings):
    """Dense anchor (models/refiner.py): patches shall stay as alike to each other as they were at the START."""

    weight: NonNegativeFloat = 0.0  # of its distance, added to the loss of the heads; 0: no anchor
    blocks: Literal["last", "heads"] = "last"  # whose patch tokens
    share: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the refinement's steps, evenly spread


class SweepSettings(Settings):
    """Heads of several temperatures and poolings, each with each, learn for an epoch (eight steps at least) on the
    frozen encoder; the best stays."""

    temperatures: list[PositiveFloat] = Field(default=[])  # none: heads.temperature as it is
    poolings: list[Literal["cls", "mean"]] = Field(default=[])  # none: heads.pooling as it is

    @field_validator("*")
    @classmethod
    def _a_choice(cls, value: list[Any], info: ValidationInfo) -> list[Any]:
        if len(set(value)) < len(value):
            raise ValueError("must be different ones")
        if len(value) == 1:
            single = {"temperatures": "temperature", "poolings": "pooling"}[info.field_name or ""]
            raise ValueError(f"one is no choice; set heads.{single}={value[0]} instead")
        return value

    def __bool__(self) -> bool:
        return bool(self.temperatures or self.poolings)


class LoraSettings(Settings):
    """Low-rank adapters (models/lora.py) with ``adapter=lora``; alpha / rank scales what they add."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 8  # of the two factors: how much an adapter can change
    alpha: PositiveFloat = 16.0  # alpha / rank scales what they add
    targets: list[str] = Field(default=["qkv", "proj"], min_length=1)  # last names of linear layers in the blocks


class Recipe(Settings):
    """What pre-training and refinement share."""

    idle: ClassVar[tuple[Idle, ...]] = (Idle("workers", not_, ("loader_timeout",), " above 0"),)

    name: str  # what it is called
    expected: str = ""  # what this recipe is known to give, with where the figure comes from
    batch_size: PositiveInt  # images a step, of all processes together
    betas: tuple[Decay, Decay] = (0.9, 0.95)  # of AdamW
    precision: Precision = "auto"  # bf16 on GPU, fp32 on CPU; "fast": bf16 also on CPUs that have it
    compile: bool = False  # torch.compile of the encoder's blocks: fewer passes over memory, half a minute to begin
    workers: int = Field(default=-1, ge=-1, le=4096)  # loader processes; -1: decided from data and cores
    # on, off, auto: 8-bit images stay on the GPU where they, padded alike, take a quarter of its free memory at most
    images_on_device: Literal["auto", "on", "off"] = "auto"
    reduced_decode: bool = True  # large JPEGs at 1/2, 1/4 or 1/8 where no view needs more pixels; not in evaluation
    loader_timeout: NonNegativeFloat = 600  # seconds without a batch after which loader processes are replaced
    checkpoint_every: PositiveInt = 500  # steps
    keep_checkpoints: PositiveInt = 2  # the newest ones
    log_every: PositiveInt = 10  # steps
    knn_every: NonNegativeInt = 1  # epochs between online k-NN evaluations (0: never); needs labels


class RefineRecipe(Recipe):
    """Both phases of MIM-Refiner (paper section 3.3 and appendix; ../docs recipes table)."""

    idle: ClassVar[tuple[Idle, ...]] = (
        *Recipe.idle,
        Idle("adapter", "none".__eq__, ("lora",), "=lora"),
        Idle("anchor.weight", not_, ("anchor",), " above 0"),
        Idle("guidance", "none".__eq__, ("guidance_share",), "=prefer or restrict"),
        Idle("guard.enabled", not_, ("guard",), "=true"),
        Idle("heads.swap_positive", not_, ("warmup.top_k", "refinement.top_k", "heads.swap_negatives"), "=true"),
        Idle("knn_every", not_, ("guard.max_knn_drop",), " above 0"),
        Idle("refinement.layer_decay", (1.0).__eq__, ("freeze_below",), " below 1"),
        Idle("sweep.poolings", bool, ("heads.pooling",), "=[]", beside=True),
        Idle("sweep.temperatures", bool, ("heads.temperature",), "=[]", beside=True),
        Idle("views.blur_prob", lambda value: not any(value), ("views.blur_sigma",), "=[0.5,0.1,0.2]"),
        Idle("views.jitter_prob", not_, ("views.jitter", "views.jitter_strength"), " above 0"),
        Idle("views.num_local", not_, ("views.local_size", "views.local_scale"), " above 0"),
    )

    domain: Literal[tuple(DOMAINS)] = PHOTOGRAPHS  # type: ignore[valid-type]  # of augmentations (training/domains.py)
    normalization: Literal["encoder", "data"] = "encoder"  # data: mean and deviation of the images' channels
    hold_out: Decay = 0.1  # share of labelled images that is measured on, not trained on, where no others are given
    views: Views = Views()
    heads: Heads = Heads()
    warmup: HeadPhase = HeadPhase(epochs=20, base_lr=2e-4)
    refinement: EncoderPhase = EncoderPhase(epochs=30, base_lr=4e-4, top_k=20, layer_decay=0.65)
    frozen_blocks: NonNegativeInt = 0  # stem and first blocks stay as they are
    freeze_below: NonNegativeFloat = 0.0  # freezes also the first blocks whose layer-decay scale is below; 0: none
    # So many epochs of views are cut, and their frozen features kept; later epochs draw from them. 0: always new views.
    view_pool: NonNegativeInt = 0
    # Memory; none changes what a step computes.
    micro_batch: PositiveInt | None = None  # images a process holds activations of at a time; None: its whole batch
    # Micro-batches (of views of one size) whose graph needs no second pass; auto: as many as the budget, or else the
    # free memory of a GPU, allows.
    kept_graphs: NonNegativeInt | Literal["auto"] = "auto"
    shard: bool = False  # FSDP2: encoder weights, gradients, moments and average spread over the processes
    # Computed again in the backward pass: all but block inputs (true), norms and GELU (selective), nothing (false).
    checkpointing: Checkpointing = False
    cuda_graphs: Literal["auto", "on", "off"] = "off"  # steps as CUDA graphs; auto: of encoders up to 384 wide
    weight_decay: NonNegativeFloat = 0.05  # of the encoder
    head_weight_decay: NonNegativeFloat = 1e-5  # of the heads
    ema_decay: Decay = 0.9999  # of the running average of the encoder
    # What export/ holds: the weights, their average, or ("auto") the average where the run is long enough for it.
    export_weights: Literal["auto", "model", "ema"] = "model"
    guard: GuardSettings = GuardSettings()
    anchor: AnchorSettings = AnchorSettings()
    sweep: SweepSettings = SweepSettings()
    # Labels in the look-up (core/guidance.py). prefer: of an image's nearest entries those of its class, if any;
    # restrict: the nearest of its class. Images whose label is not used are untouched.
    guidance: Literal["none", "prefer", "restrict"] = "none"
    guidance_share: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the labels of each class that are used
    adapter: Literal["none", "lora"] = "none"  # lora: the encoder's own weights stay as they are
    lora: LoraSettings = LoraSettings()

    def lay_under(self, tree: dict[str, Any], said: Mapping[str, Any]) -> None:
        """A domain's augmentations instead of those of the one before; views that are neither's own values stay."""
        name, before = said.get("domain"), tree["domain"]
        if not isinstance(name, str) or name not in DOMAINS:
            return
        old = DOMAINS[before].views if isinstance(before, str) and before in DOMAINS else {}
        base = (self.views if self.domain == PHOTOGRAPHS else Views()).model_dump()
        for key in old.keys() | DOMAINS[name].views.keys():
            value = tree["views"][key]
            if (tuple(value) if isinstance(value, list) else value) == old.get(key, base[key]):
                tree["views"][key] = DOMAINS[name].views.get(key, base[key])

    @field_validator("checkpointing")
    @classmethod
    def _compiled_blocks_choose_themselves(cls, value: Checkpointing, info: ValidationInfo) -> Checkpointing:
        if value == "selective" and info.data.get("compile"):
            raise ValueError("compiled blocks choose for themselves what to compute again; set it or compile to false")
        return value

    @property
    def graphs(self) -> int:
        """``kept_graphs``; none as long as nobody has looked how many fit."""
        return 0 if self.kept_graphs == "auto" else self.kept_graphs


class PretrainRecipe(Recipe):
    """Masked-autoencoder pre-training (arXiv 2111.06377, appendix A.1)."""

    idle: ClassVar[tuple[Idle, ...]] = (*Recipe.idle, Idle("decoder_depth", not_, ("decoder_heads",), " above 0"))

    image_size: Size | None = None  # None: size of the images, or 224 for larger ones
    micro_batch: PositiveInt | None = None  # images a process holds activations of at a time; None: its whole batch
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)  # share of patches that is hidden
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the image that is shown
    decoder_dim: Width = 512  # width of the decoder
    decoder_depth: Annotated[int, Field(ge=0, le=1000)] = 8  # its blocks
    decoder_heads: Width = 16  # its attention heads
    training: Phase = Phase(epochs=800, base_lr=1.5e-4, warmup_epochs=40, end_lr=0.0)
    weight_decay: NonNegativeFloat = 0.05  # of the encoder


def override(recipe: R, settings: Iterable[str], file: tuple[str, Mapping[str, Any]] = ("", {})) -> R:
    """Apply a recipe ``file`` and ``key=value`` overrides (dotted keys, YAML values) as ``settings.changed`` does."""
    return changed(recipe, map(read_setting, settings), file)
