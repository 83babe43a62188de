"""Layer-wise learning-rate decay: the closer a parameter is to the input, the less it moves (BEiT, MAE)."""

from __future__ import annotations

from timm.models import group_parameters
from torch import nn

from mim_refiner.errors import InputError

_STEM = {
    "cls_token", "dist_token", "reg_token", "mask_token", "pos_embed", "patch_embed", "norm_pre", "embed_norm",
    "rel_pos_bias", "rope", "pos_embed_win", "pos_embed_spatial", "pos_embed_temporal",
}  # fmt: skip
_TAIL = {"norm", "fc_norm", "attn_pool", "head", "head_dist"}


def layer_decay_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Return {parameter name: learning-rate scale} for a timm model.

    Block b of ``depth`` blocks: decay^(depth-b); stem (patch embedding, tokens, position table): decay^(depth+1); final
    norm, pooling and classifier: 1. Without a list ``blocks`` (ConvNeXt, Swin) the layers are those of the model's
    ``group_matcher``. Raises InputError for a decay outside (0, 1], and where layers or a parameter's are unknown.
    """
    if not 0 < decay <= 1:
        raise InputError(f"layer decay must be above 0 and at most 1, got {decay}")
    names = [name for name, _ in model.named_parameters()]
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.ModuleList | nn.Sequential):
        return {name: decay ** _distance(name, len(blocks)) for name in names}
    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        raise InputError(
            f"layer decay needs a model with a list 'blocks' or a group_matcher; {type(model).__name__} has none; set "
            "layer_decay to 1"
        )
    layers: dict[str, int] = group_parameters(model, matcher(coarse=False), reverse=True)
    last = max((layer for name, layer in layers.items() if name.partition(".")[0] not in _TAIL), default=0)
    return {name: 1.0 if name.partition(".")[0] in _TAIL else decay ** (last + 1 - layers[name]) for name in names}


def negligible_blocks(depth: int, decay: float, scale: float) -> int:
    """How many first blocks have a learning-rate scale below ``scale``: they hardly move, and may as well be frozen."""
    return sum(decay ** (depth - block) < scale for block in range(depth))


def _distance(name: str, depth: int) -> int:
    """Number of decays between the output and parameter ``name``."""
    head, _, rest = name.partition(".")
    if head == "blocks":
        return depth - int(rest.partition(".")[0])
    if head in _STEM:
        return depth + 1
    if head in _TAIL:
        return 0
    raise InputError(f"layer decay does not know where parameter '{name}' lies; set layer_decay to 1 for this model")
